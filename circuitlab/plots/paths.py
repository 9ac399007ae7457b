"""Figures of what happens along a path between two models."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from circuitlab.plots.style import array, colour, styled


def collapse(found: Any) -> go.Figure:
    """How much activations vary at points of a path, against the line between the ends: a line for each map.

    Args:
        found: `Collapse`.
    """
    figure = go.Figure()
    ratio = array(found.ratio)
    many = len(found.ops) > 8
    for at, op in enumerate(found.ops):
        share = at / max(len(found.ops) - 1, 1)
        tint = f"rgba({int(68 + 170 * share)},{int(119 - 17 * share)},{int(170 - 51 * share)},0.9)" if many else colour(at)
        figure.add_trace(go.Scatter(x=list(found.alphas), y=ratio[:, at], name=op, mode="lines+markers" if len(found.alphas) < 30 else "lines",
                                    line={"color": tint}, marker={"size": 5}, hovertemplate=f"{op}<br>α = %{{x:.2f}}: %{{y:.3f}}<extra></extra>"))
    figure.update_xaxes(title_text="α", range=[-0.02, 1.02])
    figure.update_yaxes(title_text="variance / line between the ends", rangemode="tozero")
    return styled(figure, "variance of activations along the path")
