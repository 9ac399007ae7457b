"""How each kind of node is drawn, between the left and right edge of its column."""

from __future__ import annotations

from dataclasses import dataclass, replace

from circuitlab.diagram.drawing import Band, Node
from circuitlab.diagram.metrics import width
from circuitlab.diagram.passing import OVER, crossings, curve, room
from circuitlab.diagram.pen import Pen, number
from circuitlab.diagram.place import Places
from circuitlab.diagram.scene import Mark

_FLOATING = {"elementwise", "mask"}


def node_width(node: Node, places: Places) -> float:
    """How wide a node's column must be."""
    spot = Spot(node, 0.0, 0.0, places)
    bends = [abs(spot.track(a, i) - spot.track(b, o)) for a, i, b, o in node.passes if places.y]
    bend = curve(max(bends, default=0.0))
    label = width(node.label, 12, "title")
    if node.kind in ("input", "output"):
        return width(node.upper, 11, "title") + 12.0 if node.upper else 8.0
    if node.kind in ("copy", "route"):
        return max(12.0, bend)
    if node.kind in _FLOATING:
        return max(26.0 if node.kind == "mask" else label + 32.0, bend)
    if node.kind == "merge":
        return max(18.0, bend)
    if node.kind == "contract":
        return _arc_width(node) + bend
    if node.kind == "norm":
        return max(34.0 if sum(len(node.acted(band)) for band in node.ins) < 2 else 62.0, bend)
    if node.kind == "bar":
        return 22.0 + bend
    if node.kind in ("save", "load"):
        return width(node.label, 15) + 14.0
    if node.kind not in OVER:
        return max(_plate_width(node), bend)
    if node.kind == "block":
        return max(label + 26.0, 56.0) + (30.0 if node.count > 1 else 0) + sum(room(node, places))
    return (58.0 if node.kind == "softmax" else _plate_width(node)) + sum(room(node, places))


def _plate_width(node: Node) -> float:
    """Width of a glyph that is a plate with a text: its column may be wider."""
    if node.kind == "linear":
        return 44.0 + max(width(node.upper, 11) - 12, 0)
    if node.kind == "embedding":
        return 30.0
    return max(width(node.label + node.lower, 12, "title") + (22.0 if node.kind == "conv" else 18.0), 34.0)


def _half(node: Node) -> float:
    """Half the width of a glyph, without the room beside it."""
    label = node.label
    if node.kind == "softmax":
        return 10.0
    if node.kind == "index":
        return max(width(label, 11, "title") + 10, 20) / 2
    if node.kind == "reduce":
        return (width(label, 15, "label") if len(label) <= 6 else width(label, 12, "title")) / 2 + 2
    return _plate_width(node) / 2 - (6.0 if node.kind in ("linear", "embedding") else 4.0)


@dataclass
class Spot:
    """Where a node is drawn: the edges of its column."""

    node: Node
    left: float
    right: float
    places: Places

    def ys(self, band: Band) -> list[float]:
        """Heights of a band's tracks here."""
        return self.places.y[id(band), self.places.row(self.node)]

    def track(self, band: Band, number: int) -> float:
        """Height of one track here."""
        return self.ys(band)[number]

    @property
    def middle(self) -> float:
        """Centre of the column, between the bends."""
        before, after = room(self.node, self.places)
        return (self.left + before + self.right - after) / 2

    @property
    def edges(self) -> tuple[float, float]:
        """Left and right of a glyph that wires pass over."""
        if self.node.kind == "block":
            before, after = room(self.node, self.places)
            many = self.node.count > 1
            return self.left + before + (18.0 if many else 3.0), self.right - after - (22.0 if many else 7.0)
        half = _half(self.node)
        return self.middle - half, self.middle + half

    def heights(self, bands: list[Band]) -> list[float]:
        """Heights of the tracks of some bands that end or begin here."""
        return [self.track(band, n) for band in bands for n in self.node.acted(band)]

    @property
    def all_heights(self) -> list[float]:
        """Heights of every track that touches the node."""
        return [y for band in (*self.node.ins, *self.node.outs) for y in self.ys(band)]


def draw_node(pen: Pen, spot: Spot) -> None:
    """Passing wires, then the glyph."""
    node = spot.node
    if node.kind in ("input", "output"):
        _terminal(pen, spot)
        return
    start = len(pen.marks)
    over = node.kind in OVER
    if not over and node.kind not in ("contract", "bar"):
        _passing(pen, spot)
    draw = {
        "copy": _copy, "route": _copy, "merge": _merge, "contract": _contract, "softmax": _softmax, "norm": _norm, "linear": _linear,
        "embedding": _linear, "elementwise": _elementwise, "mask": _elementwise, "block": _block, "bar": _bar,
        "index": _index, "reduce": _reduce, "conv": _conv, "save": _flag, "load": _flag,
    }.get(node.kind, _box)
    draw(pen, spot)
    if over:
        _over(pen, spot)
    name = node.op or node.block
    for at in range(start, len(pen.marks)):
        mark = pen.marks[at]
        if mark.role not in ("wire", "dot", "label"):
            pen.marks[at] = replace(mark, op=node.op, block=node.block if node.kind == "block" else mark.block or node.block,
                                    id=mark.id or (name if mark.role == "block" else ""))


def _terminal(pen: Pen, spot: Spot) -> None:
    """The name of an input or output, where there are several."""
    node = spot.node
    ys = spot.all_heights
    if not node.upper or not ys:  # an input that nobody reads has no lines
        return
    x, anchor = (spot.right - 6, "end") if node.kind == "input" else (spot.left + 6, "start")
    pen.text(x, (min(ys) + max(ys)) / 2 + 4, node.upper, size=11, fill="quiet", anchor=anchor, role="title")


def _passing(pen: Pen, spot: Spot) -> None:
    """Wires that go through, with a dot where an index is shared and kept."""
    met: set[tuple[int, int]] = set()
    for a, i, b, o in spot.node.passes:
        y0, y1 = spot.track(a, i), spot.track(b, o)
        pen.wire(b.tracks[o], [(spot.left, y0), (spot.right, y1)])
        if (id(b), o) in met and spot.node.kind not in ("copy", "merge"):
            pen.dot(spot.right, y1, b.tracks[o])
        met.add((id(b), o))


def _over(pen: Pen, spot: Spot) -> None:
    """Wires that pass over a glyph, with a dot where they meet before it, or part after it."""
    left, right = spot.edges
    for wire in crossings(spot.node, spot.places):
        (a, i), (b, o) = wire.ins[0], wire.outs[0]
        begin, end = (spot.left, spot.track(a, i)), (spot.right, spot.track(b, o))
        pen.wire(b.tracks[o], [begin, (left, wire.y), (right, wire.y), end])
        for a, i in wire.ins[1:]:
            pen.wire(a.tracks[i], [(spot.left, spot.track(a, i)), (left, wire.y)])
            pen.dot(left, wire.y, a.tracks[i])
        for b, o in wire.outs[1:]:
            pen.wire(b.tracks[o], [(right, wire.y), (spot.right, spot.track(b, o))])
            pen.dot(right, wire.y, b.tracks[o])


def _leads(pen: Pen, spot: Spot, left: float, right: float) -> None:
    """Wires that end at the glyph's left edge, or begin at its right edge."""
    for band in spot.node.ins:
        for n in spot.node.acted(band):
            y = spot.track(band, n)
            pen.wire(band.tracks[n], [(spot.left, y), (left, y)])
    for band in spot.node.outs:
        for n in spot.node.acted(band):
            y = spot.track(band, n)
            pen.wire(band.tracks[n], [(right, y), (spot.right, y)])


def _copy(pen: Pen, spot: Spot) -> None:
    if len(spot.node.outs) > 1:
        for band in spot.node.ins:
            for n, track in enumerate(band.tracks):
                pen.dot(spot.left, spot.track(band, n), track)


def _merge(pen: Pen, spot: Spot) -> None:
    for band in spot.node.outs:
        for n, track in enumerate(band.tracks):
            pen.dot(spot.right, spot.track(band, n), track)
    if spot.node.outs:
        y = min(spot.ys(band)[0] for band in spot.node.outs)
        if len(spot.node.label) < 2:
            pen.text(spot.right, y - 9, spot.node.label, size=17, font="label")
        else:  # a word stands over the label of the wire, where nothing bends
            pen.text(spot.right + 6, y - 24, spot.node.label, size=12, font="label", anchor="start")


def _contract(pen: Pen, spot: Spot) -> None:
    """First the arcs, over which what passes runs straight on; then its bends, and dots where an index is shared."""
    node = spot.node
    bend = spot.left + _arc_width(node)
    shared: dict[tuple[int, int], int] = {}
    for a, i, b, o in node.passes:
        y0, y1 = spot.track(a, i), spot.track(b, o)
        pen.wire(b.tracks[o], [(spot.left, y0), (bend, y0), (spot.right, y1)])
        shared[id(b), o] = shared.get((id(b), o), 0) + 1
    for band in node.outs:
        for n, track in enumerate(band.tracks):
            if shared.get((id(band), n), 0) > 1:
                pen.dot(spot.right, spot.track(band, n), track)
    apex = spot.left + 20.0
    paired: set[tuple[int, int]] = set()
    for (a, i), (b, j) in node.pairs:
        y0, y1 = sorted((spot.track(a, i), spot.track(b, j)))
        paired |= {(id(a), i), (id(b), j)}
        for offset in pen.lines(a.tracks[i]):
            _arc(pen, spot.left, apex + offset, y0 - offset, y1 + offset, a.tracks[i].wires[0])
        y = _free_height(spot, y0, y1)
        pen.path(f"M{number(apex)} {number(y)}H{number(apex + 9)}", "glyph")
        pen.path(f"M{number(apex + 8)} {number(y - 4)}L{number(apex + 16)} {number(y)}L{number(apex + 8)} {number(y + 4)}Z",
                 "glyph", fill="ink", width=0.5)
        if node.label:
            pen.text(apex + 18, y + 4, node.label, font="label", size=12, anchor="start")
    for band in (*node.ins, *node.outs):
        for n in node.acted(band):
            if (id(band), n) not in paired:
                y = spot.track(band, n)
                ends = (spot.left, apex) if band in node.ins else (bend, spot.right)
                pen.wire(band.tracks[n], [(ends[0], y), (ends[1], y)])


def _arc(pen: Pen, left: float, apex: float, y0: float, y1: float, wire: str) -> None:
    r = min(18.0, (y1 - y0) / 2)
    k = 0.45 * r  # of a quarter of a circle: its control points stand this far from the corner
    start, far, near = number(apex - r), number(apex), number(apex - k)
    top, low = number(y0), number(y1)
    d = (
        f"M{number(left)} {top}H{start}C{near} {top} {far} {number(y0 + k)} {far} {number(y0 + r)}"
        f"V{number(y1 - r)}C{far} {number(y1 - k)} {near} {low} {start} {low}H{number(left)}"
    )
    pen.add(Mark("path", "wire", wire=wire, d=d, stroke="ink", width=1.3))


def _arc_width(node: Node) -> float:
    return 40.0 + (width(node.label, 12) + 4 if node.label else 0)


def _free_height(spot: Spot, y0: float, y1: float) -> float:
    """A height between two, in a large gap between the wires that pass there, near the middle."""
    middle = (y0 + y1) / 2
    taken = sorted(sorted((spot.track(a, i), spot.track(b, o))) for a, i, b, o in spot.node.passes)
    if spot.node.kind in OVER:
        taken = sorted([wire.y, wire.y] for wire in crossings(spot.node, spot.places))
    gaps: list[tuple[float, float]] = []
    at = y0
    for low, high in taken:
        if low < y1 and high > y0:
            gaps.append((at, max(at, low)))
            at = max(at, high)
    gaps.append((at, max(at, y1)))
    low, high = max(gaps, key=lambda gap: (gap[1] - gap[0]) / 2 - 0.3 * abs(sum(gap) / 2 - middle))
    return (low + high) / 2


def _softmax(pen: Pen, spot: Spot) -> None:
    x = spot.middle
    _leads(pen, spot, x - 10, x + 8)
    ys = spot.heights(spot.node.ins)
    for y in ys:
        pen.path(f"M{number(x - 10)} {number(y)}L{number(x + 8)} {number(y - 10)}V{number(y + 10)}Z", "glyph", fill="paper")
    if ys:
        pen.text(x, max(ys) + 22, spot.node.label, size=10, font="title", fill="quiet")


def _norm(pen: Pen, spot: Spot) -> None:
    """A circle on the wire normalised over; where there are several, the others bend through it."""
    node, x, r = spot.node, spot.middle, 8.5
    acted = [(band, n) for band in node.ins for n in node.acted(band)]
    kinds = {name: wire.kind for name, wire in pen.circuit.wires.items()}
    home = next(((b, n) for b, n in acted if kinds[b.tracks[n].wires[0]] not in ("batch", "spatial", "position")), None)
    centre = spot.track(*(home or acted[0])) if acted else spot.all_heights[0]
    for bands, edge in ((node.ins, spot.left), (node.outs, spot.right)):
        for band in bands:
            for n in node.acted(band):
                y = spot.track(band, n)
                side = r if edge > x else -r
                if abs(y - centre) < 1:
                    pen.wire(band.tracks[n], sorted([(edge, y), (x + side, y)]))
                else:
                    at = (x + 0.4 * side, centre + (0.9 * r if y > centre else -0.9 * r))
                    pen.wire(band.tracks[n], sorted([(edge, y), (x + 2.2 * side, y), at]))
    pen.add(Mark("circle", "glyph", x=x, y=centre, r=r, stroke="ink", fill="norm", width=1.6))


def _extent(spot: Spot, pad: float) -> tuple[float, float]:
    """Vertical extent of what ends and begins here."""
    ys = spot.heights(spot.node.ins) + spot.heights(spot.node.outs) or spot.all_heights or [0.0]
    return min(ys) - pad, max(ys) + pad


def _linear(pen: Pen, spot: Spot) -> None:
    node = spot.node
    x, (left, right) = spot.middle, spot.edges
    _leads(pen, spot, left, right)
    low, high = _extent(spot, 13.0)
    fill = "linear" if node.kind == "linear" else "conv"
    pen.add(Mark("rect", "glyph", x=left, y=low, w=right - left, h=high - low, r=4, fill=fill))
    y = _free_height(spot, low, high)
    wide = width(node.upper, 11) if node.upper else 6 if node.lower else 0
    at = x - wide / 2 - 1
    pen.text(at, y + 7, node.label, font="strong", size=19)
    if node.upper:
        pen.text(at + 8, y - 1, node.upper, font="label", size=11, anchor="start")
    if node.lower:
        pen.text(at + 8, y + 10, node.lower, font="label", size=12, anchor="start")


def _elementwise(pen: Pen, spot: Spot) -> None:
    node = spot.node
    for band in node.ins:
        for n in node.acted(band):
            pen.wire(band.tracks[n], [(spot.left, spot.track(band, n)), (spot.middle, spot.track(band, n))])
    for band in node.outs:
        for n in node.acted(band):
            pen.wire(band.tracks[n], [(spot.middle, spot.track(band, n)), (spot.right, spot.track(band, n))])
    y = min(spot.all_heights, default=0.0)
    x = spot.middle
    if node.kind == "mask":
        top = y - 26
        pen.add(Mark("rect", "glyph", x=x - 7, y=top, w=14, h=14, stroke="ink", fill="paper", width=1))
        if node.label == "causal":  # the lower triangle is seen
            pen.path(f"M{number(x - 7)} {number(top)}L{number(x + 7)} {number(top + 14)}H{number(x - 7)}Z", "glyph",
                     stroke="", fill="quiet", width=0)
        else:
            pen.text(x, top + 11, "m", font="label", size=11)
        return
    half = width(node.label, 12, "title") / 2
    pen.text(x, y - 10, node.label, size=12, font="title")
    for at in (x - half - 12, x + half + 3):
        pen.path(f"M{number(at)} {number(y - 19)}L{number(at + 9)} {number(y - 14)}L{number(at)} {number(y - 9)}"
                 f"L{number(at + 3)} {number(y - 14)}Z", "glyph", fill="ink", width=0.3)


def _block(pen: Pen, spot: Spot) -> None:
    node = spot.node
    many = node.count > 1
    left, right = spot.edges
    _leads(pen, spot, left, right)
    low, high = _extent(spot, 16.0)
    passing = not any(node.acted(band) for band in (*node.ins, *node.outs))
    if passing:  # everything passes over it: the title stands above
        heights = [wire.y for wire in crossings(node, spot.places)]
        low, high = min(heights, default=0.0) - 34.0, max(heights, default=0.0) + 8.0
    elif high - low < 38:
        middle = (low + high) / 2
        low, high = middle - 19, middle + 19
    pen.path(f"M{number(left)} {number(low)}L{number(left + 5)} {number(low - 5)}H{number(right + 5)}"
             f"V{number(high - 5)}L{number(right)} {number(high)}V{number(low)}Z", "block", stroke="edge", fill="block",
             width=0.9)
    pen.add(Mark("rect", "block", id=node.block, x=left, y=low, w=right - left, h=high - low, stroke="edge",
                 fill="block", width=0.9))
    middle = low + 9 if passing else _free_height(spot, low, high)
    pen.text((left + right) / 2, middle + 4, node.label, size=12, font="title")
    if many:
        ys = spot.all_heights
        parentheses(pen, left - 10, right + 18, min([*ys, low]) - 18, max([*ys, high]) + 10, node.count)


def parentheses(pen: Pen, left: float | None, right: float | None, low: float, high: float, count: int) -> None:
    """Tall parentheses around what is repeated, with how often; None for a side that lies in another row."""
    for x, way in ((left, -1), (right, 1)):
        if x is None:
            continue
        pen.path(f"M{number(x)} {number(low)}Q{number(x + way * 10)} {number((low + high) / 2)} {number(x)} {number(high)}",
                 "bracket", width=2.2)
    if right is not None:
        pen.text(right + 2, low - 3, f"× {count}", font="label", size=14, anchor="middle", role="count")


def _bar(pen: Pen, spot: Spot) -> None:
    """Arrays joined: what they share meets first, then the bar. One taken apart: the bar, then what each gets of it."""
    node = spot.node
    joins = len(node.ins) > 1
    x = spot.right - 8 if joins else spot.left + 8
    meets: dict[tuple[int, int], int] = {}
    for a, i, b, o in node.passes:
        points = [(spot.left, spot.track(a, i)), (spot.right, spot.track(b, o))]
        turn = (spot.right - 18, points[1][1]) if joins else (spot.left + 18, points[0][1])
        pen.wire(b.tracks[o], [points[0], turn, points[1]])
        key, at = ((id(b), o), turn) if joins else ((id(a), i), turn)
        meets[key] = meets.get(key, 0) + 1
        if meets[key] == 2:
            pen.dot(at[0], at[1], b.tracks[o])
    for bands, end in ((node.ins, spot.left), (node.outs, spot.right)):
        for band in bands:
            for n in node.acted(band):
                y = spot.track(band, n)
                pen.wire(band.tracks[n], sorted([(end, y), (x, y)]))
    low, high = _extent(spot, 7.0)
    pen.path(f"M{number(x)} {number(low)}V{number(high)}", "glyph", width=4.5)


def _index(pen: Pen, spot: Spot) -> None:
    node = spot.node
    wide = 2 * _half(node)
    left = spot.middle - wide / 2
    _leads(pen, spot, left, left + wide + 5)
    for y in spot.heights(node.ins)[:1]:
        pen.path(f"M{number(left)} {number(y - 9)}H{number(left + wide - 4)}L{number(left + wide + 4)} {number(y)}"
                 f"L{number(left + wide - 4)} {number(y + 9)}H{number(left)}Z", "glyph", fill="accent", width=0.8)
        pen.text(left + wide / 2 - 1, y + 4, node.label, size=11, font="title", fill="paper")


def _flag(pen: Pen, spot: Spot) -> None:
    """Where an array is saved for later, or comes from a flag before."""
    x = spot.middle
    half = width(spot.node.label, 15) / 2 + 5
    _leads(pen, spot, x - half, x + half)
    low, high = _extent(spot, 10.0)
    pen.add(Mark("rect", "flag", x=x - half, y=low, w=2 * half, h=high - low, r=3, fill="flag"))
    pen.text(x, (low + high) / 2 + 5, spot.node.label, font="label", size=15, role="flag")


def _reduce(pen: Pen, spot: Spot) -> None:
    """A sign at the end of each wire that goes; of a long name, at the end of the first."""
    x, label = spot.middle, spot.node.label
    short = len(label) <= 6
    half = _half(spot.node)
    _leads(pen, spot, x - half, x + half)
    ends = [(band, n) for band in spot.node.ins for n in spot.node.acted(band)]
    for band, n in ends:
        y = spot.track(band, n)
        if short or (band, n) == ends[0]:
            pen.text(x, y + (5 if short else 4), label, size=15 if short else 12, font="label" if short else "title")
        else:
            pen.wire(band.tracks[n], [(x - half, y), (x + half, y)])
        pen.path(f"M{number(x + half)} {number(y - 4)}L{number(x + half + 8)} {number(y)}L{number(x + half)} {number(y + 4)}Z",
                 "glyph", fill="ink", width=0.4)


def _conv(pen: Pen, spot: Spot) -> None:
    node = spot.node
    x, (left, right) = spot.middle, spot.edges
    _leads(pen, spot, left, right)
    low, high = _extent(spot, 5.0)
    if high - low < 20:
        low, high = (low + high) / 2 - 12, (low + high) / 2 + 12
    pen.add(Mark("rect", "glyph", x=left, y=low, w=right - left, h=high - low, stroke="ink", fill="conv", width=2.2))
    y = _free_height(spot, low, high)
    pen.text(x, y + 4, node.label + node.lower, size=12, font="title")
    if node.upper:
        pen.text(right - 2, low + 10, node.upper, size=9, font="label", anchor="end")


def _box(pen: Pen, spot: Spot) -> None:
    node = spot.node
    x, (left, right) = spot.middle, spot.edges
    _leads(pen, spot, left, right)
    low, high = _extent(spot, 12.0)
    pen.add(Mark("rect", "glyph", x=left, y=low, w=right - left, h=high - low, r=2, stroke="ink", fill="paper", width=1.2))
    if node.kind == "opaque":
        _hatch(pen, left, low, right - left, high - low)
    y = _free_height(spot, low, high)
    wide = width(node.label, 12, "title") + 6
    if node.kind == "opaque":
        pen.add(Mark("rect", "glyph", x=x - wide / 2, y=y - 9, w=wide, h=18, fill="paper"))
    pen.text(x, y + 4, node.label, size=12, font="title")


def _hatch(pen: Pen, x: float, y: float, w: float, h: float) -> None:
    """Diagonal lines: nothing is known in here."""
    step = 7.0
    at = step
    d = ""
    while at < w + h:
        x0, y0 = (x + at, y) if at < w else (x + w, y + at - w)
        x1, y1 = (x, y + at) if at < h else (x + at - h, y + h)
        d += f"M{number(x0)} {number(y0)}L{number(x1)} {number(y1)}"
        at += step
    pen.path(d, "hatch", stroke="opaque", width=1.0)
