"""Colour tokens of the drawing: light, dark and print."""

from __future__ import annotations

from circuitlab.errors import InputError

TOKENS: dict[str, dict[str, str]] = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1a1a1a",
        "quiet": "#6b6b6b",
        "accent": "#1d62d6",
        "linear": "#dde7e3",
        "plate0": "#fdebd3",
        "plate1": "#dcd6ea",
        "plate2": "#fadfe0",
        "plate3": "#dcebf7",
        "plate4": "#eef2c4",
        "attention": "#cfc7e6",
        "norm": "#fadfe0",
        "conv": "#b9e4fb",
        "softmax": "#cfe8d0",
        "block": "#c9e3a8",
        "edge": "#3c5a1e",
        "opaque": "#b5b5b5",
    },
    "dark": {
        "paper": "#15181d",
        "ink": "#e8e8e8",
        "quiet": "#9aa0a8",
        "accent": "#79b0ff",
        "linear": "#2f4740",
        "plate0": "#40331f",
        "plate1": "#322d48",
        "plate2": "#47292b",
        "plate3": "#21384a",
        "plate4": "#3a3d1c",
        "attention": "#3d3560",
        "norm": "#4a2a2d",
        "conv": "#1c4a63",
        "softmax": "#24462a",
        "block": "#3c5524",
        "edge": "#a9cf7c",
        "opaque": "#5a5f66",
    },
}
TOKENS["print"] = {**TOKENS["light"], "ink": "#000000", "quiet": "#444444"}


def tokens(theme: str) -> dict[str, str]:
    """Token name -> CSS colour for a theme: "light", "dark" or "print"."""
    if theme not in TOKENS:
        raise InputError(f"no theme {theme!r}; there are {', '.join(TOKENS)}")
    return TOKENS[theme]
