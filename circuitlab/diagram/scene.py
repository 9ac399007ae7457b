"""The scene: a drawing as a flat list of positioned marks, and nothing left to decide.

`svg.py` here and `render.ts` in the browser are both dumb loops over the same marks, tested on the same golden scenes,
so that they cannot drift. Lengths are pixels, y runs downwards, later marks lie over earlier ones. Colours are names
of tokens (`theme.py`), never values.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from circuitlab.errors import FileFormatError

SCENE_VERSION = 1

Shape = Literal["path", "rect", "circle", "text"]


@dataclass(frozen=True)
class Mark:
    """One mark.

    Attributes:
        shape: "path" (uses d), "rect" (x, y, w, h, r: corner radius), "circle" (x, y, r) or "text" (x, y: baseline).
        role: what it means: "wire", "label", "plate", "block", "glyph", "dash", "bracket", "title", "dot", "flag", "legend",
            "hit" (an invisible, clickable area) ...
        id: unique in the scene where the mark can be pointed at, else "".
        wire, op, block: names in the circuit of what it stands for, else "".
        d: path data, absolute commands M L H V C Q A Z only.
        text: the text; plain, never markup.
        font: "label" (italic serif), "strong" (bold serif), "title" (sans), "mono".
        size: font size. anchor: "start", "middle" or "end".
        stroke, fill: token names, "" for none. width: stroke width. dash: lengths, () for solid. opacity: of the fill.
    """

    shape: Shape
    role: str
    id: str = ""
    wire: str = ""
    op: str = ""
    block: str = ""
    d: str = ""
    x: float = 0.0
    y: float = 0.0
    w: float = 0.0
    h: float = 0.0
    r: float = 0.0
    text: str = ""
    font: str = ""
    size: float = 0.0
    anchor: str = ""
    stroke: str = ""
    fill: str = ""
    width: float = 0.0
    dash: tuple[float, ...] = ()
    opacity: float = 1.0


_DEFAULTS = {name: f.default for name, f in Mark.__dataclass_fields__.items()}


@dataclass(frozen=True)
class Scene:
    """A drawing.

    Attributes:
        block: name of the block that is drawn ("" for the whole circuit).
        title: its title.
        description: the drawing in words, for screen readers.
        width, height: the bounds of all marks; marks lie within (0, 0, width, height).
        marks: in painting order.
        foldable: names of blocks drawn unfolded, or folded and able to unfold -> "open" or "closed".
        notes: name of a wire, op or block -> lines to show on hover (name, shape, source, parameters).
    """

    block: str
    title: str
    description: str
    width: float
    height: float
    marks: tuple[Mark, ...]
    foldable: dict[str, str] = field(default_factory=dict[str, str])
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; fields of marks that have their default are left out."""
        return {
            "version": SCENE_VERSION,
            "block": self.block,
            "title": self.title,
            "description": self.description,
            "width": self.width,
            "height": self.height,
            "marks": [_mark_dict(mark) for mark in self.marks],
            "foldable": dict(self.foldable),
            "notes": {key: list(lines) for key, lines in self.notes.items()},
        }

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Scene:
        """Read what `to_dict` gave. A broken or newer scene is a `FileFormatError`."""
        if data.get("version") != SCENE_VERSION:
            raise FileFormatError(
                f"this scene has version {data.get('version')!r}, and this circuitlab reads version {SCENE_VERSION}"
            )
        try:
            marks = tuple(
                Mark(**{**mark, "dash": tuple(mark.get("dash", ()))})
                for mark in cast("list[dict[str, Any]]", data["marks"])
            )
            notes = {key: tuple(lines) for key, lines in data["notes"].items()}
            return Scene(
                data["block"],
                data["title"],
                data["description"],
                data["width"],
                data["height"],
                marks,
                dict(data["foldable"]),
                notes,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"this scene is broken ({type(error).__name__}: {error})") from None


def _mark_dict(mark: Mark) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(mark, name)
        if name in ("shape", "role") or value != default:
            if isinstance(value, float):
                value = round(value, 2)
            data[name] = list(value) if isinstance(value, tuple) else value
    return data
