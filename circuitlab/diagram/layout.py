"""Circuit -> scene: reduce it, place it, and draw it, wrapped into rows like text."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from circuitlab.circuit import Circuit
from circuitlab.diagram.drawing import Band, Drawing, Node
from circuitlab.diagram.flags import raise_flags
from circuitlab.diagram.glyphs import Spot, draw_node, node_width, parentheses
from circuitlab.diagram.labels import block_title
from circuitlab.diagram.metrics import width as text_width
from circuitlab.diagram.notes import describe, notes_of, tinted
from circuitlab.diagram.outputs import Shown, main_part
from circuitlab.diagram.pen import Pen, number
from circuitlab.diagram.place import Places, place
from circuitlab.diagram.reduce import Reducer
from circuitlab.diagram.scene import Mark, Scene
from circuitlab.errors import InputError

_MARGIN = 14.0
_ROW_GAP = 30.0
_LEAD = 34.0
_STRETCH = 1.2
"""A row may be this much wider than asked for if that saves a second one."""
_LONG = 8
"""Of a drawing of more rows than this, columns are shared out before heights are known: all heights in one row would
take time that grows faster than the drawing."""

_DATA = {"input", "block", "merge", "linear", "embedding", "conv", "bar", "contract", "box", "opaque", "pool", "index",
         "reduce", "load"}
"""Nodes after which the array is labelled: it is new."""


def draw(
    circuit: Circuit,
    *,
    block: str = "",
    depth: int = 1,
    open: Iterable[str] = (),
    closed: Iterable[str] = (),
    batch: bool = True,
    width: float = 1000.0,
    overlay: Mapping[str, float] | None = None,
    span: tuple[float, float] | None = None,
    outputs: Literal["main", "all"] = "main",
) -> Scene:
    """Lay a circuit out.

    Args:
        circuit: what to draw.
        block: name of the block to draw, "" for all of it.
        depth: levels of blocks to unfold; 0 is one solid block.
        open, closed: names of blocks to unfold, or to fold, whatever the depth.
        batch: whether wires of kind "batch" are drawn.
        width: rows are wrapped at about this many pixels.
        overlay: wire, op or block name -> a number, drawn as a tint from the smallest to the largest.
        span: the numbers of the lightest and the strongest tint; by default the smallest and the largest that are shown.
        outputs: "main" leaves out families of further outputs (caches, hidden states of every layer) and what leads
            to no output, and says so below the drawing; "all" draws them.

    Raises:
        InputError: an unknown block, a negative depth, or an overlay of things that are not there.
    """
    if depth < 0:
        raise InputError(f"depth={depth} is negative; 0 is one solid block")
    if width < 200:
        raise InputError(f"width={width} is too narrow for a diagram; give at least 200 pixels")
    opened, shut = frozenset(open), frozenset(closed)
    for name in (*opened, *shut):
        circuit.block(name)
    if outputs not in ("main", "all"):
        raise InputError(f"outputs={outputs!r} is neither 'main' nor 'all'")
    whole = circuit[block] if block else circuit
    part = main_part(whole) if outputs == "main" else Shown(whole)
    shown = part.circuit
    drawing = Reducer(shown, depth=depth, opened=opened, closed=shut, batch=batch, hidden=part.hidden).drawing()
    page = _Page(shown, drawing, place(drawing), width)
    long = page.long_bands()
    if long:
        raise_flags(drawing, long)
        page = _Page(shown, drawing, place(drawing), width)
    page.draw(part.notes)
    marks = page.pen.plates + page.pen.marks
    if overlay:
        marks = tinted(marks, overlay, span, circuit, page.height + 8)
        page.height += 20.0
    return Scene(
        block=block,
        title=shown.title,
        description=describe(shown, drawing),
        width=round(page.width, 1),
        height=round(page.height, 1),
        marks=tuple(marks),
        foldable=drawing.foldable,
        notes=notes_of(shown, marks),
    )


@dataclass
class _Row:
    """Some columns, side by side."""

    number: int
    first: int
    last: int
    dy: float = 0.0


@dataclass
class _Page:
    """The drawing on paper."""

    circuit: Circuit
    drawing: Drawing
    places: Places
    limit: float
    width: float = 0.0
    height: float = 0.0
    left: list[float] = field(default_factory=list[float])
    right: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])

    def __post_init__(self) -> None:
        self.pen = Pen(self.circuit, self.drawing.signs)
        self.column = self.places.column
        self.by_column = self._by_column()
        self.members: dict[str, list[Node]] = {name: [] for name in self.drawing.plates}
        for node in self.drawing.nodes:
            for name in node.plates:
                self.members[name].append(node)
        self.reach: dict[str, tuple[int, int]] = {}
        self.sized = self._sized()
        self.crossing: list[list[Band]] = []  # by row
        self.standing: list[list[Node]] = []
        self.inside: dict[tuple[str, int], list[Node]] = {}
        if sum(self._widths()) <= _LONG * self.limit:
            self.places.wrap(self.drawing, [(0, self.places.columns - 1)])

    def _by_column(self) -> list[list[Node]]:
        standing: list[list[Node]] = [[] for _ in range(self.places.columns)]
        for node in self.drawing.nodes:
            standing[self.column[id(node)]].append(node)
        return standing

    def draw(self, notes: tuple[str, ...] = ()) -> None:
        """Put the marks on paper, and notes below them."""
        rows = self._rows()
        self._sort(len(rows))
        y = _MARGIN
        for row in rows:
            low, high = self._extent(row)
            row.dy = y - low
            y += high - low + _ROW_GAP
        self.height = max(y - _ROW_GAP + _MARGIN, 40.0)
        for row in rows:
            marks, plates = len(self.pen.marks), len(self.pen.plates)
            self._draw_row(row)
            self.pen.marks[marks:] = [moved(mark, row.dy) for mark in self.pen.marks[marks:]]
            self.pen.plates[plates:] = [moved(mark, row.dy) for mark in self.pen.plates[plates:]]
        ends = [self.right[row.last] + (self.gaps[row.last] + 8.0 if row is not rows[-1] else 10.0) for row in rows]
        counts = [m.x + 22.0 for m in self.pen.marks if m.role in ("count", "title")]
        self.width = max([*ends, *counts, 40.0]) + _MARGIN
        for line in notes:
            self.pen.text(_MARGIN, self.height + 6, line, size=11, fill="quiet", anchor="start", role="note")
            self.height += 20.0
            self.width = max(self.width, text_width(line, 11, "title") + 2 * _MARGIN)

    def long_bands(self) -> list[Band]:
        """Arrays that would run through a whole row, from one before it to one after it."""
        starts = [first for first, _ in self._breaks(self._widths())]
        row = [bisect.bisect_right(starts, column) for column in range(self.places.columns)]
        return [b for b in self.drawing.bands if row[self.column[id(b.target)]] - row[self.column[id(b.source)]] > 1]

    # columns to rows ----------------------------------------------------------------------------------

    def _sized(self) -> set[tuple[int, int]]:
        """The tracks on which a wire's size is written: where it first appears."""
        seen: set[tuple[str, ...]] = set()
        found: set[tuple[int, int]] = set()
        for band in sorted(self.drawing.bands, key=lambda b: (self.column[id(b.source)], self.places.order[id(b)])):
            for n, track in enumerate(band.tracks):
                if self._labelled(band) and track.wires not in seen:
                    seen.add(track.wires)
                    found.add((id(band), n))
        return found

    def _labelled(self, band: Band) -> bool:
        branch = band.source.kind == "copy" and not band.main and band.target.kind == "block"
        return band.source.kind in _DATA or branch

    def _gap_widths(self) -> list[float]:
        """Room between columns, for labels and parentheses."""
        gaps = [14.0] * self.places.columns
        for band in self.drawing.bands:
            at = self.column[id(band.source)]
            for n, track in enumerate(band.tracks):
                if self._labelled(band):
                    gaps[at] = max(gaps[at], self.pen.label_width(track, (id(band), n) in self.sized) + 16
                                   + self._offset(band.source))
            if band.source.kind == "merge" and len(band.source.label) > 1:
                gaps[at] = max(gaps[at], text_width(band.source.label, 12, "label") + 14)
        for name, nodes in self.members.items():
            if nodes and self.drawing.plates[name][1] > 1:
                first, last = self._reach(name)
                gaps[last] = max(gaps[last], 42.0)
                if first:
                    gaps[first - 1] += 28.0
        return gaps

    def _offset(self, node: Node) -> float:
        """How far right of a node its labels begin: beside a plus sign, or a closing parenthesis."""
        closes = False
        for name in node.plates:
            if self.drawing.plates[name][1] > 1:
                closes |= self.column[id(node)] == self._reach(name)[1]
        return 32.0 if closes else 12.0 if node.kind == "merge" else 0.0

    def _reach(self, name: str) -> tuple[int, int]:
        """First and last column of a plate."""
        known = self.reach.get(name)
        if known is None:
            known = self.reach[name] = self._columns(self.members[name])
        return known

    def _columns(self, nodes: list[Node]) -> tuple[int, int]:
        at = [self.column[id(node)] for node in nodes]
        return min(at), max(at)

    def _rows(self) -> list[_Row]:
        if not self.places.y:
            self.places.wrap(self.drawing, self._breaks(self._widths()))
        breaks = self._breaks(self._widths())
        if len(breaks) > 1:
            breaks = self._late(breaks)
            self.reach.clear()
            self.places.wrap(self.drawing, breaks)
            self.by_column = self._by_column()
        wide = self._node_widths()
        rows = [_Row(number, first, last) for number, (first, last) in enumerate(breaks)]
        self.left, self.right = [0.0] * len(wide), [0.0] * len(wide)
        gaps = self.gaps = self._gap_widths()
        for row in rows[:-1]:
            gaps[row.last] = max(gaps[row.last], 36.0)  # room for the labels of what goes on
        for row in rows:
            x = _MARGIN + (_LEAD if row.first else 8.0) + self._begun(row.first)
            for column in range(row.first, row.last + 1):
                self.left[column], self.right[column] = x, x + wide[column]
                x += wide[column] + gaps[column]
        return rows

    def _begun(self, column: int) -> float:
        """Room before the first column of a row for the edges and parentheses of plates that begin there."""
        nodes = self.by_column[column]
        names = dict.fromkeys(name for node in nodes for name in node.plates)
        return max((self._room(name, [n for n in nodes if name in n.plates], column, 22.0) + self._own(name, column) for name in names), default=0.0)

    def _own(self, name: str, column: int) -> float:
        return 18.0 if self.drawing.plates[name][1] > 1 and self._reach(name)[0] == column else 0.0

    def _sort(self, rows: int) -> None:
        """What each row holds."""
        row_of = self.places.row_of
        self.crossing, self.standing, self.inside = [[] for _ in range(rows)], [[] for _ in range(rows)], {}
        for band in self.drawing.bands:
            for row in range(row_of[self.column[id(band.source)]], row_of[self.column[id(band.target)]] + 1):
                self.crossing[row].append(band)
        for node in self.drawing.nodes:
            row = row_of[self.column[id(node)]]
            self.standing[row].append(node)
            for name in node.plates:
                self.inside.setdefault((name, row), []).append(node)

    def _node_widths(self) -> list[float]:
        return [max((node_width(n, self.places) for n in nodes), default=8.0) for nodes in self.by_column]

    def _widths(self) -> list[float]:
        """Widths of columns with the gap that follows each."""
        return [node + gap for node, gap in zip(self._node_widths(), self._gap_widths(), strict=True)]

    def _breaks(self, wide: list[float]) -> list[tuple[int, int]]:
        """The rows that cut the fewest wires and are not too empty: first and last column of each."""
        total = len(wide)
        if sum(wide) <= self.limit * _STRETCH:
            return [(0, total - 1)]
        starts = [0.0, *itertools.accumulate(wide)]
        cut = self._cuts(total)
        best: list[tuple[float, int]] = [(0.0, 0)] + [(float("inf"), 0)] * total
        for stop in range(1, total + 1):
            for start in range(stop - 1, -1, -1):
                length = starts[stop] - starts[start]
                if length > self.limit * _STRETCH and start < stop - 1:
                    break
                full = length / self.limit
                strain = 30.0 * max(0.0, full - 1.0) + (0.0 if stop == total else 30.0 * max(0.0, 0.7 - full))
                cost = best[start][0] + strain + (0.0 if stop == total else 6.0 + cut[stop - 1])
                if cost < best[stop][0]:
                    best[stop] = (cost, start)
        rows: list[tuple[int, int]] = []
        stop = total
        while stop:
            start = best[stop][1]
            rows.insert(0, (start, stop - 1))
            stop = start
        return rows

    def _late(self, breaks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What begins a path at the end of a row begins the next instead, where it is used, in a column of its own."""
        late: dict[int, list[Node]] = {}
        for first, _ in breaks[1:]:
            nodes = self.by_column[first - 1]
            beginning = [node for node in nodes if not node.ins and node.outs]
            if beginning and len(beginning) < len(nodes):
                late[first] = beginning
        for key, at in list(self.column.items()):
            self.column[key] = at + sum(first <= at for first in late)
        for node in itertools.chain(*late.values()):
            self.column[id(node)] += 1
        return [(a + sum(new < a for new in late), b + sum(new <= b for new in late)) for a, b in breaks]

    def _cuts(self, total: int) -> list[float]:
        """How much a break after each column cuts: wires, and plates about them."""
        change = [0.0] * (total + 1)
        for band in self.drawing.bands:
            change[self.column[id(band.source)]] += max(len(band.tracks), 1)
            change[self.column[id(band.target)]] -= max(len(band.tracks), 1)
        for name, nodes in self.members.items():
            if nodes:
                first, last = self._reach(name)
                weight = 9.0 if self.drawing.plates[name][1] > 1 else 3.0
                change[first] += weight
                change[last] -= weight
        return list(itertools.accumulate(change[:total]))

    def _extent(self, row: _Row) -> tuple[float, float]:
        """Top and bottom of what is drawn in a row."""
        ys: list[float] = []
        counted = False
        nodes = self.standing[row.number]
        for name in (*map(id, nodes), *dict.fromkeys(name for node in nodes for name in node.plates)):
            top, bottom = self.places.top[name, row.number], self.places.bottom[name, row.number]
            if top < bottom:
                ys += [top, bottom]
        for column in range(row.first, row.last + 1):
            for node in self.by_column[column]:
                counted |= node.count > 1 or any(self.drawing.plates[name][1] > 1 for name in node.plates)
        for band in self.crossing[row.number]:
            low, high = self._span(band, row)
            ys += [low - 20, high + 10]
        return min(ys, default=0.0) - (26 if counted else 0), max(ys, default=20.0) + (10 if counted else 0)

    def _span(self, band: Band, row: _Row) -> tuple[float, float]:
        """Heights of a band's first and last track in a row; of a scalar, twice where it runs."""
        tracks = self.places.y[id(band), row.number]
        return tracks[0], tracks[-1]

    # one row ------------------------------------------------------------------------------------------

    def _draw_row(self, row: _Row) -> None:
        titles, counts = len(self.pen.plates), len(self.pen.marks)
        for name in self.drawing.plates:
            self._plate(name, row)
        self.pen.plates[titles:] = beside(self.pen.plates[titles:], [m for m in self.pen.marks[counts:] if m.role == "count"])
        for band in self.crossing[row.number]:
            self._band(band, row)
        for column in range(row.first, row.last + 1):
            for node in self.by_column[column]:
                draw_node(self.pen, Spot(node, self.left[column], self.right[column], self.places))
        self._tuples(row)

    def _band(self, band: Band, row: _Row) -> None:
        begin, end = self.column[id(band.source)], self.column[id(band.target)]
        starts_here, ends_here = begin >= row.first, end <= row.last
        x0 = self.right[begin] if starts_here else _MARGIN
        x1 = self.left[end] if ends_here else self.right[row.last] + self.gaps[row.last]
        if not band.tracks:
            y = self._span(band, row)[0]
            self.pen.path(f"M{number(x0)} {number(y)}H{number(x1)}", "scalar", stroke="quiet", dash=(1.5, 4.0))
        for n, (track, y) in enumerate(zip(band.tracks, self.places.y[id(band), row.number], strict=False)):
            self.pen.wire(track, [(x0, y), (x1, y)])
            if starts_here and self._labelled(band):
                self.pen.label(x0 + 5 + self._offset(band.source), y, track, (id(band), n) in self.sized)
            if not starts_here:
                self.pen.label(x0 + 2, y, track, False)
            if not ends_here:
                self.pen.head(x1, y)
                wide = self.pen.label_width(track, False)
                if starts_here and not self._labelled(band) and x1 - x0 > wide + 8:
                    self.pen.label(x1 - wide - 4, y, track, False)

    def _tuples(self, row: _Row) -> None:
        """A dashed line between arrays from where both are there to where one operation takes them together."""
        for node in self.standing[row.number]:
            end = self.column[id(node)]
            if len(node.ins) < 2:
                continue
            bands = sorted(node.ins, key=lambda b: self._span(b, row)[0])
            for above, below in itertools.pairwise(bands):
                older = above if self.column[id(above.source)] < self.column[id(below.source)] else below
                begin = self.column[id(older.source)]
                x0 = self.right[begin] if begin >= row.first else _MARGIN
                low, high = self._span(above, row)[1], self._span(below, row)[0]
                if high - low >= 20 and self.left[end] - x0 >= 24:
                    y = low + 8.0 if older is above else high - 22.0
                    quiet = node.kind == "merge"
                    self.pen.path(f"M{number(x0)} {number(y)}H{number(self.left[end])}", "dash",
                                  stroke="quiet" if quiet else "ink", dash=(7.0, 5.0), width=1.0 if quiet else 1.4)

    # plates -------------------------------------------------------------------------------------------

    def _box(self, name: str, row: _Row) -> tuple[float, float, float, float] | None:
        """Left, right, top and bottom of what a row holds of a plate."""
        inside = self.inside.get((name, row.number))
        if not inside:
            return None
        first, last = self._columns(inside)
        left = self.left[first] - 5 - self._room(name, inside, first, 22.0)
        words = [n.label for n in inside if n.kind == "merge" and len(n.label) > 1 and self.column[id(n)] == last]
        right = self.right[last] + 5 + self._room(name, inside, last, 30.0)
        right += max((text_width(word, 12, "label") + 4 for word in words), default=0.0)
        return left, right, self.places.top[name, row.number], self.places.bottom[name, row.number]

    def _room(self, name: str, nodes: list[Node], column: int, counted: float) -> float:
        """Room beside a plate's first or last column for the edges, and parentheses, of the plates within it."""
        inner = {p for n in nodes if self.column[id(n)] == column for p in n.plates[n.plates.index(name) + 1 :]}
        edges = [p for p in inner if column in self._reach(p)]
        return sum(counted if self.drawing.plates[p][1] > 1 else 3.0 for p in edges)

    def _plate(self, name: str, row: _Row) -> None:
        box = self._box(name, row)
        if box is None:
            return
        left, right, top, bottom = box
        block, count = self.drawing.plates[name]
        nodes = self.members[name]
        level = nodes[0].plates.index(name)
        shown = name if name in self.drawing.foldable else ""  # steps of a loop are no block
        self.pen.plates.append(Mark("rect", "plate", id=shown, block=shown, x=left, y=top, w=right - left, h=bottom - top,
                                    r=5, fill=f"plate{level % 5}", opacity=0.75))
        title = _shortened(block_title(name, block.title), right - left - 8)
        self.pen.plates.append(Mark("text", "title", block=shown, x=left + 5, y=top + 13, text=title, font="title",
                                    size=11, anchor="start", fill="ink"))
        if count < 2:
            return
        first, last = self._reach(name)
        own = set(map(id, nodes))
        bands = [b for b in self.crossing[row.number] if id(b.source) in own or id(b.target) in own]
        spans = [self._span(b, row) for b in bands]
        low, high = min([top, *(s[0] for s in spans)]) - 4, max([bottom, *(s[1] for s in spans)]) + 8
        parentheses(self.pen, left - 8 if row.first <= first else None, right + 10 if last <= row.last else None,
                    low, high, count)


def beside(plates: list[Mark], counts: list[Mark]) -> list[Mark]:
    """Plates and their titles, those titles moved right that would stand on how often something is repeated, or left out."""
    made: list[Mark] = []
    for plate, mark in zip([*plates[:1], *plates], plates, strict=False):  # a title follows its plate
        if mark.role == "title":
            ends = [m.x + text_width(m.text, m.size, "label") / 2 + 6 for m in counts if abs(m.y - mark.y) < 13
                    and m.x - text_width(m.text, m.size, "label") / 2 < mark.x + text_width(mark.text, mark.size, "title") and m.x > mark.x - 12]
            if ends:
                room = plate.x + plate.w - max(ends) - 4
                if room < 24:
                    continue
                mark = replace(mark, x=max(ends), text=_shortened(mark.text, room))
        made.append(mark)
    return made


def _shortened(title: str, room: float) -> str:
    if text_width(title, 11, "title") <= room:
        return title
    while len(title) > 1 and text_width(title + "…", 11, "title") > room:
        title = title[:-1]
    return title + "…"


def moved(mark: Mark, dy: float) -> Mark:
    """The mark, lower by dy."""
    if mark.shape != "path":
        return replace(mark, x=round(mark.x, 2), y=round(mark.y + dy, 2), w=round(mark.w, 2), h=round(mark.h, 2))
    moved: list[str] = []
    for command, body in re.findall(r"([MLHVCQZ])([^MLHVCQZ]*)", mark.d):
        values = [float(v) for v in body.split()]
        if command == "V":
            values = [values[0] + dy]
        elif command in "MLCQ":
            values = [v + dy if n % 2 else v for n, v in enumerate(values)]
        moved.append(command + " ".join(number(v) for v in values))
    return replace(mark, d="".join(moved))
