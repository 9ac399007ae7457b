"""Circuit -> scene: reduce it, place it, and draw it, wrapped into rows like text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from circuitlab.circuit import Circuit
from circuitlab.diagram.glyphs import Spot, draw_node, node_width, parentheses
from circuitlab.diagram.metrics import width as text_width
from circuitlab.diagram.pen import Pen, number
from circuitlab.diagram.place import TRACK, Places, place
from circuitlab.diagram.reduce import Band, Drawing, Node, Reducer
from circuitlab.diagram.scene import Mark, Scene
from circuitlab.errors import InputError

_MARGIN = 14.0
_ROW_GAP = 34.0


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
) -> Scene:
    """Lay a circuit out.

    Args:
        circuit: what to draw.
        block: name of the block to draw, "" for all of it.
        depth: levels of blocks to unfold; 0 is one solid block.
        open, closed: names of blocks to unfold, or to fold, whatever the depth.
        batch: whether wires of kind "batch" are drawn.
        width: rows are wrapped at this many pixels.
        overlay: wire, op or block name -> a number, drawn as a tint from the smallest to the largest.

    Raises:
        InputError: an unknown block, a negative depth, or an overlay of things that are not there.
    """
    if depth < 0:
        raise InputError(f"depth={depth} is negative; 0 is one solid block")
    if width < 200:
        raise InputError(f"width={width} is too narrow for a diagram; give at least 200 pixels")
    names = {b.name for b in circuit.root.blocks()}
    for name in (*open, *closed):
        if name not in names:
            circuit.block(name)
    shown = circuit[block] if block else circuit
    reducer = Reducer(shown, depth=depth, opened=frozenset(open), closed=frozenset(closed), batch=batch)
    drawing = reducer.drawing()
    places = place(drawing)
    page = _Page(shown, drawing, places, width)
    page.draw()
    marks = page.pen.plates + page.pen.marks
    if overlay:
        marks = _tinted(marks, overlay, circuit)
    return Scene(
        block=block,
        title=shown.title,
        description=_describe(shown, drawing),
        width=round(page.width, 1),
        height=round(page.height, 1),
        marks=tuple(marks),
        foldable=drawing.foldable,
        notes=_notes(shown, marks),
    )


@dataclass
class _Row:
    """Some columns, side by side."""

    first: int
    last: int
    dy: float = 0.0
    height: float = 0.0


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

    def __post_init__(self) -> None:
        self.pen = Pen(self.circuit)
        self.by_column: list[list[Node]] = [[] for _ in range(self.places.columns)]
        for node in self.drawing.nodes:
            self.by_column[self.places.column[id(node)]].append(node)
        self.sized: set[tuple[int, int]] = set()
        self._choose_sizes()

    def draw(self) -> None:
        """Put the marks on paper."""
        rows = self._rows()
        y = _MARGIN
        for row in rows:
            low, high = self._extent(row)
            row.dy = y - low
            row.height = high - low
            y += row.height + _ROW_GAP
        self.height = max(y - _ROW_GAP + _MARGIN, 40.0)
        for row in rows:
            start = len(self.pen.marks), len(self.pen.plates)
            self._draw_row(row, rows)
            self.pen.marks[start[0] :] = [_moved(mark, row.dy) for mark in self.pen.marks[start[0] :]]
            self.pen.plates[start[1] :] = [_moved(mark, row.dy) for mark in self.pen.plates[start[1] :]]
        self.width = max((self.right[row.last] for row in rows), default=0.0) + _MARGIN + (22 if len(rows) > 1 else 8)

    # columns to rows ----------------------------------------------------------------------------------

    def _choose_sizes(self) -> None:
        """A wire's size is written where it first appears."""
        seen: set[str] = set()
        for band in sorted(self.drawing.bands, key=lambda b: (self.places.column[id(b.source)], self.places.order[id(b)])):
            for n, track in enumerate(band.tracks):
                if self._labelled(band, n) and track.wires[0] not in seen:
                    seen.add(track.wires[0])
                    self.sized.add((id(band), n))

    def _labelled(self, band: Band, n: int) -> bool:
        source = band.source
        if source.kind in ("input", "block"):
            return True
        if source.kind in ("merge", "linear", "embedding", "conv", "bar", "contract", "box", "opaque", "pool", "index"):
            return n in source.acted(band) or source.kind == "merge"
        return False

    def _gap_widths(self) -> list[float]:
        gaps = [16.0] * self.places.columns
        for band in self.drawing.bands:
            at = self.places.column[id(band.source)]
            for n, track in enumerate(band.tracks):
                if self._labelled(band, n):
                    need = self.pen.label_width(track, (id(band), n) in self.sized) + 12
                    gaps[at] = max(gaps[at], need)
        for name, (_, count) in self.drawing.plates.items():
            nodes = [n for n in self.drawing.nodes if name in n.plates]
            if nodes and count > 1:
                first = min(self.places.column[id(n)] for n in nodes)
                last = max(self.places.column[id(n)] for n in nodes)
                gaps[last] = max(gaps[last], 40.0)
                if first:
                    gaps[first - 1] += 26.0
        return gaps

    def _rows(self) -> list[_Row]:
        columns = self.places.columns
        wide = [max((node_width(n, self.places) for n in nodes), default=8.0) for nodes in self.by_column]
        wide[0] = max([wide[0]] + [text_width(n.label, 12, "title") * 0 for n in self.by_column[0]])
        gaps = self._gap_widths()
        rows: list[_Row] = []
        self.left, self.right = [0.0] * columns, [0.0] * columns
        at = 0
        while at < columns:
            lead = 30.0 if rows else 0.0
            end, best, x = at, at, _MARGIN + lead
            cost_best = float("inf")
            while end < columns:
                x += wide[end] + gaps[end]
                if x > self.limit and end > at:
                    break
                cost = self._break_cost(end) + (columns - 1 - end > 0) * 0.0
                full = (x - _MARGIN) / self.limit
                weight = cost + 3.0 * max(0.0, 0.75 - full) * 10
                if end == columns - 1:
                    weight = -1.0
                if weight <= cost_best:
                    best, cost_best = end, weight
                end += 1
            if end == at:
                best = at
            rows.append(_Row(at, best))
            x = _MARGIN + lead
            for column in range(at, best + 1):
                self.left[column] = x
                self.right[column] = x + wide[column]
                x += wide[column] + gaps[column]
            at = best + 1
        return rows

    def _break_cost(self, column: int) -> float:
        """Number of tracks that a break after this column cuts."""
        return sum(
            len(band.tracks)
            for band in self.drawing.bands
            if self.places.column[id(band.source)] <= column < self.places.column[id(band.target)]
        )

    def _extent(self, row: _Row) -> tuple[float, float]:
        ys: list[float] = []
        for node in self.drawing.nodes:
            if row.first <= self.places.column[id(node)] <= row.last and (node.ins or node.outs):
                ys += [self.places.top[id(node)], self.places.bottom[id(node)]]
                for plate in node.plates:
                    ys += [self.places.top[plate] - 4, self.places.bottom[plate] + 4]
        for band in self.drawing.bands:
            if self._crosses(band, row):
                ys += [self.places.y[id(band)] - 20, self.places.track_y(band, max(len(band.tracks) - 1, 0)) + 12]
        counted = any(c > 1 for _, c in self.drawing.plates.values()) or any(n.count > 1 for n in self.drawing.nodes)
        return min(ys, default=0.0) - (24 if counted else 0), max(ys, default=20.0) + (10 if counted else 0)

    def _crosses(self, band: Band, row: _Row) -> bool:
        return self.places.column[id(band.source)] <= row.last and self.places.column[id(band.target)] >= row.first

    # one row ------------------------------------------------------------------------------------------

    def _draw_row(self, row: _Row, rows: list[_Row]) -> None:
        for name in self.drawing.plates:
            self._plate(name, row)
        for band in self.drawing.bands:
            if self._crosses(band, row):
                self._band(band, row)
        for column in range(row.first, row.last + 1):
            for node in self.by_column[column]:
                draw_node(self.pen, Spot(node, self.left[column], self.right[column], self.places))
                if node.kind in ("input", "output"):
                    self._terminal(node, column)
        self._tuples(row)

    def _terminal(self, node: Node, column: int) -> None:
        several = sum(n.kind == node.kind for n in self.drawing.nodes) > 1
        bands = node.outs or node.ins
        if several and bands:
            y = self.places.y[id(bands[0])]
            out = node.kind == "output"
            x = self.right[column] if out else self.left[column]
            label = node.label if not out else node.label.rpartition(".")[2]
            self.pen.text(x, y - 22, label, size=11, font="title", fill="quiet",
                          anchor="end" if out else "start", role="title")

    def _band(self, band: Band, row: _Row) -> None:
        begin, end = self.places.column[id(band.source)], self.places.column[id(band.target)]
        starts_here, ends_here = begin >= row.first, end <= row.last
        x0 = self.right[begin] if starts_here else self.left[row.first] - 30
        x1 = self.left[end] if ends_here else self.right[row.last] + 22
        for n, track in enumerate(band.tracks):
            y = self.places.track_y(band, n)
            self.pen.wire(track, [(x0, y), (x1, y)])
            if starts_here and self._labelled(band, n):
                self.pen.label(x0 + 5, y, track, (id(band), n) in self.sized)
            if not starts_here:
                self.pen.label(x0 + 2, y, track, False)
            if not ends_here:
                self.pen.path(f"M{number(x1)} {number(y - 3.5)}L{number(x1 + 8)} {number(y)}L{number(x1)} {number(y + 3.5)}Z",
                              "arrow", fill="ink", width=0.3)

    def _tuples(self, row: _Row) -> None:
        """A dashed line between arrays that one operation takes together."""
        for node in self.drawing.nodes:
            end = self.places.column[id(node)]
            if not row.first <= end <= row.last or len(node.ins) < 2 or node.kind == "merge":
                continue
            bands = sorted(node.ins, key=lambda b: self.places.y[id(b)])
            for above, below in itertools.pairwise(bands):
                begin = max(self.places.column[id(above.source)], self.places.column[id(below.source)], row.first)
                between = [b for b in self.drawing.bands if self._crosses(b, row) and b not in (above, below)
                           and self.places.y[id(above)] < self.places.y[id(b)] < self.places.y[id(below)]
                           and self.places.column[id(b.source)] < end and self.places.column[id(b.target)] > begin]
                if between:
                    continue
                low = self.places.track_y(above, max(len(above.tracks) - 1, 0))
                y = (low + self.places.y[id(below)]) / 2 + 4
                gap = self.places.y[id(below)] - low
                y = low + min(gap / 2, 11.0)
                self.pen.path(f"M{number(self.right[begin])} {number(y)}H{number(self.left[end])}", "dash",
                              dash=(7.0, 5.0), width=1.5)

    def _plate(self, name: str, row: _Row) -> None:
        block, count = self.drawing.plates[name]
        nodes = [n for n in self.drawing.nodes if name in n.plates
                 and row.first <= self.places.column[id(n)] <= row.last]
        if not nodes:
            return
        first = min(self.places.column[id(n)] for n in nodes)
        last = max(self.places.column[id(n)] for n in nodes)
        level = nodes[0].plates.index(name)
        inset = 3.0 * level
        left, right = self.left[first] - 8 + inset, self.right[last] + 8 - inset
        top, bottom = self.places.top[name], self.places.bottom[name]
        colour = f"plate{level % 5}"
        self.pen.plates.append(Mark("rect", "plate", id=name, block=name, x=left, y=top, w=right - left, h=bottom - top,
                                    r=5, fill=colour, opacity=0.75))
        title = _plate_title(name, block.title)
        while title and text_width(title, 11, "title") > right - left - 8 and len(title) > 3:
            title = title[:-2].rstrip("…") + "…"
        self.pen.plates.append(Mark("text", "title", block=name, x=left + 5, y=top + 13, text=title, font="title",
                                    size=11, anchor="start", fill="ink"))
        if count > 1:
            bands = [b for b in self.drawing.bands if self.places.column[id(b.source)] <= last
                     and self.places.column[id(b.target)] >= first]
            ys = [self.places.track_y(b, n) for b in bands for n in range(len(b.tracks))]
            parentheses(self.pen, left - 8, right + 10, min([*ys, top]) - 4, max([*ys, bottom]) + 8, count)


def _plate_title(name: str, title: str) -> str:
    last = name.rsplit("/", maxsplit=1)[-1].split("#", maxsplit=1)[0].rpartition(".")[2]
    return title if last == title or "/" in name or not last else f"{last}: {title}"


def _moved(mark: Mark, dy: float) -> Mark:
    """The mark, lower by dy."""
    if mark.shape != "path":
        return replace(mark, x=round(mark.x, 2), y=round(mark.y + dy, 2), w=round(mark.w, 2), h=round(mark.h, 2))
    return replace(mark, d=_moved_path(mark.d, dy))


def _moved_path(d: str, dy: float) -> str:
    import re

    made: list[str] = []
    for command, body in re.findall(r"([MLHVCQAZ])([^MLHVCQAZ]*)", d):
        values = [float(v) for v in body.split()]
        if command == "V":
            values = [values[0] + dy]
        elif command in "MLCQ":
            values = [v + dy if n % 2 else v for n, v in enumerate(values)]
        made.append(command + " ".join(number(v) for v in values))
    return "".join(made)


# words ---------------------------------------------------------------------------------------------------


def _describe(circuit: Circuit, drawing: Drawing) -> str:
    """The drawing in words."""
    steps: list[str] = []
    for node in drawing.nodes:
        if node.kind in ("input", "output", "copy"):
            continue
        name = node.label or node.kind
        times = f" repeated {node.count} times" if node.count > 1 else ""
        steps.append(f"{node.kind} {name}{node.upper}{times}".replace("  ", " "))
    repeated = [f"{name} repeats {count} times" for name, (_, count) in drawing.plates.items() if count > 1]
    text = f"Neural circuit diagram of {circuit.title}: " + ", then ".join(steps[:40])
    return text + (". " + ", ".join(repeated) if repeated else "") + "."


def _notes(circuit: Circuit, marks: Iterable[Mark]) -> dict[str, tuple[str, ...]]:
    """Lines to show on hover, for what is in the drawing."""
    notes: dict[str, tuple[str, ...]] = {}
    parameters = {t.name: t for t in circuit.tensors if t.kind == "parameter"}
    for mark in marks:
        if mark.wire and mark.wire not in notes:
            wire = circuit.wires[mark.wire]
            state = "permutable" if wire.permutable else f"not permutable: {wire.why}"
            notes[mark.wire] = (f"wire {wire.name}", f"size {wire.size}", wire.origin, state)
        if mark.op and mark.op not in notes:
            op = circuit.op(mark.op)
            shapes = ", ".join("×".join(map(str, circuit.tensor(n).shape)) for n in op.outputs)
            held = [f"{n} {'×'.join(map(str, parameters[n].shape))}" for n in op.inputs if n in parameters]
            notes[mark.op] = (f"{op.fn} {op.name}", f"gives {shapes}", *held, op.source)
        if mark.block and mark.block not in notes:
            block = circuit.block(mark.block)
            count = sum(1 for _ in block.op_names())
            notes[mark.block] = (f"{block.title} {block.name}", f"{count} ops", block.source)
    return notes


def _tinted(marks: list[Mark], overlay: Mapping[str, float], circuit: Circuit) -> list[Mark]:
    known = set(circuit.wires) | {op.name for op in circuit.ops} | {b.name for b in circuit.root.blocks()}
    unknown = [name for name in overlay if name not in known]
    if unknown:
        raise InputError(f"overlay has {unknown[0]!r}, which is no wire, op or block of this circuit")
    values: dict[str, float] = {name: float(value) for name, value in overlay.items()}
    low, high = min(values.values()), max(values.values())
    made: list[Mark] = []
    for mark in marks:
        name = next((n for n in (mark.wire, mark.op, mark.block) if n in values), None)
        if name is not None and mark.role in ("wire", "glyph", "block", "plate"):
            share = (values[name] - low) / (high - low) if high > low else 1.0
            change: dict[str, Any] = {"opacity": round(0.25 + 0.75 * share, 3)}
            change |= {"stroke": "accent", "width": 1.3 + 2.2 * share} if mark.role == "wire" else {"fill": "accent"}
            if mark.role == "wire":
                change.pop("opacity")
            mark = replace(mark, **change)
        made.append(mark)
    return made


__all__ = ["TRACK", "draw"]
