"""Heights of tracks: a linear programme. Few and small bends, long straight lines first, then as compact as can be.

Every track of every band has a height of its own, and a band without tracks (a scalar) has one too. Constraints say what may not overlap; the objective is the weighted
sum of the bends of everything that passes from band to band, and a little of all heights, so that nothing drifts.
Where the drawing is wrapped into rows, what goes on in the next row has new heights there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from circuitlab.diagram.drawing import Band, Drawing, Node

Box = tuple[int | str, int]
"""(id of a node or name of a plate, row)."""

TRACK = 26.0
"""Least distance between the wires of an array: room for a label."""

_BAND_GAP = 30.0
_CLEAR = 8.0
_TITLE = 18.0
_FLOATING = {"copy", "route", "merge", "elementwise", "mask", "input", "output"}
_HEAD = {"block": 40.0, "elementwise": 28.0, "mask": 32.0, "merge": 26.0, "input": 20.0, "output": 20.0, "contract": 20.0}
_PAD = {"block": 20.0, "linear": 14.0, "embedding": 14.0, "conv": 13.0, "box": 14.0, "opaque": 14.0, "pool": 13.0,
        "norm": 9.0, "softmax": 11.0, "index": 10.0, "bar": 8.0}
_BELOW = {"softmax": 24.0}


class Heights:
    """Builds and solves the programme for one drawing."""

    def __init__(
        self, drawing: Drawing, column: Mapping[int, int], order: Mapping[int, float], row_of: Sequence[int]
    ) -> None:
        self.drawing, self.column, self.order, self.row_of = drawing, column, order, row_of
        self.count = 0
        self.limits: list[tuple[int, int, float, int]] = []
        self.bends: list[tuple[int, int, float]] = []
        self.pulls: dict[int, float] = {}
        self.y = {
            (id(band), row): [self._variable() for _ in band.tracks or [None]]
            for band in drawing.bands
            for row in range(row_of[column[id(band.source)]], row_of[column[id(band.target)]] + 1)
        }
        self.members: dict[Box, list[Node]] = {}
        for node in drawing.nodes:
            for name in node.plates:
                self.members.setdefault((name, self._row(node)), []).append(node)
        self.gaps: list[list[Band]] = [[] for _ in row_of]
        for band in sorted(drawing.bands, key=lambda band: order[id(band)]):
            for gap in range(column[id(band.source)], column[id(band.target)]):
                self.gaps[gap].append(band)
        keys: list[Box] = [*((id(node), self._row(node)) for node in drawing.nodes), *self.members]
        self.top = {key: self._variable() for key in keys}
        self.bottom = {key: self._variable() for key in keys}

    def solve(self) -> tuple[dict[tuple[int, int], list[float]], dict[Box, float], dict[Box, float]]:
        """Heights of each band's tracks in each row, and tops and bottoms of nodes (by id) and plates (by name)."""
        for tracks in self.y.values():
            for above, below in itertools.pairwise(tracks):
                self._below(above, below, TRACK, 9)
                self._pull(above, -0.05)
                self._pull(below, 0.05)
            for variable in tracks:
                self._pull(variable, 0.003)
        for node in self.drawing.nodes:
            self._node(node)
        for key in self.members:
            self._pull(self.top[key], -0.01)
            self._pull(self.bottom[key], 0.012)
        self._separate_bands()
        self._separate_boxes()
        found = self._optimum()
        heights = {key: [float(found[v]) for v in tracks] for key, tracks in self.y.items()}
        return (
            heights,
            {key: float(found[v]) for key, v in self.top.items()},
            {key: float(found[v]) for key, v in self.bottom.items()},
        )

    def _row(self, node: Node) -> int:
        return self.row_of[self.column[id(node)]]

    def _at(self, band: Band, node: Node) -> list[int]:
        """A band's heights where a node stands."""
        return self.y[id(band), self._row(node)]

    # the programme ------------------------------------------------------------------------------------

    def _variable(self) -> int:
        self.count += 1
        return self.count - 1

    def _below(self, a: int, b: int, gap: float, weight: int = 2) -> None:
        """B lies at least gap below a. Where such wishes contradict each other, those of the least weight are dropped."""
        self.limits.append((a, b, gap, weight))

    def _consistent(self) -> list[tuple[int, int, float, int]]:
        """All gaps are positive, so the wishes can be met if and only if they have no cycle."""
        kept = self.limits
        while kept:
            ends = np.array([(a, b) for a, b, _, _ in kept])
            graph = coo_matrix((np.ones(len(kept)), (ends[:, 0], ends[:, 1])), shape=(self.count, self.count))
            _, label = connected_components(graph, directed=True, connection="strong")
            inside = label[ends[:, 0]] == label[ends[:, 1]]
            if not inside.any():
                break
            least = min(limit[3] for limit, bad in zip(kept, inside, strict=True) if bad)
            kept = [limit for limit, bad in zip(kept, inside, strict=True) if not (bad and limit[3] == least)]
        return kept

    def _level(self, a: int, b: int, weight: float) -> None:
        """A and b should be at one height."""
        self.bends.append((a, b, weight))

    def _pull(self, variable: int, weight: float) -> None:
        self.pulls[variable] = self.pulls.get(variable, 0.0) + weight

    def _optimum(self) -> np.ndarray:
        """Heights of all variables. What no wish joins, such as the rows, is found apart: that takes far less time."""
        if self.count == 0:
            return np.zeros(0)
        kept = self._consistent()
        joined = [(a, b) for a, b, *_ in (*kept, *self.bends)]
        ends = np.array(joined or [(0, 0)])
        graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(self.count, self.count))
        number, label = connected_components(graph, directed=False)
        limits: list[list[tuple[int, int, float]]] = [[] for _ in range(number)]
        bends: list[list[tuple[int, int, float]]] = [[] for _ in range(number)]
        members: list[list[int]] = [[] for _ in range(number)]
        for variable, group in enumerate(label.tolist()):
            members[group].append(variable)
        for a, b, gap, _ in kept:
            limits[label[a]].append((a, b, gap))
        for bend in self.bends:
            bends[label[bend[0]]].append(bend)
        found = np.zeros(self.count)
        for variables, its_limits, its_bends in zip(members, limits, bends, strict=True):
            found[variables] = self._solved(variables, its_limits, its_bends)
        return found

    def _solved(
        self, variables: list[int], limits: list[tuple[int, int, float]], bends: list[tuple[int, int, float]]
    ) -> np.ndarray:
        """Each bend is the sum of an upward and a downward part, both at least 0."""
        at = {variable: number for number, variable in enumerate(variables)}
        n, m = len(variables), len(bends)
        cost = np.zeros(n + 2 * m)
        cost[:n] = [self.pulls.get(variable, 0.0) for variable in variables]
        cost[n : n + m] = cost[n + m :] = [weight for _, _, weight in bends]
        below = _matrix([[(at[a], 1.0), (at[b], -1.0)] for a, b, _ in limits], n + 2 * m)
        levels = _matrix(
            [[(at[a], 1.0), (at[b], -1.0), (n + k, 1.0), (n + m + k, -1.0)] for k, (a, b, _) in enumerate(bends)], n + 2 * m
        )
        found = linprog(
            cost, A_ub=below if limits else None, b_ub=np.array([-gap for _, _, gap in limits]) if limits else None,
            A_eq=levels if m else None, b_eq=np.zeros(m) if m else None, bounds=(0, None), method="highs",
        )
        if found.x is None:
            raise RuntimeError(f"heights could not be found: {found.message}")
        return found.x[:n]

    # what the drawing asks for ------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        row = self._row(node)
        top, bottom = self.top[id(node), row], self.bottom[id(node), row]
        acted = {(id(band), n) for band in (*node.ins, *node.outs) for n in node.acted(band)}
        if node.kind in _FLOATING or not acted:
            head = _HEAD.get(node.kind, 18.0) + (13.0 if node.kind == "merge" and len(node.label) > 1 else 0.0)
            for band in (*node.ins, *node.outs):
                for variable in self._at(band, node):
                    self._below(top, variable, head)
                    self._below(variable, bottom, 12.0)
            self._below(top, bottom, head + 12.0)
        else:
            self._glyph(node, acted)
        several = Counter(end for a, i, b, o in node.passes for end in ((id(a), i), (id(b), o)))
        for a, i, b, o in node.passes:
            weight = 2.0  # what must bend, bends where it branches and joins
            joint = node.kind in ("block", "box", "opaque") and max(several[id(a), i], several[id(b), o]) > 1
            if joint or node.kind in ("copy", "merge", "route"):
                weight = 6.0 if node.kind != "route" and self._is_skip(node, a, b) else 0.5
            self._level(self._at(a, node)[i], self._at(b, node)[o], weight)
        for one, other in _followed(node):
            self._level(self._at(one[0], node)[one[1]], self._at(other[0], node)[other[1]], 1.5)
        self._pull(bottom, 0.02)
        self._pull(top, -0.015)
        for plate in node.plates:
            self._below(self.top[plate, row], top, 4.0)
            self._below(bottom, self.bottom[plate, row], 3.0)
        for inner, outer in zip(node.plates[1:], node.plates, strict=False):
            room = _TITLE + (12.0 if self.drawing.plates[inner][1] > 1 else 0.0)
            self._below(self.top[outer, row], self.top[inner, row], room)
            self._below(self.bottom[inner, row], self.bottom[outer, row], 5.0)
        if node.plates:
            self._below(self.top[node.plates[-1], row], top, _TITLE + 2.0)

    def _glyph(self, node: Node, acted: set[tuple[int, int]]) -> None:
        """The glyph spans the tracks it acts on; what passes keeps clear of it, above or below."""
        row = self._row(node)
        top, bottom = self._variable(), self._variable()
        pad, tail = _PAD.get(node.kind, 10.0), _BELOW.get(node.kind, _PAD.get(node.kind, 10.0))
        rank = {id(band): self.order[id(band)] for band in (*node.ins, *node.outs)}
        upper = [min(side, key=lambda b: rank[id(b)]) for side in (node.ins, node.outs) if side]
        lower = [max(side, key=lambda b: rank[id(b)]) for side in (node.ins, node.outs) if side]
        sources = _sources(node)
        counted = node.count > 1
        for band in (*node.ins, *node.outs):
            numbers = [n for n in range(len(band.tracks)) if (id(band), n) in acted]
            for n, variable in enumerate(self._at(band, node)):
                if (id(band), n) in acted:
                    self._below(top, variable, pad)
                    self._below(variable, bottom, tail)
                elif node.kind != "contract" and numbers and n < numbers[0] and band in upper:
                    self._below(variable, top, _CLEAR, 1)
                    for source in sources.get((id(band), n), ()):
                        self._below(self.y[source[0], row][source[1]], top, _CLEAR, 1)
                elif node.kind != "contract" and numbers and n > numbers[-1] and band in lower:
                    self._below(bottom, variable, _CLEAR, 1)
                    for source in sources.get((id(band), n), ()):
                        self._below(bottom, self.y[source[0], row][source[1]], _CLEAR, 1)
                self._below(self.top[id(node), row], variable, 44.0 if counted else 18.0)
                self._below(variable, self.bottom[id(node), row], 10.0)
        self._below(top, bottom, 2 * pad)
        self._below(self.top[id(node), row], top, (9.0 if node.kind == "block" else _HEAD.get(node.kind, 4.0)) + (42.0 if counted else 0.0))
        self._below(bottom, self.bottom[id(node), row], 16.0 if counted else 2.0)
        self._pull(top, -0.01)
        self._pull(bottom, 0.012)

    def _is_skip(self, node: Node, a: Band, b: Band) -> bool:
        """The branch of a copy, or operand of a sum, that goes the longest way: the residual stream."""
        parts = len(node.ins) == 1
        rivals, mine = (node.outs, b) if parts else (node.ins, a)
        return mine is max(rivals, key=lambda band: (self._span(band), self.order[id(band)]))

    def _span(self, band: Band) -> int:
        return self.column[id(band.target)] - self.column[id(band.source)]

    def _separate_bands(self) -> None:
        done: set[tuple[int, int, int]] = set()
        for gap, bands in enumerate(self.gaps[:-1]):
            for row in dict.fromkeys(self.row_of[gap : gap + 2]):
                for above, below in itertools.pairwise(bands):
                    if (id(above), id(below), row) not in done:
                        done.add((id(above), id(below), row))
                        self._below(self.y[id(above), row][-1], self.y[id(below), row][0], _BAND_GAP, 8)

    def _separate_boxes(self) -> None:
        """Nodes and plates keep off bands and each other where they share columns, in the order of their bands."""
        groups: dict[Box, list[Node]] = {(id(node), self._row(node)): [node] for node in self.drawing.nodes}
        groups.update(self.members)
        boxes: list[tuple[Box, int, int, float, float]] = []
        own: dict[Box, set[int]] = {}
        around: dict[Box, set[Box]] = {}
        for key, nodes in groups.items():
            bands = {id(band) for node in nodes for band in (*node.ins, *node.outs)}
            if not bands:
                continue
            numbers = [self.order[band] for band in bands]
            at = [self.column[id(node)] for node in nodes]
            boxes.append((key, min(at), max(at), min(numbers), max(numbers)))
            own[key] = bands
            plates = nodes[0].plates
            outer = plates[: plates.index(key[0])] if isinstance(key[0], str) else plates
            around[key] = {(name, key[1]) for name in outer}
        at_column: list[list[int]] = [[] for _ in self.row_of]
        for number, (_, first, last, _, _) in enumerate(boxes):
            for column in range(first, last + 1):
                at_column[column].append(number)
        for key, first, last, low, high in boxes:
            row = key[1]
            near = {id(band): band for gap in range(first, max(last, first + 1)) for band in self.gaps[gap]}
            for band in near.values():
                if id(band) in own[key] or (id(band), row) not in self.y or self.column[id(band.source)] >= last:
                    continue
                tracks = self.y[id(band), row]
                if self.order[id(band)] > high:
                    self._below(self.bottom[key], tracks[0], 24.0, 1)
                elif self.order[id(band)] < low:
                    self._below(tracks[-1], self.top[key], 4.0, 1)
            for number in dict.fromkeys(n for column in range(first, last + 1) for n in at_column[column]):
                other, _, _, its_low, _ = boxes[number]
                nested = other in around[key] or key in around[other]
                if high < its_low and other[1] == row and not nested:
                    self._below(self.bottom[key], self.top[other], 6.0, 0)


def _sources(node: Node) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Of each track that leaves a node, the one that it is before; none where several meet, as they do that beside it."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for a, i, b, o in node.passes:
        found.setdefault((id(b), o), []).append((id(a), i))
    return {out: ins for out, ins in found.items() if len(ins) == 1}


def _matrix(rows: list[list[tuple[int, float]]], width: int) -> coo_matrix:
    r = [number for number, row in enumerate(rows) for _ in row]
    c = [column for row in rows for column, _ in row]
    v = [value for row in rows for _, value in row]
    return coo_matrix((v, (r, c)), shape=(len(rows), width))


def _followed(node: Node) -> list[tuple[tuple[Band, int], tuple[Band, int]]]:
    """Tracks that end at a node and tracks that begin there should be level, in order."""
    if node.kind in ("copy", "route", "contract", "merge"):
        return []
    ins = [(band, number) for band in node.ins for number in node.acted(band)]
    outs = [(band, number) for band in node.outs for number in node.acted(band)]
    return list(zip(ins, outs, strict=False))
