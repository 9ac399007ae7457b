"""Calls under ``vmap``: the rule of the function for the axes that it sees, and each mapped axis passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from circuitlab.trace.events import Event, Value
from circuitlab.trace.rules.pattern import Letter, Pattern, united
from circuitlab.trace.wires import Wires


def apply(w: Wires, event: Event, rule: Callable[[Wires, Event], Pattern]) -> Pattern:
    """The pattern of a call on arrays with all their axes.

    Args:
        w: the wires.
        event: under ``vmap``.
        rule: gives the pattern of the call on arrays that hide the mapped axes.
    """
    letters: dict[int, Letter] = {}
    apart: dict[tuple[int, int], Letter] = {}
    for operand in event.operands:
        for level, dim in zip(operand.levels, operand.value.dims, strict=False):
            if level not in letters and dim:
                letters[level] = Letter("broadcast", dim)
            elif dim and not united(w, letters[level], dim, apart=True):
                apart[operand.slot, level] = Letter("ordered", dim)
    w.commit()
    outs = [_seen(out, len(levels)) for out, levels in zip(event.outs, event.levels, strict=True)]
    pattern = rule(w, replace(event, outs=outs, levels=(), probed=_probed_within(event)))
    gone = letters.keys() - {level for levels in event.levels for level in levels}
    for level in gone:  # the results are the same for all
        letters[level].role = "reduced"
    for operand in event.operands:
        slots = pattern.ins.get(operand.slot)
        hidden = zip(operand.levels, operand.value.dims, strict=False)
        own = [[apart.get((operand.slot, level), letters[level])] if dim else [] for level, dim in hidden]
        pattern.ins[operand.slot] = [*own, *([[] for _ in operand.shape] if slots is None else slots)]
    for number, (out, levels) in enumerate(zip(event.outs, event.levels, strict=True)):
        own = [
            [letters[level]] if level in letters else pattern.new(w, size, "created", "mapped", event.name)
            for level, size in zip(levels, out.shape, strict=False)
        ]
        pattern.outs[number] = [*own, *pattern.outs[number]]
    return pattern


def _seen(value: Value, hidden: int) -> Value:
    """A result as the function made it, with some axes hidden."""
    seen = Value(value.name, value.shape[hidden:], value.dtype, value.kind)
    seen.static, seen.learned, seen.event, seen.read = value.static, value.learned, value.event, value.read
    return seen


def _probed_within(event: Event) -> tuple[object, ...]:
    """What probing found of axes that the function sees."""
    ins, outs = {o.slot: len(o.levels) for o in event.operands}, [len(levels) for levels in event.levels]
    found = [
        replace(
            axis,
            ins=tuple((slot, dim - ins[slot]) for slot, dim in axis.ins),
            outs=tuple((number, dim - outs[number]) for number, dim in axis.outs),
        )
        for axis in event.probed
    ]
    return tuple(axis for axis in found if all(dim >= 0 for _, dim in (*axis.ins, *axis.outs)))
