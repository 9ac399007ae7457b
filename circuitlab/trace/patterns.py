"""Letters of einops patterns for the axes of a circuit's arrays."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field

from circuitlab.circuit import Circuit


@dataclass(eq=False)
class Id:
    """One axis of one array, followed through re-indexing. new: it is not of the array, which is repeated along it."""

    wire: str
    new: bool = False


@dataclass
class View:
    """An array seen with its axes in another order: nothing has been computed yet.

    Attributes:
        base: key of the array.
        start: its own dimensions, each a list of axes.
        dims: the dimensions it is seen with.
    """

    base: str
    start: list[list[Id]]
    dims: list[list[Id]]

    def is_plain(self) -> bool:
        """Whether it is seen as it is."""
        return [[id(i) for i in dim] for dim in self.start] == [[id(i) for i in dim] for dim in self.dims]

    def is_single(self) -> bool:
        """Whether each dimension of the array itself is one axis, and none was added."""
        return all(len(dim) == 1 for dim in self.start) and not any(i.new for dim in self.dims for i in dim)


@dataclass
class Letters:
    """Different letters for different axes, after the labels of their wires."""

    circuit: Circuit
    taken: dict[int, str] = field(default_factory=dict[int, str])

    def of(self, axis: object, wire: str = "") -> str:
        """The letter of an axis."""
        known = self.taken.get(id(axis))
        if known is None:
            word = ascii_of(self.circuit.wires[wire or axis.wire].label)  # pyright: ignore[reportAttributeAccessIssue]
            known, count = word, 1
            while known in self.taken.values():
                count += 1
                known = f"{word}{count}"
            self.taken[id(axis)] = known
        return known

    def pattern(self, dims: list[list[Id]]) -> str:
        """One side of a pattern: ``b x (h k)``."""
        sides = [" ".join(self.of(i) for i in dim) for dim in dims]
        return " ".join("1" if not side else f"({side})" if " " in side else side for side in sides)


def ascii_of(label: str) -> str:
    """A label as a Python name: x for x̄, c1 for c₁."""
    plain = unicodedata.normalize("NFKD", label)
    word = "".join(sign for sign in plain if sign.isascii() and sign.isalnum())
    return word if word[:1].isalpha() else f"n{word}"


def product_of(sizes: list[int]) -> int:
    """Of sizes; 1 for none."""
    return math.prod(sizes)
