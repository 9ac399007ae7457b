"""Skips too long to draw: a flag where the array is saved, ``→ C``, and one where it is used, ``C →``."""

from __future__ import annotations

from collections.abc import Sequence

from circuitlab.diagram.drawing import Band, Drawing, Node

_DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def raise_flags(drawing: Drawing, bands: Sequence[Band]) -> None:
    """Change the drawing: each of these bands ends at a flag, and goes on from another one.

    Bands of one array have one flag where it is saved. A band that ends at a sum is left: that is a residual stream,
    which is to be seen all the way.
    """
    bands = [band for band in bands if band.target.kind != "merge"]
    arrays = list(dict.fromkeys(band.tensor for band in bands))
    signs = {
        name: "C" + (str(number + 1).translate(_DIGITS) if len(arrays) > 1 else "") for number, name in enumerate(arrays)
    }
    saved: set[str] = set()
    for band in bands:
        source, sign = band.source, signs[band.tensor]
        source.outs.remove(band)
        if band.tensor in saved:
            source.passes = [(a, i, b, o) for a, i, b, o in source.passes if b is not band]
        else:
            saved.add(band.tensor)
            save = Node("save", label=f"→ {sign}", plates=source.plates)
            first = Band(band.tensor, band.tracks, source, save, main=band.main)
            source.outs.append(first)
            source.passes = [(a, i, first if b is band else b, o) for a, i, b, o in source.passes]
            save.ins = [first]
            drawing.bands.append(first)
            drawing.nodes.insert(drawing.nodes.index(source) + 1, save)
        load = Node("load", label=f"{sign} →", plates=band.target.plates, outs=[band])
        band.source = load
        drawing.nodes.insert(drawing.nodes.index(band.target), load)
