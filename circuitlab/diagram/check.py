"""A scene looks at itself: overlaps, wires through glyphs that do not use them, marks outside the picture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from circuitlab.diagram.metrics import width
from circuitlab.diagram.scene import Mark, Scene

_CELL = 64.0


class Box(NamedTuple):
    """Left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box, slack: float = 0.0) -> bool:
        """Whether two boxes share more than slack."""
        return (
            min(self.right, other.right) - max(self.left, other.left) > slack
            and min(self.bottom, other.bottom) - max(self.top, other.top) > slack
        )

    def touches(self, other: Box) -> bool:
        """Whether two boxes share a point."""
        return (
            self.left <= other.right
            and other.left <= self.right
            and self.top <= other.bottom
            and other.top <= self.bottom
        )


@dataclass(frozen=True)
class Findings:
    """What is wrong with a scene: each a sentence. crossings and bends are no faults, but fewer are better."""

    overlaps: tuple[str, ...]
    struck: tuple[str, ...]
    through: tuple[str, ...]
    outside: tuple[str, ...]
    crossings: int
    bends: int

    @property
    def ok(self) -> bool:
        """No label on another, no wire through a label or a foreign glyph, nothing outside the picture."""
        return not (self.overlaps or self.struck or self.through or self.outside)


class _Near:
    """Boxes found by where they are, so that looking takes time in proportion to the marks: a grid of square cells."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        self.cells: dict[tuple[int, int], list[int]] = {}
        for number, box in enumerate(boxes):
            for cell in _cells(box):
                self.cells.setdefault(cell, []).append(number)

    def near(self, box: Box, after: int = -1) -> list[int]:
        """The numbers of the boxes that touch a box, in order, those after a number only."""
        found = {number for cell in _cells(box) for number in self.cells.get(cell, ()) if number > after}
        return sorted(number for number in found if box.touches(self.boxes[number]))


def _cells(box: Box) -> Iterator[tuple[int, int]]:
    across = range(int(box.left // _CELL), int(box.right // _CELL) + 1)
    return itertools.product(across, range(int(box.top // _CELL), int(box.bottom // _CELL) + 1))


def look(scene: Scene) -> Findings:
    """Look at a scene as a reader does."""
    points = {id(mark): path_points(mark.d) for mark in scene.marks if mark.shape == "path"}
    texts = [(mark, text_box(mark)) for mark in scene.marks if mark.shape == "text" and mark.text.strip()]
    written = _Near([box for _, box in texts])
    wires = [(m, points[id(m)]) for m in scene.marks if m.shape == "path" and m.role == "wire" and len(points[id(m)])]
    lines = _Near([_bounds(line) for _, line in wires])
    solids = [m for m in scene.marks if m.shape == "rect" and m.role in ("glyph", "block", "flag") and m.fill]
    boxes = [(m, Box(m.x, m.y, m.x + m.w, m.y + m.h)) for m in solids]
    standing = _Near([box for _, box in boxes])
    brackets = [points[id(m)] for m in scene.marks if m.role == "bracket" and len(points[id(m)])]
    bent = _Near([_bounds(line) for line in brackets])
    layer = {id(mark): number for number, mark in enumerate(scene.marks)}
    overlaps = [
        f"{one.text!r} and {other.text!r} overlap at {box.left:.0f}, {box.top:.0f}"
        for n, (one, box) in enumerate(texts)
        for other, its in (texts[m] for m in written.near(box, n))
        if box.overlaps(its, 2.0) and not _one_label(one, other)
    ]
    overlaps += [
        f"{one.op or one.block!r} stands on {other.op or other.block!r} at {box.left:.0f}, {box.top:.0f}"
        for n, (one, box) in enumerate(boxes)
        for other, its in (boxes[m] for m in standing.near(box, n))
        if box.overlaps(its, 1.0) and (not one.op or one.op != other.op)
    ]
    overlaps += [
        f"{mark.text!r} stands on {other.op or other.block!r} at {box.left:.0f}, {box.top:.0f}"
        for mark, box in texts
        if mark.role in ("label", "title", "count")
        for other, its in (boxes[m] for m in standing.near(box))
        if box.overlaps(its, 2.0)
    ]
    struck = [
        f"a parenthesis runs through {mark.text!r} at {box.left:.0f}, {box.top:.0f}"
        for mark, box in texts
        if mark.role in ("title", "label")
        for m in bent.near(box)
        if _enters(brackets[m], Box(box.left + 1, box.top + 2, box.right - 1, box.bottom - 2))
    ]
    struck += [
        f"the wire {wire.wire!r} runs through the label {mark.text!r} at {box.left:.0f}, {box.top:.0f}"
        for mark, box in texts
        if mark.role == "label"
        for wire, line in (wires[m] for m in lines.near(box))
        if _enters(line, Box(box.left + 2, box.top + 3, box.right - 2, box.bottom - 3))
    ]
    through = [
        f"the wire {wire.wire!r} runs through {solid.op or solid.block!r}"
        for solid, box in boxes
        for wire, line in (wires[m] for m in lines.near(box))
        if layer[id(wire)] < layer[id(solid)]  # what passes over a glyph is painted over it
        and _enters(line, Box(solid.x + 2, solid.y + 2, solid.x + solid.w - 2, solid.y + solid.h - 2))
    ]
    outside = [
        f"{mark.role} {mark.text or mark.op or mark.wire!r} reaches outside the picture"
        for mark in scene.marks
        if not _inside(mark, points.get(id(mark)), scene)
    ]
    bends = sum(abs(line[0][1] - line[-1][1]) > 0.5 for _, line in wires)
    return Findings(tuple(overlaps), tuple(struck), tuple(through), tuple(outside), _crossings(wires, lines), bends)


def text_box(mark: Mark) -> Box:
    """Where a text is, from its measured width."""
    wide = width(mark.text, mark.size, mark.font)
    left = mark.x - {"middle": wide / 2, "end": wide}.get(mark.anchor, 0.0)
    high = 0.9 if "\u0304" in mark.text else 0.75  # an overbar
    return Box(left, mark.y - high * mark.size, left + wide, mark.y + 0.22 * mark.size)


def path_points(d: str) -> np.ndarray:
    """Points along a path, (n, 2): ends of straight lines, and 12 for each curve."""
    points: list[tuple[float, float]] = []
    x = y = 0.0
    for command, body in re.findall(r"([MLHVCQZ])([^MLHVCQZ]*)", d):
        values = [float(v) for v in body.split()]
        if command == "H":
            x = values[0]
        elif command == "V":
            y = values[0]
        elif command in "ML":
            x, y = values
        elif command == "C":
            x1, y1, x2, y2, x3, y3 = values
            for step in range(1, 12):
                t = step / 12
                a, b, c, e = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
                points.append((a * x + b * x1 + c * x2 + e * x3, a * y + b * y1 + c * y2 + e * y3))
            x, y = x3, y3
        elif command == "Q":
            x, y = values[2:]
        points.append((x, y))
    return np.array(points)


def _enters(points: np.ndarray, box: Box) -> bool:
    """Whether a polyline has a stretch inside a box: end points, or a long straight piece that crosses it."""
    if box.left >= box.right or box.top >= box.bottom or len(points) == 0:
        return False
    if not box.touches(_bounds(points)):
        return False
    steps = np.linspace(0.0, 1.0, 24)[:, None, None]
    dense = (points[:-1] * (1 - steps) + points[1:] * steps).reshape(-1, 2)
    inside = (dense[:, 0] > box.left) & (dense[:, 0] < box.right) & (dense[:, 1] > box.top) & (dense[:, 1] < box.bottom)
    return bool(inside.any())


def _one_label(one: Mark, other: Mark) -> bool:
    """The letter, subscript and size of one label, or a glyph's letter with its super- and subscript."""
    if one.role == other.role == "label":
        return one.wire == other.wire and abs(one.y - other.y) < 4
    return bool(one.op) and one.op == other.op


def _inside(mark: Mark, points: np.ndarray | None, scene: Scene) -> bool:
    if mark.shape == "text":
        box = text_box(mark)
    elif mark.shape == "rect":
        box = Box(mark.x, mark.y, mark.x + mark.w, mark.y + mark.h)
    elif mark.shape == "circle":
        box = Box(mark.x - mark.r, mark.y - mark.r, mark.x + mark.r, mark.y + mark.r)
    elif points is None or len(points) == 0:
        return True
    else:
        box = _bounds(points)
    return box.left >= -0.5 and box.top >= -0.5 and box.right <= scene.width + 0.5 and box.bottom <= scene.height + 0.5


def _bounds(points: np.ndarray) -> Box:
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return Box(left, top, right, bottom)


def _crossings(wires: list[tuple[Mark, np.ndarray]], lines: _Near) -> int:
    """How often wires cross: by the order of their heights where they run side by side."""
    count = 0
    for n, (_, one) in enumerate(wires):
        for m in lines.near(lines.boxes[n], n):
            other = wires[m][1]
            left, right = max(one[0][0], other[0][0]), min(one[-1][0], other[-1][0])
            if right - left < 1:
                continue
            a0, a1 = np.interp([left, right], one[:, 0], one[:, 1])
            b0, b1 = np.interp([left, right], other[:, 0], other[:, 1])
            count += int((a0 - b0) * (a1 - b1) < -0.5)
    return count
