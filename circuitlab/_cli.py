"""`circuitlab draw pkg.mod:factory --input 1,3,224,224 -o net.svg` and `circuitlab demo`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import circuitlab
from circuitlab.errors import CircuitlabError, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="circuitlab", description="Neural circuit diagrams of live PyTorch modules.")
    parser.add_argument("--version", action="version", version=f"circuitlab {circuitlab.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw", help="trace a model and save its diagram")
    draw.add_argument("target", help="pkg.mod:name of a module, a class or a function that makes one")
    draw.add_argument("--input", action="append", default=[], metavar="SHAPE",
                      help="shape of an input, e.g. 1,3,224,224, or with a type: 1,128:int64; once per input")
    draw.add_argument("-o", "--output", type=Path, help="file to write: .svg .html .json .png .pdf .dot; else text")
    draw.add_argument("--depth", type=int, default=1, help="levels of blocks to unfold (default 1)")
    draw.add_argument("--theme", default="light", choices=["light", "dark", "print"])
    draw.add_argument("--device", default="auto", choices=["auto", "meta", "live"])
    demo = commands.add_parser("demo", help="draw a small GPT: text here, SVG and HTML into a folder")
    demo.add_argument("-o", "--output", type=Path, default=Path(), help="folder to write into (default: here)")
    given = parser.parse_args(arguments)
    try:
        return _draw(given) if given.command == "draw" else _demo(given.output)
    except CircuitlabError as error:
        print(f"circuitlab: {error}", file=sys.stderr)
        return 1


def _draw(given: argparse.Namespace) -> int:
    model = _model(given.target)
    inputs = [_input(text) for text in given.input]
    circuit = circuitlab.trace(model, *inputs, device=given.device)
    if given.output is None:
        print(circuit.text(depth=given.depth), end="")
        return 0
    plain = given.output.suffix.lower()
    options: dict[str, Any] = {} if plain == ".dot" else {"depth": given.depth}
    if plain not in (".dot", ".json"):
        options["theme"] = given.theme
    print(circuit.save(given.output, **options))
    return 0


def _demo(folder: Path) -> int:
    import torch

    from circuitlab.gallery.gpt import GPT

    model = GPT()
    circuit = circuitlab.trace(model, torch.zeros(2, 16, dtype=torch.long))
    folder.mkdir(parents=True, exist_ok=True)
    print(circuit.text(depth=2), end="")
    for name in ("gpt.svg", "gpt.html"):
        print(circuit.save(folder / name, depth=2))
    return 0


def _model(target: str) -> Any:
    import torch

    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise InputError(f"{target!r} is not of the form pkg.mod:name, e.g. torchvision.models:resnet18")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{target!r}: cannot import {module!r} ({error})") from None
    finally:
        sys.path.pop(0)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{target!r}: {getattr(found, '__name__', module)!r} has no {part!r}")
        found = getattr(found, part)
    model = found if isinstance(found, torch.nn.Module) else found() if callable(found) else found
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{target!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _input(text: str) -> Any:
    import torch

    match = re.fullmatch(r"(\d*(?:,\d+)*)(?::(\w+))?", text)
    dtype = getattr(torch, match[2], None) if match and match[2] else torch.float32
    if match is None or not isinstance(dtype, torch.dtype):
        raise InputError(f"--input {text!r} is not a shape such as 1,3,224,224 or 1,128:int64")
    return torch.zeros([int(size) for size in match[1].split(",") if size], dtype=dtype)


if __name__ == "__main__":
    raise SystemExit(main())
