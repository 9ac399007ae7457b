"""A walk between two models: the path and its layers beside the diagram, which shows where activations collapse.

Move along the path with the slider, or by a click in the figure: the diagram is tinted by how much each map's output still varies.
Click bars to let those layers alone move, and the path is evaluated again. Make it with ``path.view()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import traitlets

from circuitlab import plots
from circuitlab.analysis import batches as walked
from circuitlab.analysis.collapse import Collapse, collapse
from circuitlab.analysis.landscape import LayerPaths, Path, layerwise
from circuitlab.circuit import Circuit
from circuitlab.trace.record import trace
from circuitlab.widgets.diagram import DiagramWidget
from circuitlab.widgets.figure import refill


class Walk(ipywidgets.VBox):
    """A diagram, a path between two models, and the layers that move on it, linked.

    Attributes:
        diagram: the `DiagramWidget`.
        path: the `Path` on which all layers move that did when it was made.
        collapse: `Collapse` along it.
        bars: `LayerPaths`, or None.
        alpha: where on the path the diagram is shown. Observe it, or assign it.
        layers: paths of the modules that move, () for those of `path`. Observe it, or assign it: the path is evaluated anew.
        part: the `Path` of `layers`, None for ().
    """

    alpha = traitlets.Float(0.5, min=0.0, max=1.0)
    layers = traitlets.Tuple()

    def __init__(
        self, circuit: Circuit, path: Path, collapsed: Collapse, bars: LayerPaths | None = None,
        again: Callable[[tuple[str, ...]], Path] | None = None, **options: Any,
    ) -> None:
        self.path, self.collapse, self.bars, self.part, self._again = path, collapsed, bars, None, again
        self.diagram = DiagramWidget(circuit, span=(0.0, 1.0), **options)
        step = float(np.diff(collapsed.alphas).min())
        self.slider = ipywidgets.FloatSlider(0.5, min=0, max=1, step=step, description="α", readout_format=".2f", layout={"width": "420px"})
        self.text = ipywidgets.HTML()
        self.line: Any = go.FigureWidget()
        self.layered: Any = go.FigureWidget()
        shown = [self.line] if bars is None else [self.line, self.layered]
        super().__init__([ipywidgets.HBox([self.slider, self.text]), self.diagram, *shown])
        ipywidgets.link((self, "alpha"), (self.slider, "value"))
        self.observe(self._moved, "alpha")
        self.observe(self._changed, "layers")
        self.diagram.observe(self._moved, ["opened", "closed", "depth"])
        self._draw()
        if bars is not None:
            refill(self.layered, plots.layer_paths(bars), self._toggled)
        self._moved()

    def _draw(self) -> None:
        """The path, or both."""
        told = {"": self.path} if self.part is None else {"all": self.path, ", ".join(self.layers): self.part}
        drawn = plots.path(told if self.part is not None else self.path).update_layout(showlegend=True)
        refill(self.line, drawn, self._clicked)
        self._mark()

    def _mark(self) -> None:
        """Where on the path the diagram is."""
        shapes = [shape.to_plotly_json() for shape in self.line.layout.shapes if shape.name != "alpha"]
        self.line.layout.shapes = [*shapes, {"type": "line", "name": "alpha", "xref": "x", "yref": "paper", "x0": self.alpha, "x1": self.alpha,
                                             "y0": 0, "y1": 1, "line": {"color": plots.colour(1), "width": 2}}]

    def _moved(self, _: Any = None) -> None:
        self._mark()
        overlay = self.collapse.overlay(self.alpha)
        least = min(overlay, key=lambda op: overlay[op], default="")
        for name, state in self.diagram.scene["foldable"].items():
            inside = [overlay[op] for op in self.diagram.circuit.block(name).op_names() if op in overlay] if state == "closed" else []
            if inside:
                overlay[name] = min(inside)
        self.diagram.overlay = overlay
        loss = float(np.interp(self.alpha, self.path.alphas, self.path.loss))
        self.text.value = f"loss {loss:.4g}" + (f"; least variance at {least}: {overlay[least]:.2f} of the line between the ends" if least else "")

    def _clicked(self, _: Any, points: Any, __: Any) -> None:
        if points.xs:
            self.alpha = min(max(float(points.xs[0]), 0.0), 1.0)

    def _toggled(self, _: Any, points: Any, __: Any) -> None:
        for name in points.ys[:1]:
            self.layers = tuple(layer for layer in self.layers if layer != name) if name in self.layers else (*self.layers, name)

    def _changed(self, _: Any) -> None:
        self.part = self._again(self.layers) if self.layers and self._again is not None else None
        for trace_ in self.layered.data:
            trace_.marker.line = {"color": plots.colour(1), "width": [3 * (name in self.layers) for name in trace_.y]}
        self._draw()


def walk(path: Path, *, points: int = 11, layers: bool = True, depth: int = 1, progress: bool = True) -> Walk:
    """The path as a view. See `Path.view`."""
    ends = path.ends
    model = ends.models[0]
    args, kwargs = walked.inputs_of(model, walked.to_device(walked.first(ends.batches), walked.device_of(model)))
    circuit = trace(model, *args, **kwargs)
    collapsed = collapse(path.at, ends.batches, points, progress=progress)
    bars = layerwise(*ends.models, ends.batches, ends.loss, points=(0, 0.5, 1), progress=progress) if layers else None

    def again(chosen: tuple[str, ...]) -> Path:
        return ends.interpolate(layers=chosen, progress=progress)

    return Walk(circuit, path, collapsed, bars, again, depth=depth)
