"""Results as pandas DataFrames; pandas itself is the reader's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuitlab.errors import InputError


def frame(data: Any, columns: Sequence[str] | None = None, *, of: str) -> Any:
    """A DataFrame of rows, or of columns by name.

    Args:
        data: what ``pandas.DataFrame`` takes.
        columns: their names, in order.
        of: who asks, for the error.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise InputError(f"{of} needs pandas: pip install pandas") from None
    return pd.DataFrame(data, columns=None if columns is None else list(columns))
