"""The pen: collects marks, and knows how the recurring ones are drawn (lines, curves, labels with bars)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from circuitlab.circuit import Circuit
from circuitlab.diagram.drawing import Track
from circuitlab.diagram.labels import BAR
from circuitlab.diagram.metrics import width
from circuitlab.diagram.scene import Mark

_SUBSCRIPTS = {chr(0x2080 + digit): str(digit) for digit in range(10)}
LABEL = 14.0
LINE = 1.3


def number(value: float) -> str:
    """A coordinate in path data."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


class Pen:
    """Marks of a scene in the making."""

    def __init__(self, circuit: Circuit, signs: Mapping[str, str]) -> None:
        self.circuit = circuit
        self.signs = signs
        self.marks: list[Mark] = []
        self.plates: list[Mark] = []

    def add(self, mark: Mark) -> None:
        """One more mark, over the others."""
        self.marks.append(mark)

    def path(self, d: str, role: str, *, stroke: str = "ink", fill: str = "", width: float = LINE, **rest: object) -> None:
        """A path."""
        self.add(replace(Mark("path", role, d=d, stroke=stroke, fill=fill, width=width), **rest))  # type: ignore[arg-type]

    def lines(self, track: Track) -> tuple[float, ...]:
        """Offsets of the lines of a track: positions in more than one direction are a double line."""
        several = len(track.wires) > 1 and self.circuit.wires[track.wires[0]].kind in ("position", "spatial")
        return (-1.7, 1.7) if several else (0.0,)

    def wire(self, track: Track, points: Iterable[tuple[float, float]]) -> None:
        """A wire through points: horizontal between points of equal height, a flat S between others."""
        points = list(points)
        for offset in self.lines(track):
            x, y = points[0]
            d = f"M{number(x)} {number(y + offset)}"
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                if abs(y0 - y1) < 0.05:
                    d += f"H{number(x1)}"
                else:
                    middle = number((x0 + x1) / 2)
                    d += f"C{middle} {number(y0 + offset)} {middle} {number(y1 + offset)} {number(x1)} {number(y1 + offset)}"
            self.add(Mark("path", "wire", wire=track.wires[0], d=d, stroke="ink", width=LINE))

    def dot(self, x: float, y: float, track: Track) -> None:
        """A copy, or an index shared and kept."""
        self.add(Mark("circle", "dot", wire=track.wires[0], x=x, y=y, r=3.4, fill="ink"))

    def head(self, x: float, y: float) -> None:
        """An arrowhead: the wire goes on in the next row."""
        self.path(f"M{number(x)} {number(y - 3.5)}L{number(x + 8)} {number(y)}L{number(x)} {number(y + 3.5)}Z",
                  "arrow", fill="ink", width=0.3)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        role: str = "glyph",
        font: str = "title",
        size: float = 12.0,
        anchor: str = "middle",
        fill: str = "ink",
        **rest: object,
    ) -> None:
        """A text; y is its baseline."""
        mark = Mark("text", role, x=x, y=y, text=text, font=font, size=size, anchor=anchor, fill=fill)
        self.add(replace(mark, **rest))  # type: ignore[arg-type]

    # labels of wires ----------------------------------------------------------------------------------

    def label_width(self, track: Track, sized: bool) -> float:
        """Width of a track's label."""
        base, lower, tail = self._words(track, sized)
        return width(base, LABEL) + width(lower, LABEL * 0.7) + width(tail, LABEL * 0.86)

    def label(self, x: float, y: float, track: Track, sized: bool) -> None:
        """A wire's label just above its line, beginning at x."""
        base, lower, tail = self._words(track, sized)
        wire = self.circuit.wires[track.wires[0]]
        bold = len(self.lines(track)) > 1
        font = "strong" if bold else "label"
        lift = 5.0 + (1.5 if bold else 0.0)
        self.text(x, y - lift, base, role="label", font=font, size=LABEL, anchor="start", wire=wire.name)
        wide = width(base, LABEL, font)
        if BAR in self.signs[wire.name]:
            first = width(base[0], LABEL, font)
            top = y - lift - 9.5
            self.path(f"M{number(x + 1)} {number(top)}H{number(x + first - 0.5)}", "bar", width=1.0, wire=wire.name)
        if lower:
            self.text(x + wide, y - lift + 3, lower, role="label", font="label", size=LABEL * 0.7, anchor="start",
                      wire=wire.name)
            wide += width(lower, LABEL * 0.7)
        if tail:
            self.text(x + wide, y - lift, tail, role="label", font="label", size=LABEL * 0.86, anchor="start",
                      wire=wire.name)

    def _words(self, track: Track, sized: bool) -> tuple[str, str, str]:
        wire = self.circuit.wires[track.wires[0]]
        label = self.signs[wire.name].replace(BAR, "")
        lower = "".join(_SUBSCRIPTS[char] for char in label if char in _SUBSCRIPTS)
        base = "".join(char for char in label if char not in _SUBSCRIPTS)
        sizes = [self.circuit.wires[name].size for name in track.wires]
        size = "×".join(map(str, sizes)) if len(self.lines(track)) > 1 else str(math.prod(sizes))
        return base or "·", lower, f"={size}" if sized else ""
