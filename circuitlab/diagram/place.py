"""Drawing -> places: a column for each node, a height for each band.

Columns are longest-path layers. The order of bands from top to bottom is that of a walk back from the outputs, longest
skips last, so that a series-parallel circuit is drawn without crossings and a skip runs beneath what it skips. Heights
are the solution of a linear programme: as few and small bends as the separations allow, long straight lines first,
then as compact as can be. Crossings that the walk's order leaves are not searched for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from circuitlab.diagram.reduce import Band, Drawing, Node

TRACK = 26.0
BAND_GAP = 30.0
_HEAD = {"elementwise": 26.0, "mask": 30.0, "merge": 24.0, "block": 30.0, "input": 18.0, "output": 18.0}
_TAIL = {"block": 24.0, "box": 20.0, "opaque": 20.0, "linear": 18.0, "conv": 18.0}


@dataclass
class Places:
    """Where everything stands.

    Attributes:
        column: id of a node -> its column.
        y: id of a band -> height of its first track.
        top, bottom: id of a node or name of a plate -> its extent.
        order: id of a band -> its number from top to bottom.
        columns: number of columns.
    """

    column: dict[int, int]
    order: dict[int, int]
    columns: int
    y: dict[int, float] = field(default_factory=dict[int, float])
    top: dict[int | str, float] = field(default_factory=dict["int | str", float])
    bottom: dict[int | str, float] = field(default_factory=dict["int | str", float])

    def track_y(self, band: Band, number: int) -> float:
        """Height of a track."""
        return self.y[id(band)] + number * TRACK


def place(drawing: Drawing) -> Places:
    """Find columns, order and heights."""
    column = _columns(drawing)
    places = Places(column, _order(drawing, column), max(column.values(), default=0) + 1)
    _heights(drawing, places)
    return places


def _columns(drawing: Drawing) -> dict[int, int]:
    column: dict[int, int] = {}
    for node in drawing.nodes:
        column[id(node)] = max((column[id(band.source)] + 1 for band in node.ins), default=0)
    last = max(column.values(), default=0)
    for node in drawing.nodes:
        if node.kind == "output":
            column[id(node)] = last
    # what begins a path (an input) stands right before it is used
    for node in reversed(drawing.nodes):
        if not node.ins and node.outs:
            column[id(node)] = min(column[id(band.target)] for band in node.outs) - 1
    return column


def _order(drawing: Drawing, column: dict[int, int]) -> dict[int, int]:
    number: dict[int, int] = {}
    ends = [node for node in drawing.nodes if not node.outs]
    stack = [band for node in reversed(ends) for band in reversed(_wanted(node, column))]
    while stack:
        band = stack.pop()
        if id(band) in number:
            continue
        number[id(band)] = len(number)
        stack.extend(reversed(_wanted(band.source, column)))
    for band in drawing.bands:
        number.setdefault(id(band), len(number))
    return number


def _wanted(node: Node, column: dict[int, int]) -> list[Band]:
    """A node's in-bands from top to bottom: operands in order, but of a sum the longest way round last."""
    if node.kind in ("merge", "bar", "block"):
        return sorted(node.ins, key=lambda band: column[id(band.target)] - column[id(band.source)])
    return list(node.ins)


# heights -------------------------------------------------------------------------------------------------


class _Programme:
    """Variables, "a + gap <= b" constraints, and weighted absolute differences to make small."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[tuple[int, int, float]] = []
        self.bends: list[tuple[int, int, float, float]] = []
        self.pulls: list[tuple[int, float]] = []

    def variable(self) -> int:
        self.count += 1
        return self.count - 1

    def below(self, a: int, b: int, gap: float) -> None:
        """a + gap <= b."""
        self.rows.append((a, b, gap))

    def level(self, a: int, b: int, offset: float, weight: float) -> None:
        """|a + offset - b| is to be small."""
        self.bends.append((a, b, offset, weight))

    def solve(self) -> np.ndarray:
        """Values of the variables."""
        n, m = self.count, len(self.bends)
        cost = np.zeros(n + m)
        for variable, weight in self.pulls:
            cost[variable] += weight
        r, c, v, limit = [], [], [], []
        for a, b, gap in self.rows:
            k = len(limit)
            r += [k, k]
            c += [a, b]
            v += [1.0, -1.0]
            limit.append(-gap)
        for number, (a, b, offset, weight) in enumerate(self.bends):
            cost[n + number] += weight
            for sign in (1.0, -1.0):
                k = len(limit)
                r += [k, k, k]
                c += [a, b, n + number]
                v += [sign, -sign, -1.0]
                limit.append(-sign * offset)
        matrix = coo_matrix((v, (r, c)), shape=(len(limit), n + m))
        found = linprog(cost, A_ub=matrix.tocsr(), b_ub=limit, bounds=[(0, None)] * (n + m), method="highs")
        if found.x is None:
            raise RuntimeError(f"heights could not be found: {found.message}")
        return found.x[:n]


def _heights(drawing: Drawing, places: Places) -> None:
    lp = _Programme()
    y = {id(band): lp.variable() for band in drawing.bands}
    top: dict[int | str, int] = {id(node): lp.variable() for node in drawing.nodes}
    bottom: dict[int | str, int] = {id(node): lp.variable() for node in drawing.nodes}
    for name in drawing.plates:
        top[name], bottom[name] = lp.variable(), lp.variable()
    for node in drawing.nodes:
        head, tail = _HEAD.get(node.kind, 18.0), _TAIL.get(node.kind, 12.0)
        for band in (*node.ins, *node.outs):
            lp.below(top[id(node)], y[id(band)], head)
            lp.below(y[id(band)], bottom[id(node)], _height(band) + tail)
        lp.below(top[id(node)], bottom[id(node)], head + tail)
        lp.pulls += [(bottom[id(node)], 0.02), (top[id(node)], -0.015)]
        for plate in node.plates:
            lp.below(top[plate], top[id(node)], 4.0)
            lp.below(bottom[id(node)], bottom[plate], 2.0)
        for inner, outer in zip(node.plates[1:], node.plates, strict=False):
            lp.below(top[outer], top[inner], 18.0)
            lp.below(bottom[inner], bottom[outer], 4.0)
    for name in drawing.plates:
        lp.pulls += [(top[name], -0.01), (bottom[name], 0.012)]
    _separate_bands(drawing, places, lp, y)
    _separate_boxes(drawing, places, lp, y, top, bottom)
    for node in drawing.nodes:
        for a, i, b, o in node.passes:
            main = node.kind in ("copy", "merge") and (a.main and b.main)
            lp.level(y[id(a)], y[id(b)], (i - o) * TRACK, 4.0 if main and _is_skip(node, a, b, places) else 1.0)
        for a, b in _acted_pairs(node):
            lp.level(y[id(a[0])], y[id(b[0])], (a[1] - b[1]) * TRACK, 0.7)
    for band in drawing.bands:
        lp.pulls.append((y[id(band)], 0.003))
    values = lp.solve()
    places.y = {id(band): float(values[y[id(band)]]) for band in drawing.bands}
    places.top = {key: float(values[index]) for key, index in top.items()}
    places.bottom = {key: float(values[index]) for key, index in bottom.items()}


def _height(band: Band) -> float:
    return TRACK * max(len(band.tracks) - 1, 0)


def _is_skip(node: Node, a: Band, b: Band, places: Places) -> bool:
    """The branch of a copy, or operand of a sum, that goes the longest way: the residual stream."""
    rivals = node.outs if node.kind == "copy" else node.ins
    mine = b if node.kind == "copy" else a
    longest = max(rivals, key=lambda band: (_span(band, places), places.order[id(band)]))
    return mine is longest


def _span(band: Band, places: Places) -> int:
    return places.column[id(band.target)] - places.column[id(band.source)]


def _acted_pairs(node: Node) -> list[tuple[tuple[Band, int], tuple[Band, int]]]:
    """Tracks that end at a node and tracks that begin there should be level, in order."""
    if node.kind in ("copy", "contract", "merge"):
        return []
    ins = [(band, number) for band in node.ins for number in node.acted(band)]
    outs = [(band, number) for band in node.outs for number in node.acted(band)]
    return list(zip(ins, outs, strict=False))


def _separate_bands(drawing: Drawing, places: Places, lp: _Programme, y: dict[int, int]) -> None:
    gaps: list[list[Band]] = [[] for _ in range(places.columns)]
    for band in sorted(drawing.bands, key=lambda band: places.order[id(band)]):
        for gap in range(places.column[id(band.source)], places.column[id(band.target)]):
            gaps[gap].append(band)
    done: set[tuple[int, int]] = set()
    for bands in gaps:
        for above, below in itertools.pairwise(bands):
            if (id(above), id(below)) not in done:
                done.add((id(above), id(below)))
                lp.below(y[id(above)], y[id(below)], _height(above) + BAND_GAP)


def _separate_boxes(
    drawing: Drawing,
    places: Places,
    lp: _Programme,
    y: dict[int, int],
    top: dict[int | str, int],
    bottom: dict[int | str, int],
) -> None:
    """Nodes and plates keep off bands and each other where they share columns, in the order of their bands."""
    boxes: list[tuple[int | str, int, int, tuple[int, int], set[str]]] = []
    for node in drawing.nodes:
        numbers = [places.order[id(band)] for band in (*node.ins, *node.outs)]
        if numbers:
            at = places.column[id(node)]
            boxes.append((id(node), at, at, (min(numbers), max(numbers)), set(node.plates)))
    within = {name: [n for n in drawing.nodes if name in n.plates] for name in drawing.plates}
    inner_bands: dict[int | str, set[int]] = {id(n): {id(b) for b in (*n.ins, *n.outs)} for n in drawing.nodes}
    for name, nodes in within.items():
        if not nodes:
            continue
        at = [places.column[id(node)] for node in nodes]
        bands = {id(band): band for node in nodes for band in (*node.ins, *node.outs)}
        numbers = [places.order[key] for key in bands]
        boxes.append((name, min(at), max(at), (min(numbers), max(numbers)), set(nodes[0].plates[: nodes[0].plates.index(name)])))
        inner_bands[name] = set(bands)
    for key, start, stop, (low, high), around in boxes:
        for band in drawing.bands:
            if id(band) in inner_bands[key]:
                continue
            if places.column[id(band.source)] >= stop or places.column[id(band.target)] <= start:
                continue
            number = places.order[id(band)]
            if number > high:
                lp.below(bottom[key], y[id(band)], 14.0)
            elif number < low:
                lp.below(y[id(band)], top[key], _height(band) + 4.0)
        for other, begin, end, (its_low, _its_high), outside in boxes:
            if key == other or begin > stop or end < start:
                continue
            if isinstance(other, str) and other in around or isinstance(key, str) and key in outside:
                continue
            if isinstance(key, int) and isinstance(other, str) and any(id(n) == key for n in within[other]):
                continue
            if isinstance(other, int) and isinstance(key, str) and any(id(n) == other for n in within[key]):
                continue
            if high < its_low:
                lp.below(bottom[key], top[other], 6.0)


def columns_of(nodes: Sequence[Node], places: Places) -> tuple[int, int]:
    """First and last column of some nodes."""
    at = [places.column[id(node)] for node in nodes]
    return min(at), max(at)
