"""The lab: a live diagram beside what is known of the wire or module that is selected in it.

Select a wire or an op, or unfold a feed-forward block, in the diagram, and its modules are shown; select a module, by name
or by a click in the figure, and the places of its neurons are highlighted in the diagram, and the positions at which it is
most active are listed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import traitlets

from circuitlab import plots
from circuitlab.analysis.activity import TopPositions
from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.surface import Surface
from circuitlab.circuit import Circuit
from circuitlab.widgets.diagram import DiagramWidget
from circuitlab.widgets.figure import refill

_LISTED = 12
"""Neurons and positions that are written out."""


class Lab(ipywidgets.VBox):
    """A diagram and the modules of its hidden wires, linked. Make it with ``cl.explore(model, inputs, batches=...)``.

    Attributes:
        diagram: the `DiagramWidget`.
        partitions: wire name -> `Partition`; assign others to show those.
        stats: wire name -> `NeuronStats`.
        top: `TopPositions` of the partitions, or None.
        landscape: the figure of the loss around the model, or None.
        wire: name of the wire whose modules are shown, "" for none. Observe it, or assign it.
        module: number of the module that is looked at, -1 for none. Observe it, or assign it.
    """

    wire = traitlets.Unicode("")
    module = traitlets.Int(-1)
    partitions = traitlets.Dict()
    stats = traitlets.Dict()
    top = traitlets.Any(None)

    def __init__(
        self, circuit: Circuit, partitions: Mapping[str, Any] | None = None, stats: Mapping[str, Any] | None = None,
        top: TopPositions | None = None, *, surface: Surface | None = None, notes: str = "", **options: Any,
    ) -> None:
        self.diagram = DiagramWidget(circuit, **options)
        self.figure = go.FigureWidget()
        self.choice = ipywidgets.Dropdown(description="wire", layout={"width": "max-content"})
        self.number = ipywidgets.Dropdown(description="module", layout={"width": "max-content"})
        self.text = ipywidgets.HTML()
        self.panel = ipywidgets.VBox([ipywidgets.HBox([self.choice, self.number]), self.figure, self.text])
        self.landscape = None if surface is None else go.FigureWidget(surface.plot())
        shown = [self.diagram, self.panel if partitions else None, self.landscape]
        super().__init__(
            [child for child in shown if child is not None], partitions=dict(partitions or {}), stats=dict(stats or {}), top=top,
        )
        self._notes = notes
        self.choice.options = list(self.partitions)
        self.choice.observe(self._chosen, "value")
        self.number.observe(self._numbered, "value")
        self.diagram.observe(self._selected, "selection")
        self.diagram.observe(self._unfolded, "opened")
        self.observe(self._show, ["wire", "partitions"])
        self.observe(self._highlight, "module")
        if self.partitions:
            self.wire = next(iter(self.partitions))

    # what was selected ---------------------------------------------------------------------------------

    def _chosen(self, change: Any) -> None:
        self.wire = change["new"] or ""

    def _numbered(self, change: Any) -> None:
        self.module = -1 if change["new"] is None else change["new"]

    def _selected(self, change: Any) -> None:
        found = self._wire_of(change["new"])
        if found:
            self.wire = found

    def _clicked(self, trace: Any, points: Any, _: Any) -> None:
        """A bar is a module; a row of the sorted matrix lies in one."""
        if points.xs:
            found = plots.module_at(self.figure, points.xs[0] if trace.type == "bar" else points.ys[0])
            self.module = -1 if found == self.module else found

    def _unfolded(self, change: Any) -> None:
        fresh = [block for block in change["new"] if block not in change["old"]]
        found = self._wire_of(fresh[-1]) if fresh else ""
        if found:
            self.wire = found

    def _wire_of(self, name: str) -> str:
        """The wire that a selected wire, op or block is about: of the smallest feed-forward block that holds it."""
        if name in self.partitions:
            return name
        blocks = {wire: part.ffn for wire, part in self.partitions.items() if isinstance(part.ffn, FeedForward)}
        for wire, block in blocks.items():
            if name in {weight.op for weight in (*block.keys, *block.gates, *block.values)}:
                return wire
        inside = [wire for wire, block in blocks.items() if name and (block.path == name or block.path.startswith(f"{name}."))]
        around = [wire for wire, block in blocks.items() if block.path and (name == block.path or name.startswith(f"{block.path}."))]
        return (around or inside or [""])[0] if len(inside) <= 1 or around else ""

    @traitlets.validate("wire")
    def _known_wire(self, proposal: Any) -> str:
        if proposal["value"] and proposal["value"] not in self.partitions:
            raise traitlets.TraitError(f"there is no partition of a wire {proposal['value']!r}; there are {', '.join(self.partitions)}")
        return proposal["value"]

    @traitlets.validate("module")
    def _known_module(self, proposal: Any) -> int:
        count = self.partitions[self.wire].k if self.wire else 0
        if not -1 <= proposal["value"] < count:
            raise traitlets.TraitError(f"module {proposal['value']} is not one of the {count} of {self.wire or 'no wire'}")
        return proposal["value"]

    # what is shown -------------------------------------------------------------------------------------

    def _show(self, _: Any = None) -> None:
        """The modules of the wire."""
        self.module = -1
        part = self.partitions.get(self.wire)
        if part is None:
            return
        if list(self.choice.options) != list(self.partitions):
            self.choice.options = list(self.partitions)
        self.choice.value = self.wire
        self.number.options = [("none", -1), *((f"{m} ({size} neurons)", m) for m, size in enumerate(part.sizes))]
        stats = self.stats.get(self.wire)
        drawn = plots.partition(part, stats.cofiring if stats is not None else None)
        refill(self.figure, drawn, self._clicked, ("bar", "heatmap"))
        self._highlight()

    def _highlight(self, _: Any = None) -> None:
        """The places of the wire's neurons in the diagram, and of a module's in words."""
        part = self.partitions.get(self.wire)
        if part is None:
            return
        block = part.ffn
        weights = (*block.gates, *block.keys, *block.values) if isinstance(block, FeedForward) else ()
        if self.number.value != self.module:
            self.number.value = self.module
        self.figure.layout.shapes = plots.outline(self.figure, self.module)
        self.diagram.overlay = {self.wire: 1.0, **{weight.op: 1.0 for weight in weights}} if self.module >= 0 else {}
        if self.module < 0:
            self.text.value = _said(part.__repr__()) + self._notes
            return
        members = [int(n) for n in part.modules[self.module]]
        places = [f"dimension {w.dim} of {w.parameter}" + (f", from {w.rows[0]} in steps of {w.rows[2]}" if w.rows[0] or w.rows[2] > 1 else "")
                  for w in weights]
        lines = [f"<b>module {self.module}</b>: {len(members)} neurons, {_some(members)}", *(f"in {html.escape(place)}" for place in places)]
        stats = self.stats.get(self.wire)
        if stats is not None and stats.label_firing is not None:
            rate = stats.label_firing[:, members].double().mean(1) / stats.label_n.clamp(min=1)
            lines.append("fires on " + ", ".join(f"{html.escape(name)}: {share:.1%}" for name, share in zip(stats.label_names, rate.tolist(), strict=True)))
        self.text.value = _said(*lines) + self._positions()

    def _positions(self) -> str:
        """A table of where the module is most active."""
        if self.top is None:
            return ""
        rows = self.top.of(self.wire, self.module)[:_LISTED]
        cells = "".join(f"<tr><td>{share:.0%}</td><td>{example}</td><td>{position}</td><td>{_marked(text)}</td></tr>"
                        for example, position, share, text in rows)
        return ("<table><thead><tr><th>share</th><th>example</th><th>position</th><th>text</th></tr></thead>"
                f"<tbody>{cells}</tbody></table>")


def _said(*lines: str) -> str:
    return "<p style='line-height:1.4'>" + "<br>".join(lines) + "</p>"


def _some(members: list[int]) -> str:
    shown = ", ".join(map(str, members[:_LISTED]))
    return f"{shown} and {len(members) - _LISTED} more" if len(members) > _LISTED else shown


def _marked(text: str) -> str:
    """Text as HTML; what stands between « and » is marked."""
    return html.escape(text).replace("«", "<mark>").replace("»", "</mark>")


def explore(
    model: Any, *inputs: Any, batches: Any = None, loss: Any = None, labels: Any = None, method: str = "coactivation", text: Any = None,
    seed: int = 0, depth: int = 1, progress: bool = True, **kwargs: Any,
) -> Lab:
    """The whole lab in one view: the live diagram and, with batches, the modules of its feed-forward blocks and the loss around it.

    Args:
        model: is not changed.
        *inputs, **kwargs: as its ``forward`` takes them.
        batches: what can be walked again, to observe neurons on; without it the diagram alone is shown.
        loss: as `circuitlab.interpolate` takes it; with it, the loss around the model is shown, over two random directions
            (Li et al., 2018): 121 runs over the batches.
        labels: of examples or positions, as `observe` takes them.
        method: of `partition`.
        text: gives what to show of a position: a function of (batch, example, position); «marked» text stands out.
        seed: of the partition.
        depth: levels of blocks to unfold.
        progress: show progress bars.
    """
    from circuitlab.analysis.activity import top_positions
    from circuitlab.analysis.modularity import partition
    from circuitlab.analysis.neurons import observe
    from circuitlab.analysis.surface import surface
    from circuitlab.trace.record import trace

    circuit = trace(model, *inputs, **kwargs)
    around = None if batches is None or loss is None else surface(model, batches, loss, (11, 11), seed=seed, progress=progress)
    if batches is None or not circuit.ffn:
        return Lab(circuit, surface=around, depth=depth)
    stats = observe(model, batches, circuit.ffn.values(), labels, progress=progress)
    parts = {wire: partition(found, method=method, seed=seed) for wire, found in stats.items()}
    return Lab(circuit, parts, stats, top_positions(model, parts, batches, text=text, progress=progress), surface=around, depth=depth)
