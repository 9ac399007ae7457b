"""What all figures share: colours, backgrounds, and how large matrices are made small."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

PIXELS = 1000
"""Cells a side of a drawn matrix, at most."""
INK, QUIET, GRID = "#7f868f", "#9aa0a8", "rgba(127,134,143,0.25)"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5566", "#997700", "#44aa99", "#777777")
"""Paul Tol's bright scheme and four more: told apart by colour-blind readers."""
HEAT = "Viridis"


def colour(number: int) -> str:
    """The colour of a module, everywhere."""
    return COLOURS[number % len(COLOURS)]


def styled(figure: go.Figure, title: str, *, height: int = 380, **layout: Any) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0.02}, height=height, margin={"l": 60, "r": 20, "t": 56, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": INK, "size": 12},
        legend={"bgcolor": "rgba(0,0,0,0)"}, **layout,
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=QUIET)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=QUIET)
    return figure


def array(values: Any) -> np.ndarray[Any, Any]:
    """NumPy's view of an array or a tensor on any device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def aggregated(matrix: Any, pixels: int = PIXELS) -> tuple[np.ndarray[Any, Any], int]:
    """A matrix averaged over squares, so that it has at most ``pixels`` rows and columns; and the side of the squares."""
    whole = array(matrix)
    side = max(1, -(-max(whole.shape) // pixels))
    if side == 1:
        return whole.astype(np.float64), 1
    starts = [np.arange(0, size, side) for size in whole.shape]
    sums = np.add.reduceat(np.add.reduceat(whole, starts[0], axis=0, dtype=np.float64), starts[1], axis=1)
    rows, columns = (np.diff(np.append(start, size)).astype(np.float64) for start, size in zip(starts, whole.shape, strict=True))
    return sums / (rows[:, None] * columns), side


def faded(hexadecimal: str) -> str:
    red, green, blue = (int(hexadecimal[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.4)"
