"""Figures of neurons and their modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitlab.plots.style import HEAT, INK, PIXELS, QUIET, aggregated, array, colour, faded, styled

# neurons ----------------------------------------------------------------------------------------------


def neurons(stats: Any, *, labels: bool = True) -> go.Figure:
    """How often neurons fire and how much they write; and, with labels, on which of them each fires.

    Args:
        stats: `NeuronStats`.
        labels: show firing by label where it is known; neurons are sorted by the label that they fire on most.
    """
    by_label = labels and stats.label_firing is not None and len(stats.label_names) > 0
    figure = make_subplots(
        rows=1, cols=3 if by_label else 2, horizontal_spacing=0.09,
        subplot_titles=["how often neurons fire", "firing and what is written", "firing on each label"][: 3 if by_label else 2],
    )
    frequency, magnitude = array(stats.frequency), array(stats.magnitude)
    rank = np.argsort(-frequency, kind="stable")
    figure.add_trace(go.Scatter(x=np.arange(len(rank)), y=frequency[rank], customdata=rank, mode="lines", line={"color": colour(0)},
                                hovertemplate="neuron %{customdata}<br>fires at %{y:.2%}<extra></extra>"), 1, 1)
    figure.update_xaxes(title_text="neurons, by rank", row=1, col=1)
    figure.update_yaxes(title_text="share of positions", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.add_trace(go.Scattergl(x=frequency, y=magnitude, customdata=np.arange(len(frequency)), mode="markers",
                                  marker={"color": colour(0), "size": 4, "opacity": 0.6},
                                  hovertemplate="neuron %{customdata}<br>fires at %{x:.2%}<br>E|h|·‖V‖ = %{y:.3g}<extra></extra>"), 1, 2)
    figure.update_xaxes(title_text="share of positions", tickformat=".0%", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title_text="E|h|·‖V‖", rangemode="tozero", row=1, col=2)
    if by_label:
        share = array(stats.label_firing) / np.maximum(array(stats.label_n), 1)[:, None]
        order = np.lexsort((-share.max(0), share.argmax(0)))
        shown, side = aggregated(np.repeat(share[:, order], 1, axis=0), PIXELS)
        if side > 1:  # only neurons are averaged, never labels
            starts = np.arange(0, share.shape[1], side)
            shown = np.add.reduceat(share[:, order], starts, axis=1) / np.diff(np.append(starts, share.shape[1]))
        figure.add_trace(go.Heatmap(z=shown, y=list(stats.label_names), x=np.arange(0, share.shape[1], side), colorscale=HEAT,
                                    colorbar={"tickformat": ".0%", "thickness": 10},
                                    hovertemplate="%{y}: fires at %{z:.1%}<extra></extra>"), 1, 3)
        figure.update_xaxes(title_text="neurons, by their label", row=1, col=3)
    figure.update_layout(showlegend=False)
    return styled(figure, f"{stats.wire}: {stats.ffn.size} neurons over {stats.n:,} positions, firing means |h| > {stats.threshold:g}")


# partitions -------------------------------------------------------------------------------------------


def partition(part: Any, affinity: Any = None, *, pixels: int = PIXELS) -> go.Figure:
    """The modules of a wire: their sizes, the score against its null; and the affinity matrix sorted by module, if given.

    Args:
        part: `Partition`.
        affinity: (neurons, neurons) matrix to show, such as `NeuronStats.cofiring` or what the partition was made of;
            with a hierarchy, a slider cuts its dendrogram.
        pixels: cells a side, at most.
    """
    sizes = np.bincount(array(part.labels), minlength=part.k)
    if affinity is None:
        figure = make_subplots(rows=1, cols=2, subplot_titles=["modules", "score against its null"], column_widths=[0.5, 0.5])
        figure.add_trace(go.Bar(x=np.arange(part.k), y=sizes, marker_color=[colour(m) for m in range(part.k)],
                                hovertemplate="module %{x}: %{y} neurons<extra></extra>"), 1, 1)
        figure.update_xaxes(title_text="module", row=1, col=1)
        figure.update_yaxes(title_text="neurons", row=1, col=1)
        _null(figure, part, 1, 2)
        figure.update_layout(showlegend=False)
        return styled(figure, _verdict(part))
    tree = part.dendrogram is not None and part.k > 1
    figure = make_subplots(rows=1, cols=3 if tree else 2, column_widths=[0.12, 0.58, 0.3] if tree else [0.66, 0.34], horizontal_spacing=0.1,
                           shared_yaxes=False, subplot_titles=[*(["dendrogram"] if tree else []), "sorted by module", "score against its null"])
    matrix = array(affinity.todense() if hasattr(affinity, "todense") else affinity)
    at = 2 if tree else 1
    labels = array(part.labels)
    leaves = _leaves(figure, part.dendrogram, sizes) if tree else list(range(part.k))
    order = np.argsort(np.argsort(leaves)[labels], kind="stable")
    figure.add_trace(_sorted(matrix, order, pixels), 1, at)
    _null(figure, part, 1, at + 1)
    figure.update_yaxes(range=[len(labels), 0], showgrid=False, title_text="neurons, by module", row=1, col=at)
    figure.update_xaxes(range=[0, len(labels)], showgrid=False, row=1, col=at)
    axis = f"{at if at > 1 else ''}"
    if tree:
        figure.update_yaxes(range=[len(labels), 0], showticklabels=False, showgrid=False, row=1, col=1)
        cuts = [k for k in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64) if k < part.k] + [part.k]
        edges = [_edges(array(part.cut(k))[order], axis) for k in cuts]
        shown = cuts.index(max((k for k in part.levels if k in cuts), default=part.k))
        figure.update_layout(shapes=[*_lines(figure), *edges[shown]], sliders=[{
            "active": shown, "currentvalue": {"prefix": "groups: "}, "pad": {"t": 36}, "x": 0.1, "len": 0.55,
            "steps": [{"label": str(k), "method": "relayout", "args": [{"shapes": [*_lines(figure), *made]}]}
                      for k, made in zip(cuts, edges, strict=True)],
        }])
    else:
        figure.update_layout(shapes=[*_lines(figure), *_edges(labels[order], axis)])
    figure.update_layout(showlegend=False, meta={"modules": [int(m) for m in leaves], "ends": np.cumsum(sizes[leaves]).tolist(), "axis": axis})
    return styled(figure, _verdict(part), height=620 if tree else 540)


def module_at(figure: Any, x: float) -> int:
    """The module of a place in a figure of `partition`, -1 for none: of a bar, or of a row of the sorted matrix."""
    meta = figure.layout.meta
    if not meta:
        return round(x)
    at = int(np.searchsorted(meta["ends"], x, side="right"))
    return meta["modules"][at] if x >= 0 and at < len(meta["modules"]) else -1


def outline(figure: Any, module: int) -> list[dict[str, Any]]:
    """The shapes of a figure of `partition` with one module outlined; -1 for none."""
    shapes = [shape.to_plotly_json() for shape in figure.layout.shapes if shape.name != "module"]
    meta = figure.layout.meta
    if not meta or module not in meta["modules"]:
        return shapes
    at = meta["modules"].index(module)
    start, end = ([0, *meta["ends"]][at], meta["ends"][at])
    return [*shapes, {"type": "rect", "name": "module", "x0": start, "x1": end, "y0": start, "y1": end, "xref": f"x{meta['axis']}",
                      "yref": f"y{meta['axis']}", "line": {"color": colour(1), "width": 4}}]


def _lines(figure: go.Figure) -> list[Any]:
    """The lines that a figure has already, which a slider must not take away."""
    return [shape.to_plotly_json() for shape in figure.layout.shapes if shape.type == "line"]  # type: ignore[attr-defined]


def _leaves(figure: go.Figure, tree: Any, sizes: np.ndarray[Any, Any]) -> list[int]:
    """Draw a dendrogram beside the neurons of its modules; the modules in the order of its leaves."""
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(array(tree), no_plot=True)
    leaves = list(drawn["leaves"])
    ends = np.cumsum(sizes[leaves])
    middles = ends - sizes[leaves] / 2
    for places, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        y = np.interp((np.array(places) - 5) / 10, np.arange(len(leaves)), middles)
        figure.add_trace(go.Scatter(x=-np.array(heights), y=y, mode="lines", line={"color": INK, "width": 1}, hoverinfo="skip"), 1, 1)
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, row=1, col=1)
    return leaves


def _sorted(matrix: np.ndarray[Any, Any], order: np.ndarray[Any, Any], pixels: int) -> go.Heatmap:
    """A matrix with its rows and columns in an order."""
    shown, _ = aggregated(matrix[np.ix_(order, order)] if len(order) <= 4096 else _gathered(matrix, order, pixels), pixels)
    step = len(order) / len(shown)
    at = (np.arange(len(shown)) + 0.5) * step
    top = float(np.quantile(shown[~np.eye(len(shown), dtype=bool)], 0.995)) if len(shown) > 1 else 1.0
    return go.Heatmap(z=shown, x=at, y=at, colorscale=HEAT, zmin=min(0.0, float(shown.min())), zmax=max(top, 1e-12),
                      showscale=False, hovertemplate="%{z:.3g}<extra></extra>")


def _gathered(matrix: np.ndarray[Any, Any], order: np.ndarray[Any, Any], pixels: int) -> np.ndarray[Any, Any]:
    """A large matrix sorted and averaged strip by strip, so that it is never copied whole."""
    starts = np.arange(0, len(order), -(-len(order) // pixels))
    ends = np.append(starts[1:], len(order))
    strips = [np.add.reduceat(matrix[order[a:b]].sum(0, dtype=np.float64)[order], starts) / ((b - a) * (ends - starts))
              for a, b in zip(starts, ends, strict=True)]
    return np.stack(strips)


def _edges(labels: np.ndarray[Any, Any], axis: str) -> list[dict[str, Any]]:
    """A square around each run of equal labels."""
    ends = [*(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    starts = [0, *ends[:-1]]
    return [{"type": "rect", "x0": a, "x1": b, "y0": a, "y1": b, "line": {"color": "#ffffff", "width": 1.5}, "xref": f"x{axis}", "yref": f"y{axis}"}
            for a, b in zip(starts, ends, strict=True)] if len(ends) <= 128 else []


def _null(figure: go.Figure, part: Any, row: int, col: int) -> None:
    """The score of a partition, and those of its controls."""
    null = array(part.null)
    figure.add_trace(go.Histogram(x=null, marker_color=QUIET, nbinsx=24, hovertemplate="%{x}: %{y} controls<extra></extra>"), row, col)
    score = float(part.tested)
    text = f"p = {part.pvalue:.2g}" if len(null) else "no controls"
    figure.add_vline(x=score, line={"color": colour(1), "width": 3}, row=row, col=col,  # type: ignore[arg-type]
                     annotation={"text": text, "font": {"color": colour(1)}, "xanchor": "right", "yanchor": "top"})
    figure.update_xaxes(title_text=part.score_name, row=row, col=col)
    figure.update_yaxes(title_text="controls", row=row, col=col)


def _verdict(part: Any) -> str:
    wire = f"{part.wire}: " if part.wire else ""
    said = f", {'significant' if part.significant else 'not significant'} (p = {part.pvalue:.2g})" if part.pvalue == part.pvalue else ""
    return f"{wire}{part.k} modules by {part.method}, {part.score_name} = {part.score:.3g}{said}"


def expert_curve(curve: Any) -> go.Figure:
    """Loss against the share of experts; the random partition, which is no better than chance, is dashed."""
    figure = go.Figure()
    ways = list(dict.fromkeys(row[1] for row in curve.rows))
    for part, way in dict.fromkeys(row[:2] for row in curve.rows):
        points = sorted((share, value) for p, w, share, value in curve.rows if (p, w) == (part, way))
        if points and points[-1][0] < 1:
            points.append((1.0, curve.dense))
        given = part == "given"
        figure.add_trace(go.Scatter(
            x=[share for share, _ in points], y=[value for _, value in points], mode="lines+markers", name=f"{way}{'' if given else ', random partition'}",
            line={"color": colour(ways.index(way)), "dash": "solid" if given else "dash"}, opacity=1 if given else 0.7,
            hovertemplate=f"{way}, {part} partition<br>%{{x:.0%}} of experts: %{{y:.4g}}<extra></extra>",
        ))
    figure.add_hline(y=curve.dense, line={"color": QUIET, "dash": "dot"}, annotation={"text": "dense", "font": {"color": QUIET}})
    figure.update_xaxes(title_text="share of experts", tickformat=".0%", range=[0, 1.03])
    figure.update_yaxes(title_text="loss")
    return styled(figure, f"loss against experts, {len(curve.wires)} {'wire' if len(curve.wires) == 1 else 'wires'} cut at once", height=420)


def timeline(found: Any) -> go.Figure:
    """Token x module: the share of each module in what the block writes, along an example."""
    wires = list(found.shares)
    figure = make_subplots(rows=len(wires), cols=1, shared_xaxes=True, subplot_titles=wires, vertical_spacing=0.12 / len(wires))
    positions = np.arange(len(found.tokens))
    for row, wire in enumerate(wires, 1):
        figure.add_trace(go.Heatmap(z=array(found.shares[wire]), x=positions, colorscale=HEAT, zmin=0, coloraxis="coloraxis",
                                    customdata=np.broadcast_to(np.array(found.tokens, dtype=object), found.shares[wire].shape),
                                    hovertemplate="%{customdata}<br>module %{y}: %{z:.1%}<extra></extra>"), row, 1)
        figure.update_yaxes(title_text="module", dtick=1, autorange="reversed", row=row, col=1)
    figure.update_xaxes(tickmode="array", tickvals=positions, ticktext=list(found.tokens), tickangle=-60, row=len(wires), col=1)
    figure.update_layout(coloraxis={"colorscale": HEAT, "colorbar": {"tickformat": ".0%", "thickness": 10}, "cmin": 0})
    return styled(figure, "modules along the tokens", height=150 + 150 * len(wires))


# between partitions -----------------------------------------------------------------------------------


def flows(tables: Sequence[Any], names: Sequence[str], *, numbers: Sequence[Any] | None = None, title: str = "") -> go.Figure:
    """Modules side by side, and how many neurons (or how much of anything) flows from each to each: Sankey or alluvial.

    Args:
        tables: flows from the modules of one column to those of the next, (modules, modules) each; one less than names.
        names: of the columns: layers, or checkpoints.
        numbers: of the modules of each column; those of one number, such as a module's track, have one colour. By default
            each module's own.
        title: of the figure.
    """
    sizes = [array(tables[0]).shape[0], *(array(table).shape[1] for table in tables)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    tracks = [array(column).tolist() for column in numbers] if numbers is not None else [list(range(size)) for size in sizes]
    source: list[int] = []
    target: list[int] = []
    value: list[float] = []
    tint: list[str] = []
    for at, table in enumerate(map(array, tables)):
        for a, b in np.argwhere(table > 0).tolist():
            source.append(int(starts[at] + a))
            target.append(int(starts[at + 1] + b))
            value.append(float(table[a, b]))
            tint.append(faded(colour(tracks[at][a])))
    total = len(sizes)
    figure = go.Figure(go.Sankey(
        arrangement="snap",
        node={"label": [f"{m}" for size in sizes for m in range(size)], "color": [colour(number) for column in tracks for number in column],
              "customdata": [f"{name}, module {m}" for name, size in zip(names, sizes, strict=True) for m in range(size)],
              "hovertemplate": "%{customdata}: %{value:.4g}<extra></extra>", "thickness": 14, "pad": 8,
              "x": [0.001 + 0.998 * at / max(total - 1, 1) for at, size in enumerate(sizes) for _ in range(size)],
              "y": [(m + 0.5) / size for size in sizes for m in range(size)]},
        link={"source": source, "target": target, "value": value, "color": tint, "hovertemplate": "%{value:.4g}<extra></extra>"},
    ))
    for at, name in enumerate(names):
        figure.add_annotation(x=at / max(total - 1, 1), y=1.08, text=name, showarrow=False, xref="paper", yref="paper")
    return styled(figure, title, height=460)


# higher orders, and places in the graph ---------------------------------------------------------------


def triples(found: Any, *, most: int = 4000) -> go.Figure:
    """How often triples of neurons fire together, against what their pairs predict.

    Args:
        found: `Triples`.
        most: points drawn, the most surprising first.
    """
    figure = go.Figure()
    count, expected, q, neurons = (array(values)[:most] for values in (found.count, found.expected, found.qvalue, found.neurons))
    rest = ~(q < 0.05)
    for name, which, tint, size in (("as pairs predict", rest, QUIET, 4), ("significant", ~rest, colour(1), 7)):
        figure.add_trace(go.Scattergl(
            x=expected[which], y=count[which], customdata=np.column_stack([neurons[which], q[which]]), mode="markers", name=name,
            marker={"color": tint, "size": size, "opacity": 0.7},
            hovertemplate="neurons %{customdata[0]}, %{customdata[1]}, %{customdata[2]}<br>together at %{y}, by pairs %{x:.4g}"
                          "<br>q = %{customdata[3]:.2g}<extra></extra>",
        ))
    top = float(max(count.max(initial=1), expected.max(initial=1)))
    figure.add_trace(go.Scatter(x=[0, top], y=[0, top], mode="lines", line={"color": INK, "dash": "dot", "width": 1}, hoverinfo="skip", showlegend=False))
    figure.update_xaxes(title_text="positions, predicted by pairs")
    figure.update_yaxes(title_text="positions where all three fire")
    shown = f", {len(count):,} drawn" if len(count) < len(found.count) else ""
    return styled(figure, f"{len(found.count):,} triples of {len(found.candidates)} neurons{shown}", height=460)


def places(frame: Any) -> go.Figure:
    """Hubs and bridges of a neuron graph: strength against betweenness, and modules by colour where they are known.

    Args:
        frame: what `circuitlab.analysis.graph.places` gives.
    """
    figure = go.Figure()
    modules = frame["module"].to_numpy() if "module" in frame else np.zeros(len(frame), dtype=int)
    known = "module" in frame
    symbols = np.full(len(frame), "circle", dtype=object)
    for mark, symbol in (("hub", "diamond"), ("bridge", "star")):
        if mark in frame:
            symbols[frame[mark].to_numpy()] = symbol
    text = [", ".join(mark for mark in ("hub", "bridge") if mark in frame and frame[mark].iloc[n]) for n in range(len(frame))]
    for module in np.unique(modules):
        which = np.flatnonzero(modules == module)
        figure.add_trace(go.Scattergl(
            x=frame["strength"].to_numpy()[which], y=frame["betweenness"].to_numpy()[which], mode="markers",
            customdata=np.column_stack([which, frame["clustering"].to_numpy()[which], np.array(text, dtype=object)[which]]),
            name=f"module {module}" if known else "neurons", showlegend=known,
            marker={"color": colour(int(module)), "size": np.where(symbols[which] == "circle", 6, 11), "symbol": symbols[which], "opacity": 0.8},
            hovertemplate="neuron %{customdata[0]} %{customdata[2]}<br>strength %{x:.4g}, betweenness %{y:.3g}, clustering %{customdata[1]:.3g}<extra></extra>",
        ))
    figure.update_xaxes(title_text="strength: sum of a neuron's affinities")
    figure.update_yaxes(title_text="betweenness")
    return styled(figure, "hubs (diamonds) and bridges (stars) of the neuron graph", height=460)
