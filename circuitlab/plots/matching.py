"""Figures of what lies between models: how alike they are, and how that was found."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlab.plots.style import QUIET, colour, styled


def match(found: Any) -> go.Figure:
    """How alike two models are in what has each wire, as they were and matched; and the objective of each start.

    Args:
        found: `Match`.
    """
    figure = make_subplots(rows=1, cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.12, subplot_titles=["similarity of each wire", "objective"])
    names = list(found.similarity)
    before, after = ([pair[side] for pair in found.similarity.values()] for side in (0, 1))
    gaps: list[Any] = [value for one, two in zip(before, after, strict=True) for value in (one, two, None)]
    figure.add_trace(go.Scatter(x=gaps, y=[name for name in names for _ in range(3)], mode="lines", line={"color": QUIET, "width": 1},
                                hoverinfo="skip", showlegend=False), 1, 1)
    for label, values, number in (("as they were", before, 1), ("matched", after, 0)):
        figure.add_trace(go.Scatter(x=values, y=names, mode="markers", name=label, marker={"color": colour(number), "size": 8},
                                    hovertemplate="%{y}: cosine %{x:.3f}<extra>" + label + "</extra>"), 1, 1)
    for number, row in enumerate(found.objective):
        best = number == found.best
        figure.add_trace(go.Scatter(x=list(range(len(row))), y=list(row), mode="lines+markers", name=f"start {number + 1}", showlegend=False,
                                    line={"color": colour(0) if best else QUIET, "width": 2 if best else 1}, marker={"size": 4},
                                    hovertemplate=f"start {number + 1}, %{{x}}: %{{y:.6g}}<extra></extra>"), 1, 2)
    figure.update_yaxes(autorange="reversed", type="category", row=1, col=1)
    figure.update_xaxes(title_text="cosine of all that has the wire", row=1, col=1)
    figure.update_xaxes(title_text="sweep" if found.method in ("weights", "activations") else "check", row=1, col=2)
    one, two = found.distance
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    return styled(figure, f"matched by {found.method}: distance {one:.4g} as they were, {two:.4g} matched", height=max(380, 160 + 22 * len(names)))
