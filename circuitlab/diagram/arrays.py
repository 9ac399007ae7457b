"""Which array an array is behind reindexing, and the lines it is drawn as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from circuitlab.circuit import Circuit
from circuitlab.diagram.drawing import Occurrence, Track
from circuitlab.diagram.repeats import is_silent

_RANK = {"batch": 9, "position": 0, "spatial": 0, "head": 5, "group": 6, "": 3}


class Arrays:
    """The arrays of a circuit as they are drawn.

    ``aliases`` says of an array that a repeat makes which one it is drawn as; ``bundles`` and ``factors`` say which wires
    are one line.
    """

    def __init__(self, circuit: Circuit, static: frozenset[str], *, batch: bool) -> None:
        self.circuit, self.static, self.batch = circuit, static, batch
        self.aliases: dict[str, str] = {}
        self.bundles: Mapping[str, str] = {}
        self.factors: Mapping[str, str] = {}
        self._bundled: dict[str, int] = {}
        self._seen: dict[str, tuple[str, dict[tuple[int, int], Occurrence]]] = {}

    def learned(self) -> None:
        """Aliases have changed: what was resolved before is forgotten."""
        self._seen.clear()

    def canonical(self, name: str) -> str:
        """The array that a reindexed array is."""
        return self._resolve(name)[0]

    def _resolve(self, name: str) -> tuple[str, dict[tuple[int, int], Occurrence]]:
        """The array behind reindexing, and for each (dim, factor) where that stands in it."""
        known = self._seen.get(name)
        if known is not None:
            return known
        if name in self.aliases:
            found = self._resolve(self.aliases[name])
            self._seen[name] = found
            return found
        tensor = self.circuit.tensor(name)
        op = self.circuit.op(tensor.op) if tensor.op else None
        if op is None or not is_silent(op) or not op.inputs:
            own = {(d, f): (name, d, f) for d, dim in enumerate(tensor.dims) for f in range(len(dim))}
            self._seen[name] = (name, own)
            return self._seen[name]
        number = op.outputs.index(name)
        slot = next((s for s, n in enumerate(op.inputs) if n not in self.static), 0)
        if len(op.outputs) > 1 and number < len(op.inputs):  # arrays broadcast to one shape
            slot = number
        base, places = self._resolve(op.inputs[slot])
        mapped: dict[tuple[int, int], Occurrence] = {}
        for axis in op.axes:
            start = next((p for p in axis.ins if p[0] == slot), None)
            for out, dim, factor in axis.outs:
                if out == number and start is not None and (start[1], start[2]) in places:
                    mapped[dim, factor] = places[start[1], start[2]]
        self._seen[name] = (base, mapped)
        return self._seen[name]

    def occurrence(self, name: str, dim: int, factor: int) -> Occurrence | None:
        """Where an occurrence stands in the array behind reindexing; None for one made by repeating."""
        return self._resolve(name)[1].get((dim, factor))

    def tracks(self, name: str) -> list[Track]:
        """The tracks of an array, from top to bottom: positions, features, heads, batch."""
        tensor = self.circuit.tensor(name)
        found = [
            (wire, (name, d, f)) for d, dim in enumerate(tensor.dims) for f, wire in enumerate(dim)
        ]
        wires = self.circuit.wires
        if not self.batch:
            found = [pair for pair in found if wires[pair[0]].kind != "batch"]
        keys: list[tuple[int, int, int, int, str]] = []
        count: Counter[str] = Counter()
        for at, (wire, _) in enumerate(found):
            together = self.bundles.get(wire, "")  # factors are next to each other as it is
            number = self._bundled.setdefault(together, len(self._bundled)) if together else at  # one order in all arrays
            group = together or self.factors.get(wire, "") or wires[wire].group
            keys.append((_RANK.get(wires[wire].kind, 2), not together, count[wire], number, group))
            count[wire] += 1
        tracks: list[Track] = []
        group = ""
        for (*_, mine), _, (wire, place) in sorted(zip(keys, range(len(found)), found, strict=True)):
            if tracks and group and mine == group and wire not in tracks[-1].wires:
                tracks[-1] = Track((*tracks[-1].wires, wire), (*tracks[-1].places, place))
            else:
                tracks.append(Track((wire,), (place,)))
            group = mine
        return tracks
