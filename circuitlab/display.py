"""What a circuit looks like outside: the mimebundle of a notebook, SVG and text, and files by suffix."""

from __future__ import annotations

import html as html_text
import io
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from circuitlab.circuit import Circuit
from circuitlab.diagram import text as text_diagram
from circuitlab.diagram.compare import compare
from circuitlab.diagram.layout import draw
from circuitlab.diagram.scene import Scene
from circuitlab.diagram.svg import render
from circuitlab.diagram.theme import tokens
from circuitlab.diff import Diff
from circuitlab.errors import InputError

MIME = "application/vnd.circuitlab.v1+json"
"""The scene type: rendered by the JupyterLab extension, kept in the notebook file."""

VIEW_MIME = "application/vnd.circuitlab.view.v1+json"
"""The same, of a live view: the extension shows it where the widget has no kernel."""

DOCUMENT_VERSION = 1
_MOST_MARKS = 8_000


def svg(
    circuit: Circuit,
    *,
    depth: int = 1,
    theme: Literal["light", "dark", "print"] = "light",
    block: str = "",
    open: Iterable[str] = (),
    closed: Iterable[str] = (),
    batch: bool = True,
    width: float = 1000.0,
    overlay: Mapping[str, float] | None = None,
    span: tuple[float, float] | None = None,
    outputs: Literal["main", "all"] = "main",
) -> str:
    """The drawing as standalone SVG text.

    Args:
        circuit: what to draw.
        depth: levels of blocks to unfold; 0 is one solid block.
        theme: "light", "dark" or "print".
        block: name of the block to draw, "" for all of it.
        open, closed: names of blocks to unfold or to fold, whatever the depth.
        batch: whether the batch wire is drawn.
        width: rows wrap at this many pixels.
        overlay: wire, op or block name -> a number that is drawn as a tint.
        span: the numbers of the lightest and the strongest tint; by default the smallest and the largest that are shown.
        outputs: "main" leaves out families of further outputs, such as caches of every layer; "all" draws them.
    """
    scene = draw(
        circuit, block=block, depth=depth, open=open, closed=closed, batch=batch, width=width, overlay=overlay, span=span,
        outputs=outputs,
    )
    return render(scene, theme)


def diff_svg(diff: Diff, *, theme: Literal["light", "dark", "print"] = "light", **options: Any) -> str:
    """Two drawings, what changed tinted: green what was added, red what was removed, amber what is otherwise.

    Args:
        diff: of two circuits.
        theme: "light", "dark" or "print".
        **options: ``depth``, ``batch``, ``width`` and ``outputs`` as of `svg`. Blocks with changes inside are unfolded.
    """
    kinds: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for change in diff.changes:
        if change.what in ("op", "block", "wire"):
            for names, name in zip(kinds, (change.before, change.after), strict=True):
                if name:
                    names[name] = change.kind
    return render(compare(diff.before, diff.after, kinds, **options), theme)


def text(circuit: Circuit, *, depth: int = 1, width: int = 100) -> str:
    """The drawing as lines of text."""
    return text_diagram.render(circuit, depth=depth, width=width)


def scenes(circuit: Circuit, *, batch: bool = True, **options: Any) -> dict[str, Scene]:
    """The drawing, and one for each distinct block that can be drilled into from it; by the block's name.

    Repeated blocks are drawn once, so there are few; past 8,000 marks no more are added. Of the options of `svg`,
    ``batch`` is for all scenes, the others are for the first.
    """
    found: dict[str, Scene] = {}
    pending = [circuit.root.name]
    while pending and sum(len(scene.marks) for scene in found.values()) < _MOST_MARKS:
        name = pending.pop(0)
        if name in found:
            continue
        scene = draw(circuit, block=name, batch=batch, **(options if name == circuit.root.name else {}))
        found[name] = scene
        pending.extend(key for key, state in scene.foldable.items() if state == "closed" and key != name)
    return found


def document(found: Mapping[str, Scene]) -> dict[str, Any]:
    """Scenes as plain JSON data. A reader without a kernel opens a folded block by going to its scene."""
    return {
        "version": DOCUMENT_VERSION,
        "root": next(iter(found)),
        "scenes": {name: scene.to_dict() for name, scene in found.items()},
    }


def mimebundle(circuit: Circuit, *, mime: str = MIME, depth: int = 1, **options: Any) -> dict[str, Any]:
    """What a notebook keeps: the scene type, an SVG for readers without the extension, and text."""
    found = scenes(circuit, depth=depth, **options)
    return {
        mime: document(found),
        "image/svg+xml": render(found[circuit.root.name]),
        "text/plain": text(circuit, depth=depth),
    }


def html(circuit: Circuit, *, depth: int = 1, theme: str = "auto", batch: bool = True) -> str:
    """A page of its own with the drawing, without script: light and dark follow the reader's system.

    Blocks that are folded in the first picture are drawn below it, each under its name, and linked.
    """
    if theme != "auto":
        tokens(theme)
    sections: list[str] = []
    found = scenes(circuit, depth=depth, batch=batch)
    names = list(found)
    for name, scene in found.items():
        pictures = [
            f'<div class="{which}">{render(scene, which)}</div>'
            for which in (("light", "dark") if theme == "auto" else (theme,))
        ]
        title = html_text.escape(name or circuit.title)
        links = [
            f'<a href="#b{names.index(key)}">{html_text.escape(key)}</a>'
            for key, state in scene.foldable.items()
            if state == "closed" and key in names and key != name
        ]
        inside = f"<p>Inside: {', '.join(links)}</p>" if links else ""
        sections.append(f'<section id="b{names.index(name)}"><h2>{title}</h2>{"".join(pictures)}{inside}</section>')
    both = (
        ".dark{display:none}@media(prefers-color-scheme:dark){.light{display:none}.dark{display:block}"
        f"body{{background:{tokens('dark')['paper']};color:{tokens('dark')['ink']}}}a{{color:{tokens('dark')['accent']}}}}}"
        if theme == "auto"
        else f"body{{background:{tokens(theme)['paper']};color:{tokens(theme)['ink']}}}a{{color:{tokens(theme)['accent']}}}"
    )
    style = f"body{{font:15px sans-serif;margin:2rem auto;max-width:1100px}}h2{{font-size:1rem}}svg{{max-width:100%;height:auto}}{both}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html_text.escape(circuit.title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def save(circuit: Circuit, path: str | Path, **options: Any) -> Path:
    """Write a file by its suffix.

    ``.svg`` ``.html`` ``.png`` ``.pdf`` take the options of `svg` (``.html``: depth, theme and batch); ``.json`` is
    the circuit itself, which `circuitlab.load` reads, with its drawing beside it for readers without Python (name it
    ``.circuit.json`` and JupyterLab opens it); ``.dot`` is the module overview for Graphviz.

    Raises:
        InputError: a suffix that is not known, or a program that is missing for it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    writers: dict[str, Any] = {".svg": svg, ".html": html, ".json": _json, ".png": _converted, ".pdf": _converted}
    if suffix == ".dot":
        content: str | bytes = str(to_graphviz(circuit).source)
    elif suffix in writers:
        extra = {"suffix": suffix} if suffix in (".png", ".pdf") else {}
        content = writers[suffix](circuit, **extra, **options)
    else:
        known = ", ".join([*writers, ".dot"])
        raise InputError(f"{path.name!r} has the suffix {suffix!r}; a circuit can be saved as {known}")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def _json(circuit: Circuit, **options: Any) -> str:
    data = json.loads(circuit.to_json())
    return json.dumps({**data, "diagram": document(scenes(circuit, **options))}, ensure_ascii=False)


def _converted(circuit: Circuit, *, suffix: str, scale: float = 2.0, **options: Any) -> bytes:
    """PNG or PDF by whichever converter is there: the cairosvg package or rsvg-convert."""
    source = svg(circuit, **options)
    kind = suffix[1:]
    try:
        import cairosvg  # pyright: ignore[reportMissingImports]
    except ImportError:
        program = shutil.which("rsvg-convert")
        if program is None:
            raise InputError(
                f"to save a {suffix} circuitlab needs a converter: pip install cairosvg, or install rsvg-convert "
                "(librsvg); or save an .svg"
            ) from None
        command = [program, "--format", kind, "--zoom", str(scale if kind == "png" else 1.0)]
        return subprocess.run(command, input=source.encode(), stdout=subprocess.PIPE, check=True).stdout
    target = io.BytesIO()
    getattr(cairosvg, f"svg2{kind}")(bytestring=source.encode(), write_to=target, scale=scale if kind == "png" else 1.0)
    return target.getvalue()


def to_graphviz(circuit: Circuit) -> Any:
    """The module overview as a `graphviz.Digraph`: one node per module call that holds ops, an arrow per array.

    Its ``source`` needs no Graphviz on the machine; rendering it does.
    """
    import graphviz

    graph = graphviz.Digraph(name=circuit.title, node_attr={"shape": "box", "fontname": "sans-serif"})
    owner: dict[str, str] = {}
    for block in circuit.root.blocks():
        for item in block.items:
            if isinstance(item, str):
                owner[item] = block.name
    titles = {block.name: block.title for block in circuit.root.blocks()}
    shown = dict.fromkeys(owner[op.name] for op in circuit.ops)
    number = {name: f"m{n}" for n, name in enumerate(shown)}
    for name in shown:
        graph.node(number[name], graphviz.escape(f"{name or circuit.title}\n{titles[name]}"))
    edges: dict[tuple[str, str], str] = {}
    for op in circuit.ops:
        for read in op.inputs:
            tensor = circuit.tensor(read)
            if tensor.op and owner[tensor.op] != owner[op.name]:
                edges.setdefault((owner[tensor.op], owner[op.name]), "×".join(map(str, tensor.shape)))
    for (source, target), label in edges.items():
        graph.edge(number[source], number[target], label=label)
    return graph
