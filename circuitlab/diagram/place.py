"""Drawing -> places: a column for each node, a height for each band.

Columns are longest-path layers. The order of bands from top to bottom is that of a walk back from the outputs, longest
skips last, so that a series-parallel circuit is drawn without crossings and a skip runs beneath what it skips.
Where that order would lead a wire through a foreign glyph, the glyph's own wires are crossed over to it. Heights are found in `heights.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from circuitlab.diagram.drawing import Band, Drawing, Node
from circuitlab.diagram.heights import Box, Heights

_PASSES = 32
"""Over the nodes, until the columns stay: each takes time in proportion to the drawing."""
_FREE = {"copy", "merge", "elementwise", "mask", "input", "output", "route"}
"""Nodes that wires may run through: they bend and cross there, or the glyph floats above."""


@dataclass
class Places:
    """Where everything stands.

    Attributes:
        column: id of a node -> its column.
        order: id of a band -> its number from top to bottom.
        row_of: column -> the row it is in.
        y: (id of a band, row) -> heights of its tracks there.
        top, bottom: (id of a node or name of a plate, row) -> its extent.
    """

    column: dict[int, int]
    order: dict[int, float]
    row_of: list[int]
    y: dict[tuple[int, int], list[float]] = field(default_factory=dict[tuple[int, int], list[float]])
    top: dict[Box, float] = field(default_factory=dict[Box, float])
    bottom: dict[Box, float] = field(default_factory=dict[Box, float])

    @property
    def columns(self) -> int:
        """Number of columns."""
        return len(self.row_of)

    def row(self, node: Node) -> int:
        """The row that a node is in."""
        return self.row_of[self.column[id(node)]]

    def wrap(self, drawing: Drawing, breaks: list[tuple[int, int]]) -> None:
        """Find heights again, for rows of these first and last columns."""
        self.row_of = [row for row, (first, last) in enumerate(breaks) for _ in range(first, last + 1)]
        self.y, self.top, self.bottom = Heights(drawing, self.column, self.order, self.row_of).solve()


def place(drawing: Drawing) -> Places:
    """Find columns and order, in one row; heights are still to be found: `Places.wrap`."""
    apart: dict[tuple[int, int], tuple[Node, Node]] = {}
    led = [(node, [band for band in bands if _is_led(band, node)]) for node, bands in drawing.routed]
    drawing.routed = [(node, bands) for node, bands in led if bands]
    for _ in range(8):
        column = _columns(drawing, apart.values())
        order = _order(drawing, column)
        for node, bands in drawing.routed:
            beyond = {id(band): order[id(_beyond(band, node))] for band in bands}
            anchors = [order[id(band)] for band in node.ins if id(band) not in beyond] or list(beyond.values())
            middle = statistics.median(anchors)
            for number, band in enumerate(sorted(bands, key=lambda band: beyond[id(band)])):
                order[id(band)] = middle + (number + 1) / (2 * len(bands) + 2)
        clashes = _clashes(drawing, column, order)
        routes = [] if clashes else _route(drawing, column, order)
        if not clashes and not routes:
            break
        for a, b in clashes:
            if apart.pop((id(a), id(b)), None):  # b pushes a on: then the other way about
                a, b = b, a
            apart[id(a), id(b)] = a, b
        drawing.routed += routes
    else:
        column = _columns(drawing, apart.values())
        order = _order(drawing, column)
    return Places(column, order, [0] * (max(column.values(), default=0) + 1))


def _clashes(drawing: Drawing, column: dict[int, int], order: dict[int, float]) -> list[tuple[Node, Node]]:
    """Nodes that stand where wires bend: (a, b), where b is to stand in a later column than a."""
    columns: dict[int, list[tuple[Node, float, float]]] = {}
    for node in drawing.nodes:
        numbers = [order[id(band)] for band in (*node.ins, *node.outs)]
        if numbers and node.kind not in ("input", "output"):
            columns.setdefault(column[id(node)], []).append((node, min(numbers), max(numbers)))
    found: list[tuple[Node, Node]] = []
    for nodes in columns.values():
        for bends, low, high in nodes:
            if bends.kind not in ("copy", "route", "merge"):
                found += [(bends, flag) for flag, its, _ in nodes if flag.kind == "load" and low < its < high]
                continue
            for other, its_low, its_high in nodes:
                if other.kind not in ("copy", "route", "merge") and low < its_low and its_high < high:
                    found.append((other, bends) if bends.kind == "merge" else (bends, other))
    return list({(id(a), id(b)): (a, b) for a, b in found}.values())


def _route(drawing: Drawing, column: dict[int, int], order: dict[int, float]) -> list[tuple[Node, list[Band]]]:
    """Where foreign wires would run through a glyph, its wires are led to it side by side, crossing others before.

    Changes the drawing: the bands concerned are cut in two by a node of kind "route".

    Returns:
        such glyphs, each with the short bands at one side.
    """
    crossing: list[list[Band]] = [[] for _ in range(max(column.values(), default=0) + 1)]
    for band in drawing.bands:
        for gap in range(column[id(band.source)], column[id(band.target)]):
            crossing[gap].append(band)

    def foreign(own: list[Band], first: int, last: int) -> bool:
        """Whether another band lies between some bands all the way from one gap to another."""
        if len(own) < 2 or first < 0:
            return False
        numbers, mine = [order[id(band)] for band in own], set(map(id, own))
        low, high = min(numbers), max(numbers)
        return any(
            low < order[id(band)] < high and column[id(band.target)] > last and id(band) not in mine
            for band in crossing[first]
        )

    wanted: list[tuple[Node, str]] = []
    for node in drawing.nodes:
        if node.kind in _FREE:
            continue
        at = column[id(node)]
        ins, outs = foreign(node.ins, at - 1, at - 1), foreign(node.outs, at, at)
        led = {side for side, bands in (("ins", node.ins), ("outs", node.outs)) for b in bands if _is_led(b, node)}
        if ins and "ins" not in led:
            wanted.append((node, "ins"))
        if (outs or foreign([*node.ins, *node.outs], at - 1, at)) and "outs" not in led:
            wanted.append((node, "outs"))
    return [(node, [_cut(drawing, band, node) for band in list(getattr(node, side))]) for node, side in wanted]


def _is_led(band: Band, node: Node) -> bool:
    """Whether a band of a node comes from a route, or goes to one."""
    return (band.source if band.target is node else band.target).kind == "route"


def _cut(drawing: Drawing, band: Band, node: Node) -> Band:
    """Cut a band by a route; gives the half at the node, which stays the node's own."""
    plates = band.source.plates if band.target is node else band.target.plates
    route = Node("route", plates=tuple(p for p in node.plates if p in plates))
    other = Band(band.tensor, band.tracks, band.source, band.target, main=band.main)
    if band.target is node:
        band.source.outs = [other if b is band else b for b in band.source.outs]
        band.source.passes = [(a, i, other if b is band else b, o) for a, i, b, o in band.source.passes]
        other.target, band.source = route, route
        route.ins, route.outs = [other], [band]
        at = drawing.nodes.index(node)
    else:
        band.target.ins = [other if b is band else b for b in band.target.ins]
        band.target.passes = [(other if a is band else a, i, b, o) for a, i, b, o in band.target.passes]
        band.target.pairs = [
            ((other if a is band else a, i), (other if b is band else b, j)) for (a, i), (b, j) in band.target.pairs
        ]
        other.source, band.target = route, route
        route.ins, route.outs = [band], [other]
        at = drawing.nodes.index(node) + 1
    route.passes = [(route.ins[0], n, route.outs[0], n) for n in range(len(band.tracks))]
    drawing.nodes.insert(at, route)
    drawing.bands.append(other)
    return band


def _beyond(band: Band, node: Node) -> Band:
    """The band on the other side of a route."""
    return band.source.ins[0] if band.target is node else band.target.outs[0]


def _columns(drawing: Drawing, apart: Iterable[tuple[Node, Node]]) -> dict[int, int]:
    """Longest-path layers; a plate that needs what another makes stands to the right of all of that.

    Args:
        drawing: what is drawn.
        apart: (a, b) where b is to stand to the right of a as well.
    """
    later: dict[int, list[Node]] = {}
    earlier: dict[int, list[Node]] = {}
    for a, b in apart:
        later.setdefault(id(b), []).append(a)
        earlier.setdefault(id(a), []).append(b)
    around = {name: set(node.plates[:level]) for node in drawing.nodes for level, name in enumerate(node.plates)}
    upstream: dict[int, set[str]] = {}
    after: dict[str, set[str]] = {}
    for node in drawing.nodes:
        reached = upstream[id(node)] = set[str]()
        for band in node.ins:
            reached |= upstream[id(band.source)] | set(band.source.plates)
        reached -= set(node.plates)
        for name in node.plates:
            after.setdefault(name, set()).update(other for other in reached if name not in around[other])
    feeds = _feeds(drawing)
    column: dict[int, int] = {}
    ends: dict[str, int] = {}
    for _ in range(_PASSES if later else 1):  # until nothing moves: a may come after b in the run
        known = dict(column)
        for node in drawing.nodes:
            before = [column[id(band.source)] for band in node.ins]
            before += [ends[other] for name in node.plates for other in after.get(name, ()) if other in ends]
            before += [column[key] for name in node.plates for key in feeds[name]]
            before += [column[id(a)] for a in later.get(id(node), ()) if id(a) in column]
            column[id(node)] = max(before, default=-1) + 1
            for name in node.plates:
                ends[name] = max(ends.get(name, 0), column[id(node)])
        if column == known:
            break
    last = max(column.values(), default=0)
    for node in drawing.nodes:
        if node.kind == "output":
            column[id(node)] = last
    # what begins a path (an input) stands right before it is used, and so do its copy, and a later copy of an array
    for node in reversed(drawing.nodes):
        if node.outs and (not node.ins or (node.kind == "copy" and node.ins[0].source.kind in ("copy", "input"))):
            after_it = [*(band.target for band in node.outs), *earlier.get(id(node), ())]
            column[id(node)] = max(min(column[id(other)] for other in after_it), 1) - 1
    return column


def _feeds(drawing: Drawing) -> dict[str, list[int]]:
    """For each plate the nodes (by id) that stand to its left: those before it whose arrays it takes."""
    number = {id(node): n for n, node in enumerate(drawing.nodes)}
    members: dict[str, list[Node]] = {}
    for node in drawing.nodes:
        for name in node.plates:
            members.setdefault(name, []).append(node)
    found: dict[str, list[int]] = {}
    for name, nodes in members.items():
        first = number[id(nodes[0])]
        sources = [id(band.source) for node in nodes for band in node.ins if name not in band.source.plates]
        found[name] = [key for key in dict.fromkeys(sources) if number[key] < first]
    return found


def _order(drawing: Drawing, column: dict[int, int]) -> dict[int, float]:
    number: dict[int, float] = {}
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
