"""Colour tokens and fonts of the drawing. The values are in `theme.json`, which the browser's renderer reads too."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, cast

from circuitlab.errors import InputError

_DATA = cast("dict[str, Any]", json.loads(resources.files("circuitlab.diagram").joinpath("theme.json").read_text("utf-8")))

THEMES: dict[str, dict[str, str]] = _DATA["themes"]
"""Theme -> token -> CSS colour."""

FONTS: dict[str, dict[str, str]] = _DATA["fonts"]
"""Font of a mark -> family, style, weight."""


def tokens(theme: str) -> dict[str, str]:
    """Token name -> CSS colour for a theme: "light", "dark" or "print"."""
    if theme not in THEMES:
        raise InputError(f"there is no theme {theme!r}; there are {', '.join(THEMES)}")
    return THEMES[theme]
