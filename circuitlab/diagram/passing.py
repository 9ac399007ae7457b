"""Wires that pass over a glyph: straight over it, at one height; they bend, meet and part beside it."""

from __future__ import annotations

from dataclasses import dataclass

from circuitlab.diagram.drawing import Band, Node
from circuitlab.diagram.place import Places

OVER = frozenset({"block", "box", "opaque", "pool", "linear", "conv", "embedding", "index", "reduce", "softmax"})
"""Glyphs that what passes is seen to pass over."""

End = tuple[Band, int]


@dataclass(frozen=True)
class Crossing:
    """What passes a glyph as one wire: where it comes from, its height over the glyph, and where it goes."""

    ins: tuple[End, ...]
    outs: tuple[End, ...]
    y: float


def crossings(node: Node, places: Places) -> list[Crossing]:
    """The wires that pass over a glyph.

    Where several arrays share an index their wires meet before the glyph, and part after it. Between two heights the wire
    bends before the glyph, or after it, whichever leaves the glyph uncovered; if neither does, before.
    """
    row = places.row(node)

    def height(end: End) -> float:
        return places.y[id(end[0]), row][end[1]]

    acted = [height((band, n)) for band in (*node.ins, *node.outs) for n in node.acted(band)]
    low, high = min(acted, default=0.0) - 1.0, max(acted, default=0.0) + 1.0
    found: list[Crossing] = []
    for ins, outs in _classes(node):
        ends = [*outs, *ins] if len(ins) > 1 or len(outs) == 1 else [*ins, *outs]
        heights = [height(end) for end in ends]
        found.append(Crossing(tuple(ins), tuple(outs), next((y for y in heights if not low < y < high), heights[0])))
    return found


def _classes(node: Node) -> list[tuple[list[End], list[End]]]:
    """Ends at either side that are one wire."""
    found: list[tuple[list[End], list[End]]] = []
    for a, i, b, o in node.passes:
        mine = [pair for pair in found if (a, i) in pair[0] or (b, o) in pair[1]]
        ins = list(dict.fromkeys([*(end for pair in mine for end in pair[0]), (a, i)]))
        outs = list(dict.fromkeys([*(end for pair in mine for end in pair[1]), (b, o)]))
        found = [pair for pair in found if pair not in mine]
        found.append((ins, outs))
    return found


def curve(bend: float) -> float:
    """How wide a bend over so much height is."""
    return min(bend * 0.45, 64.0) + 14.0 if bend > 1 else 0.0


def room(node: Node, places: Places) -> tuple[float, float]:
    """Room for bends before and after a glyph that is passed over; none before heights are known."""
    if node.kind not in OVER or not places.y:
        return 0.0, 0.0
    row = places.row(node)
    before = after = 0.0
    for wire in crossings(node, places):
        before = max([before, *(curve(abs(places.y[id(b), row][n] - wire.y)) for b, n in wire.ins)])
        after = max([after, *(curve(abs(places.y[id(b), row][n] - wire.y)) for b, n in wire.outs)])
    return before, after
