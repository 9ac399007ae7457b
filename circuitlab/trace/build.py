"""A recording -> a circuit: rules are applied in order, dead ops dropped, and atoms become wires."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from circuitlab.circuit import Axis, Circuit, Op, Place, Tensor, Wire
from circuitlab.trace import naming, rules
from circuitlab.trace.calls import call_text, writes
from circuitlab.trace.events import Event, Recording, Value
from circuitlab.trace.nest import Building
from circuitlab.trace.permutable import permutability, places_of
from circuitlab.trace.rules.pattern import Letter, Pattern
from circuitlab.trace.wires import Atom, Wires, leaves


@dataclass(slots=True)
class Found:
    """One axis of an event while it is put together."""

    atom: Atom
    role: str
    ins: list[Place] = field(default_factory=list[Place])
    outs: list[Place] = field(default_factory=list[Place])


class Axes:
    """The axes of one event: one for each atom of each letter of its pattern."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self._of: dict[int, list[Found]] = {}

    def add(self, dims: list[list[Letter]], number: int, out: bool) -> None:
        """The letters of one operand or result."""
        for dim, letters in enumerate(dims):
            factor = 0
            for letter in letters:
                mine = self._of.get(id(letter))
                if mine is None:
                    mine = self._of[id(letter)] = [Found(atom, letter.role) for atom in leaves(letter.atoms)]
                    self.found += mine
                for axis in mine:
                    (axis.outs if out else axis.ins).append((number, dim, factor))
                    factor += 1


def build(
    recording: Recording, model: Any, names: Mapping[str, str] | None = None, *, keep_all: bool = False
) -> Circuit:
    """Make the circuit of a run.

    Args:
        recording: what was recorded.
        model: the module, for annotations on its forward.
        names: names that the user gave to axes of inputs.
        keep_all: keep ops that no output depends on.
    """
    w = Wires()
    for value in recording.values:
        if value.kind != "value":
            value.dims = [w.new(size, value.kind, value.name, dim) for dim, size in enumerate(value.shape)]
    events = recording.events if keep_all else _needed(recording)
    for value in (*recording.outputs, *(operand.value for event in events for operand in event.operands)):
        value.read = True
    given = naming.given_names(recording, model, names)
    patterns: dict[int, Pattern] = {}
    for event in recording.events:
        pattern = patterns[id(event)] = rules.apply(w, event)
        for out, slots in zip(event.outs, pattern.outs, strict=True):
            out.dims = [[atom for letter in letters for atom in letter.atoms] for letters in slots]
    values = _used(recording, events)
    made = [(event, patterns[id(event)], _axes(event, patterns[id(event)])) for event in events]
    _drop_unused_indices(made)
    atoms = _atoms(w, values, made)
    named = naming.name_wires(recording, atoms, made, given)
    dims_of = {id(v): tuple([tuple([named[id(a)].name for a in leaves(dim)]) for dim in v.dims]) for v in values}
    until = _until(recording, events)
    tensors = tuple(
        Tensor(v.name, v.shape, dims_of[id(v)], v.dtype, v.kind, v.event.name if v.event else "", until(v)) for v in values
    )
    ops = tuple(_op(event, pattern, axes, named) for event, pattern, axes in made)
    kept = {event.name for event in events}
    _prune(recording.root, kept)
    wires = _wires(atoms, named)
    places = places_of(tensors, wires)
    returns = {value.name: "" for value in recording.outputs}
    for value, path in zip(recording.outputs, recording.returns, strict=False):
        returns[value.name] = returns[value.name] or path
    inputs = tuple(value.name for value in recording.inputs)
    picked = {named[id(atom)].name for atom in atoms if atom.picked}
    odd = {value.name: value.odd for value in values if value.odd}
    why = permutability(wires, ops, tensors, inputs, returns, places, picked, odd)
    wires = {
        name: Wire(
            name, wire.label, wire.size, wire.kind, wire.group, wire.origin, not why[name], why[name], wire.parts,
            places.get(name, ()),
        )
        for name, wire in wires.items()
    }
    return Circuit(
        title=recording.root.title,
        ops=ops,
        tensors=tensors,
        wires=wires,
        root=recording.root.freeze(),
        inputs=inputs,
        outputs=tuple(returns),
        device=recording.device,
        returns=tuple(returns.values()),
    )


def _needed(recording: Recording) -> list[Event]:
    """The events that an output depends on, or may depend on through Python."""
    needed: set[int] = set()
    pending = [value.event for value in recording.outputs if value.event is not None]
    pending += [event for event in recording.events if event.rule is rules.leave]
    while pending:
        event = pending.pop()
        if id(event) not in needed:
            needed.add(id(event))
            pending.extend(o.value.event for o in event.operands if o.value.event is not None)
    return [event for event in recording.events if id(event) in needed]


def _used(recording: Recording, events: list[Event]) -> list[Value]:
    """The values of those events, inputs and outputs, in order of appearance."""
    used = {id(value) for value in (*recording.inputs, *recording.outputs)}
    for event in events:
        used.update(id(operand.value) for operand in event.operands)
        used.update(map(id, event.outs))
    seen: set[int] = set()
    return [v for v in recording.values if id(v) in used and not (id(v) in seen or seen.add(id(v)))]


def _until(recording: Recording, events: list[Event]) -> Callable[[Value], str]:
    """Value -> the last of those events that ran while it was held, "" if it was held to the end."""
    kept = {id(event) for event in events}
    names = list(itertools.accumulate((e.name if id(e) in kept else "" for e in recording.events), lambda a, b: b or a))
    return lambda value: names[value.gone - 1] if 0 < value.gone <= len(names) else ""


def _axes(event: Event, pattern: Pattern) -> Axes:
    axes = Axes()
    for operand in event.operands:
        axes.add(pattern.ins.get(operand.slot, []), operand.slot, out=False)
    for number, slots in enumerate(pattern.outs):
        axes.add(slots, number, out=True)
    return axes


def _drop_unused_indices(made: list[tuple[Event, Pattern, Axes]]) -> None:
    """``x.max(dim)`` gives indices too; where nobody reads them it is a plain, symmetric reduction."""
    for event, pattern, axes in made:
        if pattern.attrs.pop("indices", False) and not any(out.read for out in event.outs[1:]):
            for axis in axes.found:
                if axis.role == "ordered":
                    axis.role = "reduced"


def _atoms(w: Wires, values: list[Value], made: list[tuple[Event, Pattern, Axes]]) -> list[Atom]:
    """Every wire that occurs, parts of sums included, oldest first."""
    first = [atom for value in values for dim in value.dims for atom in leaves(dim)]
    first += [axis.atom for _, _, axes in made for axis in axes.found]
    w.settle(_reached(first))
    return sorted(_reached(first), key=lambda atom: atom.index)


def _reached(atoms: list[Atom]) -> list[Atom]:
    """Atoms, and all parts of theirs, each once."""
    found: dict[int, Atom] = {}
    pending = list(atoms)
    while pending:
        atom = pending.pop()
        if id(atom) not in found:
            found[id(atom)] = atom
            pending.extend(leaf for _, _, inner in atom.parts for leaf in leaves(inner))
    return list(found.values())


def _op(event: Event, pattern: Pattern, axes: Axes, named: dict[int, naming.Named]) -> Op:
    return Op(
        name=event.name,
        fn=event.fn.rstrip("_") if rules.in_place(event.fn) else event.fn,
        kind=pattern.kind,
        inputs=tuple(operand.value.name for operand in event.operands),
        outputs=tuple(out.name for out in event.outs),
        axes=tuple([Axis(named[id(a.atom)].name, a.role, tuple(a.ins), tuple(a.outs)) for a in axes.found]),
        source=event.source,
        attrs={key: _plain(value) for key, value in pattern.attrs.items()} | ({"inplace": True} if _is_in_place(event) else {}),
        call=call_text(event),
    )


def _is_in_place(event: Event) -> bool:
    """Whether the first operand was written to."""
    return event.fn == "write" or rules.in_place(event.fn) or writes(event.func, event.args, event.kwargs)


def _plain(value: Any) -> Any:
    """As JSON would give it back, with tuples for lists."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _prune(block: Building, kept: set[str]) -> None:
    block.items = [item for item in block.items if isinstance(item, Building) or item in kept]
    for item in block.items:
        if isinstance(item, Building):
            _prune(item, kept)


def _wires(atoms: list[Atom], named: dict[int, naming.Named]) -> dict[str, Wire]:
    wires: dict[str, Wire] = {}
    for atom in atoms:
        mine = named[id(atom)]
        parts = tuple(
            (start, stop, tuple(named[id(leaf)].name for leaf in leaves(inner))) for start, stop, inner in atom.parts
        )
        wires[mine.name] = Wire(mine.name, mine.label, atom.size, mine.kind, mine.group, mine.origin, parts=parts)
    return wires
