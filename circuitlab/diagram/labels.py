"""Signs of wires in one drawing: a sign stands for one wire, so wires that would share one get subscripts."""

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
        name = track[0]
        if name in found:
            continue
        wire = wires[name]
        sign = wire.label
        if sign in taken:
            sign = next(other for other in _others(wire) if other not in taken)
        taken.add(sign)
        for each in track:
            found.setdefault(each, sign)
    return found


def _others(wire: Wire) -> Iterable[str]:
    base = wire.label.rstrip("₀₁₂₃₄₅₆₇₈₉")
    if wire.kind == "position":
        yield from (letter + BAR for letter in _LETTERS)
    for number in itertools.count(1 if wire.kind == "spatial" else 2):
        yield base + str(number).translate(_DIGITS)
