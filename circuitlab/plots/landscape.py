"""Figures of the loss landscape: paths between models, and what each layer adds to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlab.plots.style import INK, QUIET, array, colour, styled

_DASHES = ("solid", "dash", "dot")


def path(found: Any, *, kind: str | None = "chord", of: str = "loss", title: str = "", marks: bool = True) -> go.Figure:
    """A loss along a path or several, with the chord and the barrier; metrics stand in a panel below.

    Args:
        found: `Path`, or a dict of them by name, such as ``{"as trained": ..., "aligned": ...}``.
        kind: the barrier that is drawn on the first set of data shown; None for none. See `Path.barrier`.
        of: what is drawn: "loss", or the name of a metric.
        title: of the figure.
        marks: show the points that were evaluated.
    """
    paths: Mapping[str, Any] = found if isinstance(found, Mapping) else {"": found}
    first = next(iter(paths.values()))
    metrics = [name for name in first.names if name not in (of, "loss")]
    figure = make_subplots(rows=1 + bool(metrics), cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.66, 0.34] if metrics else None)
    for number, (name, one) in enumerate(paths.items()):
        for at, on in enumerate(one.sets):
            told = " ".join(part for part in (name, on if len(one.sets) > 1 else "") if part) or of
            shade = colour(number if len(paths) > 1 else at)
            line: dict[str, Any] = {"color": shade, "dash": "dash" if at and len(paths) > 1 else "solid", "width": 2}
            figure.add_trace(_curve(one.alphas, one.of(of, on), told, of, line, marks=marks), 1, 1)
            for style, metric in enumerate(metrics):
                curve = _curve(one.alphas, one.of(metric, on), f"{told} {metric}", metric, {**line, "dash": line["dash"] if not style else _DASHES[style % 3]}, marks=False)
                curve.showlegend = len(metrics) > 1
                figure.add_trace(curve, 2, 1)
            _lost(figure, one.alphas, one.of(of, on), shade)
        if kind is not None:
            _barrier(figure, one, kind, of, one.sets[-1], colour(number if len(paths) > 1 else len(one.sets) - 1), alone=len(paths) == 1)
    last = 1 + bool(metrics)
    ends = ("A", "B") if not first.layers else ("A", "A with B's layers")
    figure.update_xaxes(range=_padded(array(first.alphas)), showspikes=False, tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_xaxes(title_text="α", ticktext=[f"0<br>{ends[0]}", "¼", "½", "¾", f"1<br>{ends[1]}"], row=last, col=1)
    figure.update_yaxes(title_text=of, row=1, col=1)
    if metrics:
        shares = all(_shares(one.of(metric, on)) for one in paths.values() for metric in metrics for on in one.sets)
        figure.update_yaxes(title_text=metrics[0] if len(metrics) == 1 else "metrics", tickformat=".0%" if shares else None, row=2, col=1)
    figure.update_layout(showlegend=sum(one.showlegend is not False for one in _curves(figure)) > 1, hovermode="x unified")
    extra = f", corrected by {first.correct}" if first.correct and len(paths) == 1 else ""
    moves = f"; {len(first.layers)} {'layer moves' if len(first.layers) == 1 else 'layers move'}" if first.layers else ""
    figure = styled(figure, title or f"{of} between A and B{extra}{moves}", height=520 if metrics else 420)
    if first.layers:
        figure.update_layout(margin_r=70)  # room for the name of the far end
    return figure


def _curves(figure: go.Figure) -> list[Any]:
    found: Any = figure.data
    return list(found)


def _curve(x: Any, y: Any, name: str, quantity: str, line: Mapping[str, Any], *, marks: bool) -> go.Scatter:
    return go.Scatter(x=array(x), y=array(y), name=name, mode="lines+markers" if marks and len(x) <= 200 else "lines", line=dict(line), marker={"size": 5},
                      connectgaps=False, legendgroup=name, hovertemplate=f"{quantity} %{{y:.4g}}")


def _lost(figure: go.Figure, alphas: Any, values: Any, shade: str) -> None:
    """Crosses at the top, where a value is no number."""
    lost = ~np.isfinite(array(values))
    if not lost.any():
        return
    finite = array(values)[~lost]
    top = float(finite.max()) if len(finite) else 1.0
    figure.add_trace(go.Scatter(
        x=array(alphas)[lost], y=np.full(int(lost.sum()), top), mode="markers", marker={"symbol": "x", "size": 9, "color": shade}, name="not a number",
        showlegend=not any(one.name == "not a number" for one in _curves(figure)), legendgroup="not a number", customdata=[str(value) for value in array(values)[lost]], hovertemplate="%{customdata} here",
    ), 1, 1)


def _barrier(figure: go.Figure, one: Any, kind: str, of: str, on: str, shade: str, *, alone: bool) -> None:
    """What a barrier is measured from, and how high it is."""
    alphas, values = array(one.alphas), array(one.of(of, on))
    places = [np.flatnonzero(np.abs(alphas - end) < 1e-9) for end in (0, 1)]
    asked = (alphas >= 0) & (alphas <= 1) if kind == "mean-end" else np.abs(alphas - 0.5) < 1e-9 if kind == "mid" else (alphas > 0) & (alphas < 1)
    asked &= np.isfinite(values)
    if not all(map(len, places)) or not asked.any():
        return
    start, end = (float(values[place[0]]) for place in places)
    if not np.isfinite([start, end]).all():
        return
    sign = -1 if of == "accuracy" else 1  # what rises is the error
    level = sign * max(sign * start, sign * end) if kind == "max-end" else (start + end) / 2
    base = (1 - alphas) * start + alphas * end if kind == "chord" else np.full_like(alphas, level)
    top = int(np.argmax(np.where(asked, sign * (values - base), -np.inf)))
    height = one.barrier(kind, of=of, on=on, skipna=True)
    shown = (alphas >= 0) & (alphas <= 1)
    figure.add_trace(go.Scatter(x=alphas[shown], y=base[shown], mode="lines", line={"color": shade, "width": 1, "dash": "dot"}, hoverinfo="skip",
                                showlegend=False), 1, 1)
    figure.add_shape(type="line", x0=alphas[top], x1=alphas[top], y0=base[top], y1=values[top], line={"color": shade, "width": 1.5}, row=1, col=1)
    above = values[top] >= base[top]
    there = [value for value in (array(one.of(of, name))[top] for name in one.sets) if np.isfinite(value)]
    figure.add_annotation(
        x=alphas[top], y=max(there) if above else min(there), text=f"{kind} barrier {height:.3g}" if alone else f"{height:.3g}", showarrow=False, yanchor="bottom" if above else "top",
        yshift=5 if above else -5, xanchor="left" if alphas[top] < 0.2 else "right" if alphas[top] > 0.8 else "center", font={"color": shade, "size": 12},
        row=1, col=1,
    )


def _padded(alphas: Any) -> list[float]:
    low, high = min(0.0, float(alphas.min(initial=0))), max(1.0, float(alphas.max(initial=1)))
    return [low - 0.03 * (high - low), high + 0.03 * (high - low)]


def _shares(values: Any) -> bool:
    finite = array(values)[np.isfinite(array(values))]
    return bool(((finite >= 0) & (finite <= 1)).all())


def layer_paths(found: Any, *, kind: str = "chord", of: str = "loss", on: str | None = None, limit: int = 40) -> go.Figure:
    """Bars for each layer: how much the loss rises by taking it over from B, and the barrier on the way.

    Args:
        found: `LayerPaths`.
        kind: the barrier. See `Path.barrier`.
        of: "loss" or a metric. on: "train" or "test".
        limit: bars, at most: those of the layers that matter most, in the order of the model.
    """
    rise, barrier = found.rise(of, on), found.barrier(kind, of=of, on=on)
    order: Sequence[int] = range(len(rise))
    if len(rise) > limit:
        order = sorted(np.argsort(-np.nan_to_num(np.maximum(rise, barrier), nan=np.inf), kind="stable")[:limit].tolist())
    names = [found.layers[at] for at in order]
    figure = go.Figure()
    for number, (values, name) in enumerate(((rise, "with the layer of B"), (barrier, f"{kind} barrier on the way"))):
        figure.add_trace(go.Bar(y=names, x=[values[at] for at in order], orientation="h", name=name, marker={"color": colour(number)},
                                hovertemplate="%{y}: %{x:.4g}<extra>" + name + "</extra>"))
    figure.add_vline(x=0, line={"color": QUIET, "width": 1})
    figure.update_yaxes(autorange="reversed", type="category", automargin=True, tickfont={"color": INK})
    figure.update_xaxes(title_text=f"change of the {of}")
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"})
    hidden = f", the {limit} of {len(rise)} that matter most" if len(rise) > limit else ""
    return styled(figure, f"A with one layer of B{hidden}", height=160 + 34 * len(order))


__all__ = ["layer_paths", "path"]
