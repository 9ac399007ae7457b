"""Signs of wires in one drawing, where each sign stands for one wire, and titles of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from circuitlab.circuit import Wire

BAR = "\u0304"
_DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_LETTERS = "xyzstu"


def labels(wires: Mapping[str, Wire], shown: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Sign of each wire.

    Args:
        wires: the circuit's.
        shown: the tracks in order of appearance; wires of one track (height and width) share a sign.

    Returns:
        wire name -> sign, e.g. "k" for the first wire of that label, "k₂" for the second; positions take other
        letters (x̄, ȳ), pixels subscripts (x̄₁ is x̄ at another resolution).
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for track in shown:
        sign = next((found[name] for name in track if name in found), "")
        if not sign:
            wire = wires[track[0]]
            sign = wire.label if wire.kind == "channel" else _base(wire)
            if sign in taken:
                sign = next(other for other in _others(wire) if other not in taken)
            taken.add(sign)
        for each in track:
            found.setdefault(each, sign)
    return found


def _base(wire: Wire) -> str:
    return wire.label.rstrip("₀₁₂₃₄₅₆₇₈₉") or wire.label


def _others(wire: Wire) -> Iterable[str]:
    base = _base(wire)
    if wire.kind == "position":
        yield from (letter + BAR for letter in _LETTERS)
    for number in itertools.count(1 if wire.kind == "spatial" else 2):
        yield base + str(number).translate(_DIGITS)


def block_title(name: str, title: str) -> str:
    """A module's name in its parent (with the list's name before a number) and its class; a function's name."""
    parts = name.rsplit("/", maxsplit=1)[-1].split("#", maxsplit=1)[0].split(".")
    last = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    return title if last == title or "/" in name or not last else f"{last}: {title}"
