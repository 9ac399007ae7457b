"""Names for the variables of a function, and its text.

Names are given once all lines of a function are known, so that a name can be used again where what it stood for is
read no more: ``x = x + attn``.
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from circuitlab.circuit import Circuit, Tensor
from circuitlab.trace.patterns import ascii_of

_WIDE = 108
"""Lines longer than this go without a note."""


@dataclass
class Line:
    """Statements. In the text ``$0``, ``$1`` ... are what is read, ``$out`` the one written where it is set up inside.

    Keys of reads and writes: a tensor's name, ``"name@form"`` for the tensor re-indexed, ``"size of wire"``, or
    ``"module path"`` for where parameters are. words are for what is written; named says that they are the author's, to
    be used even where an older name is free.
    """

    text: str
    reads: list[str]
    writes: list[str]
    note: str = ""
    words: list[str] = field(default_factory=list[str])
    named: bool = False


@dataclass
class Function:
    """A block written as a function.

    Attributes:
        args: keys of what it is given. outs: tensors it gives back. names: what it calls those.
        same: tensors made in the block that are what it was given, and the keys of those.
        uses_m: whether it is given its module.
    """

    name: str
    base: str
    args: list[str] = field(default_factory=list[str])
    outs: list[str] = field(default_factory=list[str])
    names: list[str] = field(default_factory=list[str])
    same: dict[str, str] = field(default_factory=dict[str, str])
    uses_m: bool = False
    text: str = ""


def tensor_of(circuit: Circuit, key: str) -> Tensor:
    """The tensor of a key."""
    return circuit.tensor(key.split("@", maxsplit=1)[0])


def axes_of(circuit: Circuit, key: str) -> str:
    """The axes of a tensor, as letters."""
    dims = [[ascii_of(circuit.wires[name].label) for name in dim] for dim in tensor_of(circuit, key).dims]
    return " ".join(labels[0] if len(labels) == 1 else f"({' '.join(labels)})" if labels else "1" for labels in dims)


class Namer:
    """Names for variables, and the text of a function.

    Args:
        circuit, lines: what the function does.
        function: gets its arguments and text.
        taken: names of functions.
        root: it is the circuit's own.
    """

    def __init__(
        self, circuit: Circuit, lines: list[Line], function: Function, taken: AbstractSet[str], *, root: bool
    ) -> None:
        self.circuit, self.lines, self.function, self.taken, self.root = circuit, lines, function, taken, root
        self.last: dict[str, int] = {}
        self.var: dict[str, str] = {}
        self.until: dict[str, int] = {}  # a name -> the last line that reads what it stands for
        self.busy: dict[str, tuple[int, int]] = {}  # a word -> a number below which none is free, and until which line
        self.arguments: dict[str, str] = {}
        self.words = itertools.chain("xyz", (f"x{n}" for n in itertools.count(4)))
        for number, line in enumerate(lines):
            for key in line.reads:
                self.last[key] = number
        if root:
            for name in circuit.inputs:
                self._argument(name)

    def finish(self) -> None:
        """Fill in the function's arguments and text."""
        texts: list[tuple[str, str]] = []
        for number, line in enumerate(self.lines):
            reads = [self._read(key) for key in line.reads]
            if line.text == "return":
                self.function.names = reads
                given = f"[{', '.join(reads)}]" if self.root else ", ".join(reads)
                texts += [(f"return {given}", "")] if given else []
                continue
            names = self._written(line, number)
            if "$out" in line.text:
                text = _filled(line.text.replace("$out", "\1"), reads).replace("\1", names[0])
            else:
                text = _filled(line.text, reads)
                text = f"{', '.join(names)} = {text}" if names else text
            texts += [(row, line.note if row is text.splitlines()[-1] else "") for row in text.splitlines()]
        if self.root:
            args = ["m", *(self.arguments[name] for name in self.circuit.inputs)]
        else:
            args = (["m"] if self.function.uses_m else []) + [self.arguments[key] for key in self.function.args]
        given = [key for key in self.function.args if not key.startswith("module ")]
        dims = [axes_of(self.circuit, key) for key in given if tensor_of(self.circuit, key).kind in ("input", "value")]
        outs = ", ".join(axes_of(self.circuit, key) for key in self.function.outs)
        says = f'    """{", ".join(dims)} -> {outs}"""\n'
        self.function.text = "(" + ", ".join(args) + "):\n" + says + _laid_out(_looped(texts))

    def _argument(self, key: str) -> str:
        if key.startswith("module "):
            word = key[7:].rpartition(".")[2] or "module"
        else:
            tensor = tensor_of(self.circuit, key)
            if tensor.kind == "input":
                word = re.sub(r"\W+", "_", tensor.name).strip("_")
            elif tensor.kind in ("parameter", "buffer", "constant"):
                word = re.sub(r"\W+", "_", tensor.name.rpartition(".")[2]).strip("_")
            else:
                word = next(self.words)
        name = self._free(word, 0)
        self.arguments[key] = name
        self._stands(name, key)
        self.function.args.append(key)
        return name

    def _read(self, key: str) -> str:
        if key in self.var:
            return self.var[key]
        path = key[7:] if key.startswith("module ") else ""
        tensor = None if path or " " in key or key == "module " else tensor_of(self.circuit, key)
        if key.startswith("module ") or (tensor is not None and tensor.kind in ("parameter", "buffer", "constant")):
            path = path if tensor is None else tensor.name
            base = self.function.base
            if not base or path == base or path.startswith(base + "."):
                self.function.uses_m = True
                return _attribute(path[len(base) :].lstrip("."))
        return self._argument(key)

    def _written(self, line: Line, number: int) -> list[str]:
        names: list[str] = []
        words = _pieces(self.var.get(line.reads[0], "") if line.reads else "", line.words, len(line.writes))
        for key, word in zip(line.writes, words, strict=True):
            if key not in self.last:
                names.append("_")
                continue
            name = self._again(line, key, number) if len(words) == 1 and not line.named else ""
            # what is set up inside is there before all is read
            names.append(name or self._free(word, number - ("$out" in line.text)))
            self._stands(names[-1], key)
        return names

    def _again(self, line: Line, key: str, number: int) -> str:
        """The name of an array that is read here for the last time and has the same axes: x = x + y."""
        if " " in key:
            return ""
        mine = tensor_of(self.circuit, key)
        for read in line.reads[:1] if "$out" in line.text else line.reads:
            if " " in read or self.last[read] != number or read not in self.var:
                continue
            its = tensor_of(self.circuit, read)
            if key.endswith("@") and read == line.reads[0] or (its.dims == mine.dims and its.dtype == mine.dtype):
                return self.var[read]
        return ""

    def _stands(self, name: str, key: str) -> None:
        """From here on, a name stands for what a key says."""
        self.var[key] = name
        self.until[name] = max(self.until.get(name, -1), self.last.get(key, -1))

    def _free(self, word: str, number: int) -> str:
        """A name after a word that stands for nothing that is still read after a line."""
        word = word if word.isidentifier() and not keyword.iskeyword(word) else f"x_{word}" if word else "x"
        now = number - (number == 0)
        count, soonest = self.busy.get(word, (1, len(self.lines)))
        if soonest <= now:
            count, soonest = 1, len(self.lines)
        while (name := word if count == 1 else f"{word}{count}") in self.taken or self.until.get(name, -1) > now:
            soonest = min(soonest, self.until.get(name, soonest) if name not in self.taken else soonest)
            count += 1
        self.busy[word] = (count, soonest)
        return name


def _pieces(whole: str, words: list[str], count: int) -> list[str]:
    """Words for several results: of qkv q, k and v; of gate_up gate and up."""
    if len(words) == count:
        return words
    parts = list(whole) if len(whole) == count else whole.split("_")
    good = 1 < count == len(parts) and all(part.isidentifier() for part in parts)
    return parts if good else (words or ["x"])[:1] * count


def _attribute(path: str) -> str:
    """The expression for a path below ``m``: h.0.ln_1 is ``m.h[0].ln_1``."""
    text = "m"
    for step in re.split(r"\.(?![^\[]*\])", path) if path else []:
        word = step.split("[")[0]
        if step.isdigit():
            text += f"[{step}]"
        elif word.isidentifier() and not keyword.iskeyword(word):
            text += f".{step}"
        else:
            text = f"getattr({text}, {step!r})"
    return text


def _filled(text: str, reads: list[str]) -> str:
    return re.sub(r"\$(\$|\d+)", lambda found: "$" if found[1] == "$" else reads[int(found[1])], text)


def _looped(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A chain of calls that differ in a running index only becomes a loop."""
    made: list[tuple[str, str]] = []
    at = 0
    while at < len(texts):
        text, note = texts[at]
        found = re.match(r"^(.*\(m[\w.\[\]]*)\[(\d+)\](.*)$", text)
        count = 1
        while found and at + count < len(texts):
            wanted = f"{found[1]}[{int(found[2]) + count}]{found[3]}"
            if texts[at + count][0] != wanted:
                break
            count += 1
        if found and count > 1:
            first = int(found[2])
            numbers = f"{first}, {first + count}" if first else str(count)
            made += [(f"for i in range({numbers}):", ""), (f"    {found[1]}[i]{found[3]}", note)]
        else:
            made.append((text, note))
            count = 1
        at += count
    return made


def _laid_out(texts: list[tuple[str, str]]) -> str:
    """Indented, with notes in one column where there is room."""
    column = min(60, max((len(text) for text, note in texts if note and len(text) <= 60), default=0))
    texts = [(text, note if len(text) + len(note) < _WIDE else "") for text, note in texts]
    rows = [f"    {text.ljust(column)}  # {note}" if note else f"    {text}" for text, note in texts]
    return "\n".join(rows or ["    return []"]) + "\n"
