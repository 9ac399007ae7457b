"""Scene -> SVG text: a dumb loop over the marks. `js/src/render.ts` is its twin."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, quoteattr

from circuitlab.diagram.scene import Mark, Scene
from circuitlab.diagram.theme import tokens

FONTS = {
    "label": ("STIX Two Text, Latin Modern Roman, Georgia, DejaVu Serif, serif", "italic", "normal"),
    "strong": ("STIX Two Text, Latin Modern Roman, Georgia, DejaVu Serif, serif", "normal", "bold"),
    "title": ("Inter, Helvetica, Arial, DejaVu Sans, sans-serif", "normal", "normal"),
    "mono": ("DejaVu Sans Mono, Menlo, monospace", "normal", "normal"),
}
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def render(scene: Scene, theme: str = "light") -> str:
    """Standalone SVG: presentation attributes, a viewBox, no script, nothing from elsewhere.

    Args:
        scene: what to draw.
        theme: "light", "dark" or "print".
    """
    colours = tokens(theme)
    size = f"{scene.width:g} {scene.height:g}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{scene.width:g}" '
        f'height="{scene.height:g}" role="img">'
        f"<title>{_text(scene.title)}</title><desc>{_text(scene.description)}</desc>"
        f'<rect width="{scene.width:g}" height="{scene.height:g}" fill="{colours["paper"]}"/>'
    )
    return head + "".join(_mark(mark, colours) for mark in scene.marks) + "</svg>\n"


def _mark(mark: Mark, colours: dict[str, str]) -> str:
    attributes: dict[str, str] = {"data-role": mark.role}
    for name in ("wire", "op", "block"):
        if getattr(mark, name):
            attributes[f"data-{name}"] = getattr(mark, name)
    if mark.shape == "text":
        family, style, weight = FONTS[mark.font or "title"]
        attributes |= {
            "x": f"{mark.x:g}", "y": f"{mark.y:g}", "font-family": family, "font-size": f"{mark.size:g}",
            "font-style": style, "font-weight": weight, "text-anchor": mark.anchor or "start",
            "fill": colours[mark.fill or "ink"],
        }
        return f"<text{_attributes(attributes)}>{_text(mark.text)}</text>"
    attributes |= {
        "fill": colours[mark.fill] if mark.fill else "none",
        "stroke": colours[mark.stroke] if mark.stroke else "none",
    }
    if mark.stroke:
        attributes["stroke-width"] = f"{mark.width:g}"
    if mark.dash:
        attributes["stroke-dasharray"] = " ".join(f"{length:g}" for length in mark.dash)
    if mark.fill and mark.opacity != 1.0:
        attributes["fill-opacity"] = f"{mark.opacity:g}"
    if mark.shape == "path":
        return f"<path{_attributes({'d': mark.d} | attributes)}/>"
    if mark.shape == "circle":
        return f"<circle{_attributes({'cx': f'{mark.x:g}', 'cy': f'{mark.y:g}', 'r': f'{mark.r:g}'} | attributes)}/>"
    box = {"x": f"{mark.x:g}", "y": f"{mark.y:g}", "width": f"{mark.w:g}", "height": f"{mark.h:g}", "rx": f"{mark.r:g}"}
    return f"<rect{_attributes(box | attributes)}/>"


def _attributes(values: dict[str, str]) -> str:
    return "".join(f" {name}={quoteattr(_FORBIDDEN.sub('�', value))}" for name, value in values.items())


def _text(value: str) -> str:
    """Text for XML: names of modules may hold anything."""
    return escape(_FORBIDDEN.sub("�", value))
