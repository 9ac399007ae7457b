"""Which module and which Python function runs an operation: the stack of blocks, and the author's source line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch

from circuitlab.circuit import Block

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_OWN = (os.path.join(_HERE, "trace") + os.sep,)
_CALL_IMPL: CodeType = torch.nn.Module._call_impl.__code__  # type: ignore[attr-defined]
_VAR_ARGS = 0x04 | 0x08  # CO_VARARGS and CO_VARKEYWORDS


@dataclass(eq=False)
class Building:
    """A block while it is being filled."""

    name: str
    title: str
    kind: str
    source: str = ""
    items: list[str | Building] = field(default_factory=list["str | Building"])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def freeze(self) -> Block:
        """The block as data, without the empty blocks in it."""
        items = tuple(item if isinstance(item, str) else item.freeze() for item in self.items)
        kept = tuple(item for item in items if isinstance(item, str) or item.items)
        return Block(self.name, self.title, self.kind, kept, self.source)


@dataclass(frozen=True)
class _Code:
    """What is known of a Python function: whether it becomes a block, and where it stands."""

    is_block: bool
    is_author: bool
    package: str
    file: str


_codes: dict[CodeType, _Code] = {}


def _describe(code: CodeType) -> _Code:
    found = _codes.get(code)
    if found is None:
        file, name = code.co_filename, code.co_name
        inside = file.startswith((_TORCH, *_OWN, "<frozen"))
        library = not inside and os.sep + "lib" + os.sep + "python" in file and "site-packages" not in file
        # a decorator's wrapper hands everything on: it is no step of the computation, and no line to look at
        wrapper = (code.co_flags & _VAR_ARGS) == _VAR_ARGS and bool(code.co_freevars)
        author = not inside and not library and not wrapper
        block = author and not name.startswith("<") and name not in ("forward", "__call__")
        found = _codes[code] = _Code(block, author, _package(file), file)
    return found


def _package(file: str) -> str:
    """The distribution folder that a file belongs to, its own folder if it is not installed."""
    head, found, tail = file.partition("site-packages" + os.sep)
    return tail.split(os.sep, 1)[0] if found else os.path.dirname(head)


def _short(file: str) -> str:
    """A source file without the folders of one machine."""
    if file.startswith("<ipython-input") or os.sep not in file:
        return file
    if os.sep + "ipykernel_" in file:
        return "notebook cell"
    _, found, tail = file.partition("site-packages" + os.sep)
    if found:
        return tail
    here = os.getcwd() + os.sep
    return file[len(here) :] if file.startswith(here) else os.path.basename(file)


@dataclass(eq=False)
class _Level:
    """A running module (or entered composite), with the Python functions that run in it."""

    block: Building
    package: str
    line: str = ""
    functions: list[tuple[FrameType, Building]] = field(default_factory=list[tuple[FrameType, Building]])
    caller: FrameType | None = None  # the frame that was looked up last: most operations share it with the next
    author: tuple[FrameType, str] | None = None
    depth: int = 0


class Nesting:
    """The blocks of a run."""

    def __init__(self, root: Building, package: str) -> None:
        self.root = root
        self.levels = [_Level(root, package)]
        self.names: dict[str, int] = {root.name: 1}
        self.line = ""
        self.lines: dict[str, str] = {}

    def unique(self, name: str) -> str:
        """The name, numbered from its second use on."""
        count = self.names[name] = self.names.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def enter(self, name: str, title: str, kind: str, package: str, source: str, caller: FrameType | None) -> None:
        """A module or composite function begins, called from a frame."""
        parent = self.here(caller)
        block = Building(self.unique(name), title, kind, source)
        parent.items.append(block)
        self.levels.append(_Level(block, package, self.line))

    def leave(self) -> None:
        """The innermost module or composite function ends."""
        self.levels.pop()

    def over(self) -> None:
        """The run is over: frames hold what they computed, and what runs the run."""
        for level in self.levels:
            level.functions.clear()
            level.caller = level.author = None

    def here(self, caller: FrameType | None) -> Building:
        """The innermost block that a frame runs in; sets `line`."""
        level = self.levels[-1]
        functions = level.functions
        if caller is not None and caller is level.caller:
            del functions[level.depth :]
            self._at(level)
            return functions[-1][1] if functions else level.block
        frames: list[tuple[FrameType, _Code]] = []
        level.author = None
        for frame, code in _frames(caller):
            if code.is_author and level.author is None:
                level.author = (frame, code.file)
            if code.is_block:
                frames.append((frame, code))
        self._at(level)
        frames.reverse()
        # of the functions of another package only the outermost is a step that the author wrote
        kept: list[FrameType] = []
        foreign = ""
        for frame, code in frames:
            if code.package != level.package and code.package == foreign:
                continue
            foreign = code.package if code.package != level.package else ""
            kept.append(frame)
        same = 0
        while same < len(kept) and same < len(functions) and functions[same][0] is kept[same]:
            same += 1
        del functions[same:]
        for frame in kept[same:]:
            parent = functions[-1][1] if functions else level.block
            title = frame.f_code.co_name
            name = self.unique(f"{level.block.name}/{title}" if level.block.name else f"/{title}")
            block = Building(name, title, "function", f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}")
            parent.items.append(block)
            functions.append((frame, block))
        level.caller, level.depth = caller, len(functions)
        return functions[-1][1] if functions else level.block

    def _at(self, level: _Level) -> None:
        """Note the author's line that runs now."""
        found = level.author
        self.line = f"{found[1]}\0{found[0].f_lineno}" if found is not None else level.line

    def source(self) -> str:
        """The author's line of the last `here`, as "file.py:12"."""
        known = self.lines.get(self.line)
        if known is None:
            file, _, number = self.line.partition("\0")
            known = self.lines[self.line] = f"{_short(file)}:{number}" if self.line else ""
        return known


def _frames(frame: FrameType | None) -> Iterator[tuple[FrameType, _Code]]:
    """Frames from the caller up to the module call (or entered composite) that they belong to."""
    while frame is not None:
        code = frame.f_code
        if code is _CALL_IMPL or code in BOUNDARIES:
            return
        yield frame, _describe(code)
        frame = frame.f_back


def caller_of_module(frame: FrameType | None) -> FrameType | None:
    """The frame that called the module whose hook runs in a frame."""
    while frame is not None and frame.f_code is not _CALL_IMPL:
        frame = frame.f_back
    return frame.f_back if frame is not None else None


BOUNDARIES: set[CodeType] = set()
"""Code objects at which the search for the author's frames ends, beside the module call."""


def error_source(error: BaseException) -> str:
    """Where the author's code raised, as "file.py:12"; "" where only libraries were running."""
    found = ""
    step = error.__traceback__
    while step is not None:
        code = _describe(step.tb_frame.f_code)
        if code.is_author:
            found = f"{_short(code.file)}:{step.tb_lineno}"
        step = step.tb_next
    return found


def class_source(kind: type[Any]) -> str:
    """Where a module class is defined, as "file.py:12", "" where that cannot be known."""
    forward = getattr(kind, "forward", None)
    code = getattr(forward, "__code__", None)
    if code is None:
        return ""
    if code.co_filename.startswith(_TORCH):
        return f"torch.nn, {kind.__name__}"
    return f"{_short(code.co_filename)}:{code.co_firstlineno}"


def package_of(kind: type[Any]) -> str:
    """The package that a module class comes from."""
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    return _package(code.co_filename) if code is not None else ""
