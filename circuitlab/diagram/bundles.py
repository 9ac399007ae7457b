"""Wires that are always together, and always treated alike, are drawn as one line: windows of an image, groups of channels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from circuitlab.circuit import Circuit, Op
from circuitlab.diagram.drawing import Band, Node
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


def factors(circuit: Circuit, nodes: Sequence[Node], bands: Sequence[Band], ops: Iterable[Op]) -> dict[str, str]:
    """Factors of one dimension that nothing in a drawing tells apart: channels that only folded blocks see as groups.

    Args:
        circuit, nodes, bands: what is drawn.
        ops: those that have a glyph of their own, and are not within a folded block.

    Returns:
        wire name -> name of the first wire of its dimension. They are next to each other in all arrays shown, of one
        kind, end at the same glyphs, and have the same roles there.
    """
    roles: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter[tuple[str, str]])
    for op in ops:
        for axis in op.axes:
            roles[axis.wire][op.name, axis.role] += 1
    following: dict[str, set[str]] = defaultdict(set)
    preceding: dict[str, set[str]] = defaultdict(set)
    for name in {band.tensor for band in bands}:
        for dim in circuit.tensor(name).dims:
            for one, other in zip(("", *dim), (*dim, ""), strict=True):
                following[one].add(other)
                preceding[other].add(one)
    ends: dict[str, Counter[tuple[int, int, bool]]] = defaultdict(Counter[tuple[int, int, bool]])
    for node in nodes:
        for band in (*node.ins, *node.outs):
            acted = set(node.acted(band))
            for number, track in enumerate(band.tracks):
                for wire in track.wires:
                    ends[wire][id(node), id(band), number in acted] += 1
    single = {track.wires[0] for band in bands for track in band.tracks if len(track.wires) == 1}
    found: dict[str, str] = {}
    for one, its in ends.items():
        other = next(iter(following[one])) if len(following[one]) == 1 else ""
        if not other or one == other or preceding[other] != {one} or not {one, other} <= single:
            continue
        kinds = circuit.wires[one].kind, circuit.wires[other].kind
        if kinds[0] == kinds[1] and its == ends[other] and roles[one] == roles[other]:
            found[one] = other
    starts = [name for name in found if name not in found.values()]
    chains: dict[str, str] = {}
    for start in starts:
        name = start
        while name:
            chains[name] = start
            name = found.get(name, "")
    return chains
