"""Two drawings, one above the other, with what changed tinted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from circuitlab.circuit import Block, Circuit
from circuitlab.diagram.layout import draw, moved
from circuitlab.diagram.scene import Mark, Scene

_HEAD = 26.0
_GAP = 16.0
_SCALE = (("added", "added"), ("removed", "removed"), ("changed", "changed"))


def compare(
    before: Circuit, after: Circuit, kinds: tuple[Mapping[str, str], Mapping[str, str]], *, depth: int = 0, **options: Any
) -> Scene:
    """One scene of two circuits.

    Args:
        before, after: drawn above and below.
        kinds: of each circuit, name of a wire, op or block -> "added", "removed" or "changed".
        depth: levels of blocks to unfold in any case; blocks with changes inside are unfolded too.
        **options: of `circuitlab.diagram.layout.draw`.
    """
    marks: list[Mark] = []
    width, y = 0.0, 10.0
    scenes: list[Scene] = []
    for title, circuit, known in (("before", before, kinds[0]), ("after", after, kinds[1])):
        scene = draw(circuit, depth=max(depth, 1), open=_around(circuit, known), **options)
        marks.append(Mark("text", "title", x=14.0, y=y + 12, text=f"{title}: {circuit.title}", font="title", size=13,
                          anchor="start", fill="quiet"))
        shifted = [moved(mark, y + _HEAD) for mark in scene.marks]
        marks += [_tinted(replace(mark, id=f"{title} {mark.id}" if mark.id else ""), known) for mark in shifted]
        y += _HEAD + scene.height + _GAP
        width = max(width, scene.width)
        scenes.append(scene)
    x = 14.0
    for word, token in _SCALE:
        marks.append(Mark("rect", "legend", x=x, y=y, w=14, h=10, fill=token))
        marks.append(Mark("text", "legend", x=x + 20, y=y + 9, text=word, font="title", size=11, anchor="start", fill="quiet"))
        x += 90.0
    description = f"Before: {scenes[0].description} After: {scenes[1].description}"
    return Scene("", f"{before.title} and {after.title}", description, max(width, x), y + 20.0, tuple(marks))


def _around(circuit: Circuit, known: Mapping[str, str]) -> list[str]:
    """The blocks that hold something that changed."""
    found: list[str] = []

    def visit(block: Block) -> bool:
        inside = [
            visit(item) or item.name in known if isinstance(item, Block) else item in known for item in block.items
        ]
        if any(inside) and block.name:
            found.append(block.name)
        return any(inside)

    visit(circuit.root)
    return found


def _tinted(mark: Mark, known: Mapping[str, str]) -> Mark:
    name = next((n for n in _names(mark) if n in known), "")
    if not name:
        return mark
    if mark.role == "wire":
        return replace(mark, stroke=known[name], width=2.6)
    if mark.role in ("glyph", "block", "plate") and mark.shape != "text" and mark.fill not in ("", "ink"):
        return replace(mark, fill=known[name], opacity=0.75)
    if mark.role in ("glyph", "label", "title"):
        return replace(mark, fill=known[name] if mark.shape == "text" and not mark.wire else mark.fill)
    return mark


def _names(mark: Mark) -> Iterable[str]:
    return (name for name in (mark.op, mark.block, mark.wire) if name)
