"""Figures of losses around models: planes, random directions, curves, ridges, spectra, and forks."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlab.plots.landscape import path
from circuitlab.plots.style import HEAT, INK, QUIET, colour, faded, styled

_HOVER = "(%{{x:.4g}}, %{{y:.4g}}): {name} %{{customdata:.4g}}<extra></extra>"
_LABEL = {"bgcolor": "rgba(20,24,30,0.65)", "font": {"color": "white", "size": 12}, "borderpad": 2}


def plane(found: Any, *, name: str = "loss", on: str | None = None, log: bool | None = None) -> go.Figure:
    """The loss in the plane through three models, which are marked, as is a trajectory where there is one.

    Args:
        found: `Plane`.
        name: of the quantity. on: the set of data; None is the first.
        log: colours on a logarithmic scale; None where all is above zero and spans more than a factor of ten.
    """
    figure = go.Figure(_contour(found.x, found.y, found.of(name, on), name, log))
    if found.trajectory is not None and len(found.trajectory):
        way, off = found.trajectory, found.off
        figure.add_trace(go.Scatter(
            x=way[:, 0], y=way[:, 1], mode="lines+markers", line={"color": "rgba(255,255,255,0.85)", "width": 1.5}, showlegend=False,
            marker={"size": 9, "color": off, "colorscale": "OrRd", "cmin": 0, "cmax": float(off.max()) or 1.0, "line": {"color": "white", "width": 1},
                    "colorbar": {"title": {"text": "off the plane", "side": "right"}, "thickness": 10, "x": 1.13}},
            customdata=np.column_stack([np.arange(len(way)), off]),
            hovertemplate="checkpoint %{customdata[0]}<br>%{customdata[1]:.4g} off the plane<extra></extra>",
        ))
    values = found.at_corners[0 if on is None else found.sets.index(on), :, found.names.index(name)]
    figure.add_trace(go.Scatter(
        x=found.corners[:, 0], y=found.corners[:, 1], mode="markers", showlegend=False, customdata=values,
        marker={"size": 11, "color": "white", "line": {"color": "black", "width": 2}}, text=list(found.labels),
        hovertemplate="%{text}: " + name + " %{customdata:.4g}<extra></extra>",
    ))
    for label, (x, y), value in zip(found.labels, found.corners.tolist(), values.tolist(), strict=True):
        figure.add_annotation(x=x, y=y, text=f"{label}  {value:.3g}", showarrow=False, yshift=19, **_LABEL)
    return _map(figure, f"{on or found.sets[0]} {name} in the plane through {', '.join(found.labels[:2])} and {found.labels[2]}")


def _scaled(values: Any, name: str, log: bool | None) -> tuple[Any, float, float, dict[str, Any]]:
    """Values on the scale of their colours, the least and the largest of them, and the bar that tells the scale."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    log = low > 0 and high > 10 * low if log is None else log and low > 0
    bar: dict[str, Any] = {"title": {"text": name, "side": "right"}, "thickness": 10}
    if not log:
        return values, low, high, bar
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.log10(values)
    marks = [m * 10.0**e for e in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1) for m in (1, 2, 5)]
    marks = [mark for mark in marks if low <= mark <= high]
    return shown, float(np.log10(low)), float(np.log10(high)), {**bar, "tickvals": np.log10(marks).tolist(), "ticktext": [f"{mark:g}" for mark in marks]}


def _contour(x: Any, y: Any, values: Any, name: str, log: bool | None) -> go.Contour:
    shown, low, high, bar = _scaled(values, name, log)
    return go.Contour(
        x=x, y=y, z=shown, customdata=values, colorscale=HEAT, colorbar=bar, line={"width": 0.6, "color": "rgba(255,255,255,0.45)"},
        contours={"start": low, "end": high, "size": (high - low) / 24 or 1.0}, hoverongaps=False, hovertemplate=_HOVER.format(name=name),
    )


def _map(figure: go.Figure, title: str) -> go.Figure:
    """Axes that are distances: of one scale, and no wider than the values."""
    figure = styled(figure, title, height=520)
    figure.update_xaxes(title_text="distance", constrain="domain", showgrid=False, zeroline=False, ticks="outside", tickcolor=INK)
    figure.update_yaxes(title_text="distance", scaleanchor="x", constrain="domain", showgrid=False, zeroline=False, ticks="outside", tickcolor=INK)
    return figure


# ridges -----------------------------------------------------------------------------------------------


def ridge(found: Any, *, blocks: int = 7) -> go.Figure:
    """Where a barrier comes from: the loss and its chord, the curvature along the path, and what the rise is made of.

    Args:
        found: `Ridge`.
        blocks: that are shown one by one, at most: those that do most.
    """
    t = found.alphas
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.34, 0.26, 0.4])
    chord = found.loss - found.rise
    top = int(np.argmax(np.abs(found.rise)))

    def line(row: int, y: Any, name: str, **options: Any) -> None:
        figure.add_trace(go.Scatter(x=t, y=y, name=name, mode="lines", legendgroup=str(row), hovertemplate=f"α=%{{x:.3g}}: {name} %{{y:.4g}}<extra></extra>", **options), row, 1)

    line(1, chord, "chord", line={"color": QUIET, "dash": "dash", "width": 1.5}, showlegend=False)
    line(1, found.loss, "loss", line={"color": colour(0), "width": 2.5}, fill="tonexty", fillcolor="rgba(68,119,170,0.15)", showlegend=False)
    figure.add_annotation(x=t[top], y=found.loss[top], text=f"{found.rise[top]:+.3g} above the chord", showarrow=False, yshift=12, row=1, col=1)
    line(2, found.total, "dᵀHd", line={"color": colour(1), "width": 2.5}, fill="tozeroy", fillcolor="rgba(238,102,119,0.15)", showlegend=False)
    most = np.sort(np.argsort(-np.abs(found.alone).max(0), kind="stable")[:blocks])
    parts = [(found.blocks[at], found.alone[:, at], colour(number + 2)) for number, at in enumerate(most.tolist())]
    if len(most) < len(found.blocks):
        parts.append((f"{len(found.blocks) - len(most)} other blocks", found.alone.sum(1) - found.alone[:, most].sum(1), QUIET))
    parts += [("between blocks", found.between, colour(0)), ("kinks", found.kinks, colour(9))]
    for name, values, shade in parts:  # what lifts is stacked upwards, what lowers downwards
        for sign in (1, -1):
            part = np.where(sign * values > 0, values, 0)
            if np.any(part) or sign * values[top] > 0:
                first = bool(sign * values[top] >= 0)
                line(3, part, name, stackgroup="up" if sign > 0 else "down", line={"width": 0.5, "color": shade}, fillcolor=faded(shade), showlegend=first)
    line(3, found.rise, "rise", line={"color": INK, "width": 3})
    line(3, found.by_ends, "told by both ends' Hessians", line={"color": INK, "width": 2, "dash": "dot"})
    for row, title in ((1, "loss"), (2, "curvature dᵀHd"), (3, "rise above the chord")):
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_xaxes(title_text="α: from a to b", row=3, col=1)
    forked = "" if found.angle is None else f", which fork at {found.angle:.0f}°"
    return styled(figure, f"The curvature that the barrier between two models{forked} is made of", height=720)


# curves -----------------------------------------------------------------------------------------------


def curve(found: Any, *, of: str = "loss", kind: str | None = "chord") -> go.Figure:
    """The loss along a trained curve, and along the straight line.

    Args:
        found: `Curve`.
        of: "loss" or a metric. kind: the barrier that is drawn. See `Path.barrier`.
    """
    bends = f"{len(found.bends)} bend{'s' if len(found.bends) > 1 else ''}"
    extra = f", corrected by {found.path.correct}" if found.path.correct else ""
    figure = path({"curve": found.path, "straight line": found.straight}, of=of, kind=kind, title=f"{of} on a {found.kind} curve with {bends}{extra}")
    return figure.update_xaxes(title_text="t", row=2 if len(found.path.names) > 1 else 1, col=1)


# around one model -------------------------------------------------------------------------------------


def surface(found: Any, *, name: str = "loss", on: str | None = None, log: bool | None = None, solid: bool = False) -> go.Figure:
    """The loss around a model: a line along one direction, contours or a solid surface along two.

    Args:
        found: `Surface`.
        name: of the quantity. on: the set of data; None is the first, and along one direction all of them.
        log: a logarithmic scale; None where all is above zero and spans more than a factor of ten (of colours alone).
        solid: as a surface in space instead of contours.
    """
    title = f"{name} along {found.about}"
    if found.y is None:
        figure = go.Figure()
        for at, kind in enumerate(found.sets if on is None else (on,)):
            figure.add_trace(go.Scatter(x=found.x, y=found.of(name, kind), mode="lines+markers", name=kind, marker={"size": 5}, line={"color": colour(at), "width": 2},
                                        hovertemplate=f"%{{x:.3g}}: {name} %{{y:.4g}}"))
        figure.update_yaxes(title_text=name, type="log" if log else None)
        figure.update_xaxes(title_text="share of the direction")
        return styled(figure, title, showlegend=on is None and len(found.sets) > 1)
    if solid:
        shown, _, _, bar = _scaled(found.of(name, on), name, log)
        figure = go.Figure(go.Surface(x=found.x, y=found.y, z=shown, customdata=found.of(name, on), colorscale=HEAT, colorbar=bar, hovertemplate=_HOVER.format(name=name)))
        axis = {"color": INK, "gridcolor": QUIET, "backgroundcolor": "rgba(0,0,0,0)"}
        ticks = {key: bar[key] for key in ("tickvals", "ticktext") if key in bar}
        scene = {"xaxis": {"title": {"text": "first"}, **axis}, "yaxis": {"title": {"text": "second"}, **axis}, "zaxis": {"title": {"text": name}, **axis, **ticks}}
        return styled(figure, title, height=560, scene=scene)
    figure = go.Figure(_contour(found.x, found.y, found.of(name, on), name, log))
    centre = float(found.centre[0 if on is None else found.sets.index(on), found.names.index(name)])
    figure.add_trace(go.Scatter(x=[0], y=[0], mode="markers", marker={"size": 10, "color": "white", "line": {"color": "black", "width": 2}}, showlegend=False,
                                hovertemplate=f"the model: {name} {centre:.4g}<extra></extra>"))
    figure.add_annotation(x=0, y=0, text=f"{centre:.3g}", showarrow=False, yshift=18, **_LABEL)
    figure = _map(figure, title)
    figure.update_xaxes(title_text="share of the first direction")
    return figure.update_yaxes(title_text="share of the second direction")


def spectrum(found: Any, *, width: float | None = None) -> go.Figure:
    """Density of the eigenvalues of a Hessian on a logarithmic scale, and those that were found one by one.

    Args:
        found: `Spectrum`.
        width: of the Gaussians that stand for single values. See `Spectrum.density`.
    """
    figure = go.Figure()
    base = 1.0
    if len(found.nodes):
        values, density = found.density(width=width)
        base = float(density.max())
        least = base * 1e-7
        figure.add_trace(go.Scatter(x=values, y=np.maximum(density, least), mode="lines", name="density", line={"color": colour(0), "width": 2}, fill="tozeroy",
                                    fillcolor="rgba(68,119,170,0.15)", hovertemplate="%{x:.4g}: %{y:.3g}<extra></extra>"))
        figure.update_yaxes(title_text="density", type="log", range=[np.log10(least), np.log10(base) + 0.4], exponentformat="power")
    else:
        figure.update_yaxes(showticklabels=False, range=[0, 1.6], showgrid=False)
    heights = np.full(len(found.eigenvalues), base * (1e-6 if len(found.nodes) else 1))
    figure.add_trace(go.Scatter(x=found.eigenvalues, y=heights, mode="markers", name="single eigenvalues", marker={"size": 11, "color": colour(1), "symbol": "line-ns-open", "line": {"width": 2}},
                                hovertemplate="λ = %{x:.5g}<extra></extra>"))
    figure.update_xaxes(title_text="eigenvalue", zeroline=True)
    about = f", trace about {found.trace:.3g}" if len(found.nodes) else ""
    largest = f": largest {found.eigenvalues[0]:.3g}" if len(found.eigenvalues) and found.which != "SA" else ""
    return styled(figure, f"Hessian of {found.parameters:,} parameters{largest}{about}", legend_orientation="h", legend_y=1.08)


# forks ------------------------------------------------------------------------------------------------


def instability(found: Any, *, of: str = "loss", on: str | None = None, kinds: tuple[str, ...] = ("mean-end", "max-end")) -> go.Figure:
    """Barriers between children against the step at which they were forked: the mean over pairs, and from the least to the largest.

    Args:
        found: `Instability`.
        of: "loss" or a metric; of "accuracy" the barrier is that of the error. on: the set of data; None is the last.
        kinds: of the barriers. See `Path.barrier`.
    """
    figure = go.Figure()
    x = [f"{fork:,}" for fork in found.forks]
    for number, kind in enumerate(kinds):
        values, shade = found.barrier(kind, of=of, on=on), colour(number)
        for edge, fill in ((values.max(1), None), (values.min(1), "tonexty")):
            figure.add_trace(go.Scatter(x=x, y=edge, mode="lines", line={"width": 0}, fill=fill, fillcolor=faded(shade).replace("0.4", "0.18"), hoverinfo="skip",
                                        showlegend=False, legendgroup=kind))
        figure.add_trace(go.Scatter(x=x, y=values.mean(1), mode="lines+markers", name=f"{kind}, mean of {values.shape[1]} pairs", line={"color": shade, "width": 2.5},
                                    marker={"size": 7}, legendgroup=kind, hovertemplate=f"forked at %{{x}}: {kind} %{{y:.4g}}<extra></extra>"))
    figure.add_hline(y=0, line={"color": QUIET, "width": 1, "dash": "dot"})
    name = "error" if of == "accuracy" else of
    figure.update_xaxes(title_text="step at which the children were forked", type="category")
    figure.update_yaxes(title_text=f"{name} barrier", tickformat=".0%" if of == "accuracy" else None)
    return styled(figure, f"{on or found.paths[0][0].sets[-1]} {name} barrier between two children of one parent, at step {found.stop:,}")
