"""A figure that lives in the browser, drawn anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go


def refill(live: Any, drawn: go.Figure, clicked: Callable[..., None], kinds: tuple[str, ...] = ()) -> None:
    """Put what is drawn into a ``FigureWidget``, in the place of what it shows.

    Args:
        clicked: called at clicks on its traces, of these kinds ("bar", "heatmap"); of all kinds if none is given.
    """
    with live.batch_update():
        live.data = ()
        live.layout = {}
        live.add_traces(list(drawn.select_traces()))
        live.update_layout(drawn.layout)
    for trace in live.data:
        if not kinds or trace.type in kinds:
            trace.on_click(clicked)
