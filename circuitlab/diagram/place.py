"""Drawing -> places: a column for each node, a height for each band.

Columns are longest-path layers. The order of bands from top to bottom is that of a walk back from the outputs, longest
skips last, so that a series-parallel circuit is drawn without crossings and a skip runs beneath what it skips.
Crossings that the walk's order leaves are not searched for. Heights are found in `heights.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from circuitlab.diagram.heights import Heights
from circuitlab.diagram.reduce import Band, Drawing, Node


@dataclass
class Places:
    """Where everything stands.

    Attributes:
        column: id of a node -> its column.
        y: id of a band -> heights of its tracks.
        top, bottom: id of a node or name of a plate -> its extent.
        order: id of a band -> its number from top to bottom.
        columns: number of columns.
    """

    column: dict[int, int]
    order: dict[int, int]
    columns: int
    y: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    top: dict[int | str, float] = field(default_factory=dict["int | str", float])
    bottom: dict[int | str, float] = field(default_factory=dict["int | str", float])

    def span(self, band: Band) -> tuple[float, float]:
        """Heights of a band's first and last track; of a scalar, twice where it runs."""
        return self.y[id(band)][0], self.y[id(band)][-1]

    def track_y(self, band: Band, number: int) -> float:
        """Height of a track."""
        return self.y[id(band)][number]


def place(drawing: Drawing) -> Places:
    """Find columns, order and heights."""
    column = _columns(drawing)
    places = Places(column, _order(drawing, column), max(column.values(), default=0) + 1)
    places.y, places.top, places.bottom = Heights(drawing, column, places.order).solve()
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
