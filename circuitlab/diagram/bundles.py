"""Positions that are always together, and that every operation treats alike, are drawn as one line: windows of an image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from circuitlab.circuit import Circuit
from circuitlab.diagram.repeats import is_silent


def bundles(circuit: Circuit, shown: Iterable[str]) -> dict[str, str]:
    """Wires that are drawn as one line.

    Args:
        circuit: what is drawn.
        shown: names of the arrays that are drawn.

    Returns:
        wire name -> name of the first wire of its bundle. Those of one bundle were made by one op (or are one dimension
        of a parameter), are in the same of the arrays shown, and have the same role in every op.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for name in shown:
        for dim in circuit.tensor(name).dims:
            for wire in dim:
                places[wire].append(name)
    roles: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for op in circuit.ops:
        if not is_silent(op):
            for axis in op.axes:
                roles[axis.wire].append((op.name, axis.role))
    found: dict[object, list[str]] = defaultdict(list)
    for name, where in places.items():
        wire = circuit.wires[name]
        if wire.kind in ("position", "spatial") and (wire.group or wire.origin):
            alike = frozenset(Counter(where).items()), frozenset(Counter(roles[name]).items())
            found[wire.group or wire.origin, alike].append(name)
    return {name: names[0] for names in found.values() if len(names) > 1 for name in names}
