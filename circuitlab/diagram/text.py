"""Drawing -> lines of text: for terminals, screen readers and diffs."""

from __future__ import annotations

import math
import unicodedata

from circuitlab.circuit import Circuit
from circuitlab.diagram.drawing import Band, Drawing, Node, Track
from circuitlab.diagram.labels import BAR, block_title
from circuitlab.diagram.outputs import main_part
from circuitlab.diagram.reduce import Reducer

_SILENT = {"input", "output", "copy", "route"}


def render(circuit: Circuit, *, depth: int = 1, width: int = 100) -> str:
    """One line for each glyph: what it is, what it acts on, and over which wires it is broadcast.

    Args:
        circuit: what to write out.
        depth: levels of blocks to unfold; 0 is one line.
        width: lines are cut at this many characters.
    """
    part = main_part(circuit)
    drawing = Reducer(
        part.circuit, depth=depth, opened=frozenset(), closed=frozenset(), batch=True, hidden=part.hidden
    ).drawing()
    rows: list[tuple[str, str, str]] = []
    open_plates: tuple[str, ...] = ()
    for node in drawing.nodes:
        if node.kind in _SILENT:
            continue
        for level, name in enumerate(node.plates):
            if open_plates[: level + 1] != node.plates[: level + 1]:
                rows.append(("  " * level + _heading(drawing, name), "", ""))
                open_plates = node.plates[: level + 1]
        open_plates = node.plates
        rows.append(("  " * len(node.plates) + _label(node), _acts(drawing.signs, node), _passes(drawing.signs, node)))
    lines = _table(part.circuit, drawing, rows, width)
    lines += [f"  {note}" for note in part.notes]
    return "\n".join(lines) + "\n"


def _table(circuit: Circuit, drawing: Drawing, rows: list[tuple[str, str, str]], width: int) -> list[str]:
    ins = ", ".join(f"{n.label}: {_array(drawing.signs, n.outs[0])}" for n in drawing.nodes if n.kind == "input" and n.outs)
    outs = ", ".join(_array(drawing.signs, n.ins[0]) for n in drawing.nodes if n.kind == "output" and n.ins)
    first = max((_cells(row[0]) for row in rows), default=0)
    second = max((_cells(row[1]) for row in rows), default=0)
    lines = [f"{circuit.title}   {ins}  →  {outs}"]
    lines += [f"  {_padded(a, first)}  {_padded(b, second)}  {c}".rstrip() for a, b, c in rows]
    tracks = {t.wires: t for n in drawing.nodes for band in (*n.ins, *n.outs) for t in band.tracks}
    sizes: dict[str, int] = {}
    for track in tracks.values():
        for name in track.wires:
            sizes[name] = circuit.wires[name].size
        if _is_product(drawing.signs, track):
            sizes.update(dict.fromkeys(track.wires, math.prod(sizes[name] for name in track.wires)))
    legend = [f"{sign}={sizes[name]}" for name, sign in drawing.signs.items() if name in sizes]
    lines.append("  where " + ", ".join(dict.fromkeys(legend)))
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def _cells(text: str) -> int:
    """How wide a text is: the bar of x̄ is a character of its own, and takes no room."""
    return sum(not unicodedata.combining(sign) for sign in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _cells(text))


def _heading(drawing: Drawing, name: str) -> str:
    block, count = drawing.plates[name]
    return block_title(name, block.title) + (f" × {count}" if count > 1 else "")


def _label(node: Node) -> str:
    label = f"{node.label}{'^' + node.upper if node.upper else ''}{'_' + node.lower if node.lower else ''}"
    name = label or {"contract": "·", "merge": "+", "bar": "split / cat"}.get(node.kind, node.kind)
    if node.kind == "block":
        name = f"▣ {name}"
    return name + (f" × {node.count}" if node.count > 1 else "")


def _acts(signs: dict[str, str], node: Node) -> str:
    ins = [_wires(signs, band, node.acted(band)) for band in node.ins]
    outs = [_wires(signs, band, node.acted(band)) for band in node.outs]
    before, after = ", ".join(w for w in ins if w), ", ".join(w for w in outs if w)
    return f"{before or '·'} → {after or '·'}" if before or after else ""


def _passes(signs: dict[str, str], node: Node) -> str:
    seen: dict[str, None] = {}
    for _, _, band, track in node.passes:
        seen[_wires(signs, band, [track])] = None
    return f"over {' '.join(seen)}" if seen else ""


def _wires(signs: dict[str, str], band: Band, numbers: list[int]) -> str:
    tracks = [band.tracks[n] for n in numbers]
    return " ".join(signs[name] for t in tracks for name in (t.wires[:1] if _is_product(signs, t) else t.wires))


def _array(signs: dict[str, str], band: Band) -> str:
    """The wires of an array, in the order of its dimensions."""
    found = [
        (place[1:], signs[name])
        for track in band.tracks
        for n, (name, place) in enumerate(zip(track.wires, track.places, strict=True))
        if n == 0 or not _is_product(signs, track)
    ]
    return f"({' '.join(sign for _, sign in sorted(found))})"


def _is_product(signs: dict[str, str], track: Track) -> bool:
    """Whether the wires of a track are factors of one axis, and not positions in several directions."""
    return len(track.wires) > 1 and BAR not in signs[track.wires[0]]
