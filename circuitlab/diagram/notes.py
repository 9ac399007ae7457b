"""What a drawing says beside its marks: the picture in words, lines to show on hover, and tints of an overlay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from circuitlab.circuit import Circuit
from circuitlab.diagram.drawing import Drawing
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


def tinted(marks: list[Mark], overlay: Mapping[str, float], circuit: Circuit) -> list[Mark]:
    """The marks, tinted from the smallest to the largest number; wires by width."""
    known = set(circuit.wires) | {op.name for op in circuit.ops} | {b.name for b in circuit.root.blocks()}
    unknown = [name for name in overlay if name not in known]
    if unknown:
        raise InputError(f"overlay has {unknown[0]!r}, which is no wire, op or block of this circuit")
    values: dict[str, float] = {name: float(value) for name, value in overlay.items()}
    low, high = min(values.values()), max(values.values())
    made: list[Mark] = []
    for mark in marks:
        name = next((n for n in (mark.wire, mark.op, mark.block) if n in values), None)
        if name is not None and mark.role in ("wire", "glyph", "block", "plate"):
            share = (values[name] - low) / (high - low) if high > low else 1.0
            change: dict[str, Any] = {"opacity": round(0.25 + 0.75 * share, 3)}
            change |= {"stroke": "accent", "width": 1.3 + 2.2 * share} if mark.role == "wire" else {"fill": "accent"}
            if mark.role == "wire":
                change.pop("opacity")
            mark = replace(mark, **change)
        made.append(mark)
    return made
