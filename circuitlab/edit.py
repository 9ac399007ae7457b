"""Circuit -> Circuit: the same run under other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from circuitlab.circuit import Circuit, Wire, unknown
from circuitlab.errors import InputError


def rename(circuit: Circuit, names: Mapping[str, str]) -> Circuit:
    """Other names for wires, everywhere they occur.

    Args:
        circuit: is left as it is.
        names: wire name, or a label that only one wire has -> new name. The new name's last word (after the last dot)
            becomes the label.

    Raises:
        InputError: an unknown wire, a label of several wires, an empty name, or a name that is taken.
    """
    labels: dict[str, list[str]] = {}
    for wire in circuit.wires.values():
        labels.setdefault(wire.label, []).append(wire.name)
    change: dict[str, str] = {}
    for old, new in names.items():
        if not isinstance(new, str) or not new.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"rename({old!r} -> {new!r}): the new name must be a word")
        found = [old] if old in circuit.wires else labels.get(old, [])
        if not found:
            raise unknown("wire", old, [*circuit.wires, *labels])
        if len(found) > 1:
            raise InputError(f"{len(found)} wires have the label {old!r}; give one of their names, e.g. {found[:4]}")
        change[found[0]] = new.strip()
    kept = [name for name in circuit.wires if name not in change]
    taken = [*kept, *change.values()]
    twice = next((name for name in change.values() if taken.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"the name {twice!r} would belong to two wires; wires that are one are found, not named so")

    def of(name: str) -> str:
        return change.get(name, name)

    def wire_of(wire: Wire) -> Wire:
        parts = tuple((start, stop, tuple(of(n) for n in inner)) for start, stop, inner in wire.parts)
        new = change.get(wire.name)
        if new is None:
            return replace(wire, parts=parts)
        return replace(wire, name=new, label=new.rpartition(".")[2] or new, parts=parts)

    return replace(
        circuit,
        wires={of(name): wire_of(wire) for name, wire in circuit.wires.items()},
        tensors=tuple(replace(t, dims=tuple(tuple(of(n) for n in dim) for dim in t.dims)) for t in circuit.tensors),
        ops=tuple(replace(op, axes=tuple(replace(a, wire=of(a.wire)) for a in op.axes)) for op in circuit.ops),
    )


