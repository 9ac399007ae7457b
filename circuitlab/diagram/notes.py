"""What a drawing says beside its marks: the picture in words, lines to show on hover, and tints of an overlay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from circuitlab.circuit import Circuit
from circuitlab.diagram.drawing import Drawing
from circuitlab.diagram.metrics import width
from circuitlab.diagram.scene import Mark
from circuitlab.errors import InputError


def describe(circuit: Circuit, drawing: Drawing) -> str:
    """The drawing in words."""
    steps: list[str] = []
    for node in drawing.nodes:
        if node.kind in ("input", "output", "copy", "route", "save", "load"):
            continue
        name = node.label or node.kind
        times = f" repeated {node.count} times" if node.count > 1 else ""
        steps.append(" ".join(dict.fromkeys([node.kind, f"{name}{node.upper}{times}"])))
    repeated = [f"{name} repeats {count} times" for name, (_, count) in drawing.plates.items() if count > 1]
    text = f"Neural circuit diagram of {circuit.title}: " + ", then ".join(steps[:40])
    return text + (". " + ", ".join(repeated) if repeated else "") + "."


def notes_of(circuit: Circuit, marks: Iterable[Mark]) -> dict[str, tuple[str, ...]]:
    """Lines to show on hover, for what is in the drawing."""
    notes: dict[str, tuple[str, ...]] = {}
    parameters = {t.name: t for t in circuit.tensors if t.kind == "parameter"}
    for mark in marks:
        if mark.wire and mark.wire not in notes:
            wire = circuit.wires[mark.wire]
            state = "permutable" if wire.permutable else f"not permutable: {wire.why}"
            notes[mark.wire] = (f"wire {wire.name}", f"size {wire.size}", wire.origin, state)
        if mark.op and mark.op not in notes:
            op = circuit.op(mark.op)
            shapes = ", ".join("×".join(map(str, circuit.tensor(n).shape)) for n in op.outputs)
            held = [f"{n} {'×'.join(map(str, parameters[n].shape))}" for n in op.inputs if n in parameters]
            notes[mark.op] = (f"{op.fn} {op.name}", f"gives {shapes}", *held, op.source)
        if mark.block and mark.block not in notes:
            block = circuit.block(mark.block)
            inside = [circuit.op(name) for name in block.op_names()]
            held = {name for op in inside for name in op.inputs if name in parameters}
            numbers = sum(math.prod(parameters[name].shape) for name in held)
            learned = f"{len(held)} parameters, {numbers:,} numbers" if held else "no parameters"
            notes[mark.block] = (f"{block.title} {block.name}", f"{len(inside)} ops", learned, block.source)
    return notes


def tinted(marks: list[Mark], overlay: Mapping[str, float], span: tuple[float, float] | None, circuit: Circuit, y: float) -> list[Mark]:
    """The marks, tinted from the smallest to the largest number shown, or over a span that is given; wires by width. And a scale, at a height, where
    numbers differ.

    A plate is tinted where nothing that stands on it is.
    """
    known = set(circuit.wires) | {op.name for op in circuit.ops} | {b.name for b in circuit.root.blocks()}
    unknown = [name for name in overlay if name not in known]
    if unknown:
        raise InputError(f"overlay has {unknown[0]!r}, which is no wire, op or block of this circuit")
    filled = [mark for mark in marks if mark.shape != "text" and mark.role in ("glyph", "block") and mark.fill not in ("", "ink")]
    of = {id(m): next((n for n in (m.op, m.block) if n in overlay), "") for m in filled}
    of |= {id(m): m.wire for m in marks if m.role == "wire" and m.wire in overlay}
    shown = set(of.values())
    for plate in (m for m in marks if m.role == "plate" and m.block in overlay):
        inside = circuit.block(plate.block)
        if not shown & {*inside.op_names(), *(block.name for block in inside.blocks() if block is not inside)}:
            of[id(plate)] = plate.block
    values = {name: float(overlay[name]) for name in of.values() if name}
    if not values:
        return marks
    low, high = span or (min(values.values()), max(values.values()))
    made: list[Mark] = []
    for mark in marks:
        name = of.get(id(mark), "")
        if name:
            share = min(max((values[name] - low) / (high - low), 0.0), 1.0) if high > low else 1.0
            if mark.role == "wire":
                mark = replace(mark, stroke="accent", width=1.3 + 2.2 * share)
            else:
                mark = replace(mark, fill="accent", opacity=_tint(share))
        made.append(mark)
    if low == high:
        return made
    x = 18.0
    least, most = (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" for value in (low, high))
    made.append(Mark("text", "legend", x=x, y=y, text=least, font="title", size=11, anchor="start", fill="quiet"))
    x += width(least, 11, "title") + 8
    for step in range(_STEPS):
        made.append(Mark("rect", "legend", x=x + 14 * step, y=y - 9, w=14, h=10, fill="accent", opacity=_tint(step / (_STEPS - 1))))
    x += 14 * _STEPS + 8
    made.append(Mark("text", "legend", x=x, y=y, text=most, font="title", size=11, anchor="start", fill="quiet"))
    return made


_STEPS = 6


def _tint(share: float) -> float:
    """Opacity of a share: the largest still lets text be read."""
    return round(0.08 + 0.52 * share, 3)
