"""What is drawn: nodes (glyphs) joined by bands (arrays) of tracks (wires), before anything has a place.

A band is one array on its way from the node that made it to one node that reads it; its tracks are the wires of the
array. Which tracks pass a node and which end at it is read off the ops' axes by `reduce.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from circuitlab.circuit import Block

Occurrence = tuple[str, int, int]
"""(tensor, dimension, factor)."""


@dataclass(frozen=True)
class Track:
    """A line of a band: one occurrence of a wire, or two that are drawn as one (height and width)."""

    wires: tuple[str, ...]
    places: tuple[Occurrence, ...]


@dataclass(eq=False)
class Band:
    """An array between two nodes."""

    tensor: str
    tracks: list[Track]
    source: Node
    target: Node
    main: bool = True


@dataclass(eq=False)
class Node:
    """A glyph to be drawn.

    Attributes:
        kind: "input", "output", "copy", "linear", "contract", "elementwise", "merge" (two arrays into one, entry by
            entry), "mask", "softmax", "norm", "reduce", "conv", "pool", "embedding", "index", "bar" (split, cat),
            "box", "opaque" or "block", "save" and "load" (flags of a skip that is too long to draw).
        label: its text. upper, lower: its superscript and subscript; of an input or output, upper is its name as it is
            drawn: "" where there is only one.
        op, block: names of what it stands for. plates: names of the unfolded blocks around it, outermost first.
        ins, outs: bands, from top to bottom.
        passes: (in-band, track, out-band, track) that go through untouched.
        pairs: ((band, track), (band, track)) that are contracted with each other.
        count: how often it is repeated.
    """

    kind: str
    label: str = ""
    upper: str = ""
    lower: str = ""
    op: str = ""
    block: str = ""
    plates: tuple[str, ...] = ()
    ins: list[Band] = field(default_factory=list[Band])
    outs: list[Band] = field(default_factory=list[Band])
    passes: list[tuple[Band, int, Band, int]] = field(default_factory=list["tuple[Band, int, Band, int]"])
    pairs: list[tuple[tuple[Band, int], tuple[Band, int]]] = field(
        default_factory=list["tuple[tuple[Band, int], tuple[Band, int]]"]
    )
    count: int = 1

    def acted(self, band: Band) -> list[int]:
        """Numbers of the tracks of an in- or out-band that end or begin here."""
        passing = {track for a, track, _, _ in self.passes if a is band}
        passing |= {track for _, _, b, track in self.passes if b is band}
        return [number for number in range(len(band.tracks)) if number not in passing]


@dataclass
class Drawing:
    """Nodes in order, bands, and the plates (unfolded blocks) with how often each is repeated, and the signs of wires.

    ``routed`` are glyphs whose bands were led to them side by side, with those bands.
    """

    nodes: list[Node]
    bands: list[Band]
    plates: dict[str, tuple[Block, int]]
    foldable: dict[str, str]
    signs: dict[str, str]
    routed: list[tuple[Node, list[Band]]] = field(default_factory=list["tuple[Node, list[Band]]"])
