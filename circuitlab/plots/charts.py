"""Charts that several results are drawn as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from circuitlab.plots.style import HEAT, array, colour, styled


def matrix(values: Any, rows: Iterable[str], columns: Iterable[str], *, title: str, row_title: str, column_title: str, diverging: bool = False) -> go.Figure:
    """A small matrix with its numbers written in: pruning, coupling, agreement.

    Args:
        values: (rows, columns).
        rows, columns: their names.
        title, row_title, column_title: what is shown.
        diverging: colours that turn at zero.
    """
    shown = array(values)
    most = float(np.abs(shown[np.isfinite(shown)]).max()) if np.isfinite(shown).any() else 1.0
    figure = go.Figure(go.Heatmap(
        z=shown, x=list(columns), y=list(rows), colorscale="RdBu_r" if diverging else HEAT, texttemplate="%{z:.3g}" if shown.size <= 400 else None,
        zmin=-most if diverging else None, zmax=most if diverging else None, colorbar={"thickness": 10},
        hovertemplate="%{y} → %{x}: %{z:.4g}<extra></extra>",
    ))
    figure.update_yaxes(title_text=row_title, autorange="reversed", type="category")
    figure.update_xaxes(title_text=column_title, type="category")
    return styled(figure, title, height=max(320, 60 + 34 * shown.shape[0]))


def bars(values: Mapping[str, float], *, title: str, axis: str) -> go.Figure:
    """Named numbers as bars."""
    figure = go.Figure(go.Bar(x=list(values), y=list(values.values()), marker_color=colour(0)))
    figure.update_yaxes(title_text=axis)
    return styled(figure, title)
