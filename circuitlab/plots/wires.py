"""Figures of what is done to wires: cut to a width, stitched to those of another network."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from circuitlab.plots.charts import matrix
from circuitlab.plots.style import QUIET, array, colour, faded, styled


def width_curve(curve: Any, against: str = "width") -> go.Figure:
    """Loss against width or cost; random entries, with their range over draws, are dashed.

    Args:
        curve: a `WidthCurve`.
        against: "width", "flops" or "parameters".
    """
    one = len(curve.wires) == 1
    places = {
        "width": [width[0] if one else width[0] / curve.sizes[0] for width in curve.widths], "flops": curve.flops,
        "parameters": curve.parameters,
    }[against]
    end = {"width": curve.sizes[0] if one else 1.0, "flops": curve.whole_flops, "parameters": curve.whole_parameters}[against]
    figure = go.Figure()
    for number, way in enumerate(dict.fromkeys(row[0] for row in curve.rows)):
        steps = sorted({step for keep, step, _, _ in curve.rows if keep == way})
        draws = [[value for keep, at, _, value in curve.rows if (keep, at) == (way, step)] for step in steps]
        x, means = [places[step] for step in steps], [float(np.mean(values)) for values in draws]
        low, high = [min(values) for values in draws], [max(values) for values in draws]
        if x[-1] != end:
            x, means, low, high = [*x, end], [*means, curve.whole], [*low, curve.whole], [*high, curve.whole]
        if any(len(values) > 1 for values in draws):
            figure.add_trace(go.Scatter(x=[*x, *x[::-1]], y=[*high, *low[::-1]], mode="lines", fill="toself", fillcolor=faded(colour(number)), opacity=0.4,
                                        line={"width": 0}, hoverinfo="skip", showlegend=False))
        figure.add_trace(go.Scatter(
            x=x, y=means, mode="lines+markers", name={"first": "the first", "norm": "the largest", "random": "random"}.get(way, way),
            line={"color": colour(number), "dash": "dash" if way == "random" else "solid"},
            hovertemplate=f"{way}, {against} %{{x}}: %{{y:.4g}}<extra></extra>",
        ))
    figure.add_hline(y=curve.whole, line={"color": QUIET, "dash": "dot"}, annotation={"text": "whole", "font": {"color": QUIET}})
    title = {"width": "entries kept" if one else "share of entries kept", "flops": "flops of a run", "parameters": "parameters"}[against]
    figure.update_xaxes(title_text=title, rangemode="tozero", tickformat=".0%" if against == "width" and not one else None)
    figure.update_yaxes(title_text="loss")
    return styled(figure, f"loss against {against}, {curve.wires[0] if one else f'{len(curve.wires)} wires'} cut", height=420)


def stitching(found: Any, show: str = "loss") -> go.Figure:
    """How well each place of one network can be joined to each place of another; gaps do not fit.

    Args:
        found: a `StitchingMatrix`.
        show: "loss" of the stitched networks, or "error" of the fit.
    """
    values = found.loss if show == "loss" else found.error
    what = "loss of stitched networks" if show == "loss" else "share of the variance that a stitch leaves unexplained"
    return matrix(array(values), found.rows, found.columns, title=what, row_title=f"front: {found.titles[0]} up to",
                  column_title=f"back: {found.titles[1]} after")
