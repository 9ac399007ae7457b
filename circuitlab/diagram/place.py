"""Drawing -> places: a column for each node, a height for each band.

Columns are longest-path layers. The order of bands from top to bottom is that of a walk back from the outputs, longest
skips last, so that a series-parallel circuit is drawn without crossings and a skip runs beneath what it skips.
Crossings that the walk's order leaves are not searched for. Heights are found in `heights.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from circuitlab.diagram.heights import Box, Heights
from circuitlab.diagram.reduce import Band, Drawing, Node


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
    order: dict[int, int]
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
    """Find columns, order and heights, in one row."""
    column = _columns(drawing)
    last = max(column.values(), default=0)
    places = Places(column, _order(drawing, column), [])
    places.wrap(drawing, [(0, last)])
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
