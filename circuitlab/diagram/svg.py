"""Scene -> SVG text: a dumb loop over the marks. `js/src/render.ts` is its twin, and writes the same text."""

from __future__ import annotations

import re

from circuitlab.diagram.scene import Mark, Scene
from circuitlab.diagram.theme import FONTS, tokens

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}
)


def render(scene: Scene, theme: str = "light") -> str:
    """Standalone SVG: presentation attributes, a viewBox, no script, nothing from elsewhere.

    Args:
        scene: what to draw.
        theme: "light", "dark" or "print".
    """
    colours = tokens(theme)
    width, height = _number(scene.width), _number(scene.height)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{_text(scene.title)}</title><desc>{_text(scene.description)}</desc>'
        f'<rect width="{width}" height="{height}" fill="{colours["paper"]}"/>'
    )
    return head + "".join(_mark(mark, colours) for mark in scene.marks) + "</svg>\n"


def _mark(mark: Mark, colours: dict[str, str]) -> str:
    names = {"data-role": mark.role}
    for name in ("wire", "op", "block"):
        if getattr(mark, name):
            names[f"data-{name}"] = getattr(mark, name)
    if mark.shape == "text":
        return f"<text{_attributes({**names, **_font(mark, colours)})}>{_text(mark.text)}</text>"
    paint = {
        "fill": colours[mark.fill] if mark.fill else "none",
        "stroke": colours[mark.stroke] if mark.stroke else "none",
    }
    if mark.stroke:
        paint["stroke-width"] = _number(mark.width)
    if mark.role == "wire" and not mark.dash:
        paint["stroke-linecap"] = "round"  # no gaps where a wire is drawn in pieces
    if mark.dash:
        paint["stroke-dasharray"] = " ".join(_number(length) for length in mark.dash)
    if mark.fill and mark.opacity != 1.0:
        paint["fill-opacity"] = _number(mark.opacity)
    if mark.shape == "path":
        return f"<path{_attributes({'d': mark.d, **names, **paint})}/>"
    place = {"x": mark.x, "y": mark.y, "width": mark.w, "height": mark.h, "rx": mark.r}
    if mark.shape == "circle":
        place = {"cx": mark.x, "cy": mark.y, "r": mark.r}
    return f"<{mark.shape}{_attributes({**{key: _number(v) for key, v in place.items()}, **names, **paint})}/>"


def _font(mark: Mark, colours: dict[str, str]) -> dict[str, str]:
    font = FONTS[mark.font or "title"]
    return {
        "x": _number(mark.x),
        "y": _number(mark.y),
        "font-family": font["family"],
        "font-size": _number(mark.size),
        "font-style": font["style"],
        "font-weight": font["weight"],
        "text-anchor": mark.anchor or "start",
        "fill": colours[mark.fill or "ink"],
    }


def _number(value: float) -> str:
    return f"{value + 0.0:.2f}".rstrip("0").rstrip(".")


def _attributes(values: dict[str, str]) -> str:
    return "".join(f' {name}="{_text(value)}"' for name, value in values.items())


def _text(value: str) -> str:
    """Text for XML: names of modules may hold anything."""
    return _FORBIDDEN.sub("\ufffd", value).translate(_ESCAPES)
