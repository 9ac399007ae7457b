"""A scale right after a product rides on the product's arrow, written as people write it."""

from __future__ import annotations

from circuitlab.circuit import Circuit
from circuitlab.diagram.drawing import Drawing, Node


def absorb_scales(drawing: Drawing, circuit: Circuit) -> None:
    """A scale right after a product rides on the product's arrow."""
    for node in list(drawing.nodes):
        if node.kind != "elementwise" or not node.op or len(node.ins) != 1 or len(node.outs) != 1:
            continue
        op, before = circuit.op(node.op), node.ins[0].source
        scalar = op.attrs.get("scalar")
        if before.kind != "contract" or op.fn not in ("mul", "div") or not isinstance(scalar, (int, float)):
            continue
        if before.label or len(before.outs) != 1:
            continue
        before.label = _scale(op.fn, float(scalar), before, circuit, drawing.signs)
        band, after = node.ins[0], node.outs[0]
        moved = {track: out for a, track, _, out in node.passes if a is band}
        if len(moved) != len(band.tracks):
            continue
        before.passes = [(a, i, after, moved[o]) for a, i, _, o in before.passes]
        before.outs = [after]
        after.source = before
        drawing.bands.remove(band)
        drawing.nodes.remove(node)


def _scale(fn: str, scalar: float, product: Node, circuit: Circuit, signs: dict[str, str]) -> str:
    """The scale as people write it: 1/√k where it is that."""
    factor = scalar if fn == "mul" else 1 / scalar if scalar else 0.0
    for (band, number), _ in product.pairs:
        wire = circuit.wires[band.tracks[number].wires[0]]
        if abs(factor * wire.size**0.5 - 1) < 1e-6:
            return f"· 1/√{signs[wire.name]}"
    return f"· {factor:.3g}"
