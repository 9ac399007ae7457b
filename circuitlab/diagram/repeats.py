"""Repeated isomorphic blocks, and steps of an unrolled loop: found by their structure, drawn once with a count."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from circuitlab.circuit import Block, Circuit, Op

_PERIOD = 64
"""The most items that one step of a loop may have."""


@dataclass
class Folded:
    """The items of a block with runs once, how often each stands for, and the ops that take another entry each time."""

    items: list[str | Block] = field(default_factory=list["str | Block"])
    counts: list[int] = field(default_factory=list[int])
    stepped: set[str] = field(default_factory=set[str])


@dataclass(frozen=True)
class _Shape:
    """The structure of some ops, names replaced by order of appearance; what they read and make.

    strays: for each array that is made, which ops elsewhere read it ("" where it is an output of the circuit).
    steps: the numbers in indices, which may differ from one repeat to the next.
    """

    key: int
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    strays: tuple[frozenset[str], ...]
    steps: tuple[int, ...]
    stepped: tuple[str, ...]
    ops: frozenset[str]


class Repeats:
    """Finds what repeats among the items of blocks.

    A run is folded where every repeat has the same ops on the same pattern of wires and the same parameter shapes, each
    reads what the one before made (or something that all read), and nothing else reads what lies between, unless it
    collects what all of them make, in order. Each may take the next entry of an array. ``aliases`` learns that what any
    of a run makes is drawn as made by the first.
    """

    def __init__(
        self,
        circuit: Circuit,
        static: frozenset[str],
        hidden: frozenset[str],
        aliases: dict[str, str],
        canonical: Callable[[str], str],
    ) -> None:
        self.circuit, self.static, self.hidden = circuit, static, hidden
        self.aliases, self.canonical = aliases, canonical

    def fold(self, block: Block) -> Folded:
        """The items of a block, runs of like blocks once, and steps of loops as a block of kind "loop"."""
        self.items = [item for item in block.items if isinstance(item, Block) or not self._is_silent(item)]
        self.shapes: dict[tuple[int, int], _Shape] = {}
        self.keys = [self._key(at) for at in range(len(self.items))]
        found = Folded()
        at = 0
        while at < len(self.items):
            period, length = 1, self._run(at, 1) if isinstance(self.items[at], Block) else 1
            if length == 1 and block.kind != "loop":
                start, period, length = self._loop(at)
                found.items += self.items[at:start]
                found.counts += [1] * (start - at)
                at = start
            step = self.items[at : at + period]
            if length > 1:
                self._learn(at, period, length, found)
            if length > 1 and (period > 1 or isinstance(step[0], str)):
                found.items.append(Block(f"{block.name}/loop:{_names(step[0])[0]}", "loop", "loop", tuple(step)))
            else:
                found.items += step
            found.counts.append(length)
            at += period * length
        return found

    def _is_silent(self, name: str) -> bool:
        op = self.circuit.op(name)
        return name in self.hidden or is_silent(op) or all(out in self.static for out in op.outputs)

    def _key(self, at: int) -> object:
        """What must be equal for two items to be alike: enough to look for loops by."""
        item = self.items[at]
        if isinstance(item, Block):
            return self._shape(at, 1).key
        op = self.circuit.op(item)
        return op.fn, op.kind, len(op.inputs)

    def _learn(self, at: int, period: int, length: int, found: Folded) -> None:
        first = self._shape(at, period)
        for number in range(1, length):
            its = self._shape(at + number * period, period)
            self.aliases.update((a, b) for a, b in zip(its.makes, first.makes, strict=True) if a not in self.static)
            if its.steps != first.steps:
                found.stepped.update(first.stepped)

    # runs ---------------------------------------------------------------------------------------------

    def _loop(self, at: int) -> tuple[int, int, int]:
        """Where the next loop begins, if its first step begins here or soon; how long its steps are, and how many."""
        keys = self.keys
        for period in range(1, min(_PERIOD, (len(keys) - at) // 3) + 1):
            if keys[at] != keys[at + period] or keys[at : at + 2 * period] != keys[at + period : at + 3 * period]:
                continue
            for start in dict.fromkeys((self._first_line(at, period), at)):
                ops = [name for item in self.items[start : start + period] for name in _names(item)]
                if sum(not self._is_silent(name) for name in ops) < 2:
                    continue
                length = self._run(start, period)
                if length > 2:
                    return start, period, length
        return at, 1, 1

    def _first_line(self, at: int, period: int) -> int:
        """Which of a period's items begins the line that is first in the source: there the loop's body begins."""
        lines: list[int] = []
        for item in self.items[at : at + period]:
            line = re.search(r":(\d+)$", self.circuit.op(item).source) if isinstance(item, str) else None
            lines.append(int(line[1]) if line else lines[-1] if lines else 1 << 30)  # a call is on the line before it
        first = min(lines)
        return next((at + n for n in range(period) if lines[n] == first != lines[n - 1]), at)

    def _run(self, at: int, period: int) -> int:
        """How many like repeats follow each other from here."""
        shapes = [self._shape(at, period)]
        pattern: tuple[int, ...] | None = None
        step: tuple[int, ...] | None = None
        while at + (len(shapes) + 1) * period <= len(self.items):
            one, other = shapes[-1], self._shape(at + len(shapes) * period, period)
            links = self._links(one, other) if one.key == other.key else None
            steps = tuple(b - a for a, b in zip(one.steps, other.steps, strict=False))
            if links is None or pattern not in (None, links) or step not in (None, steps):
                break
            if any(self._collector(readers, other) is None for readers in one.strays):
                break
            pattern, step = links, steps
            shapes.append(other)
        return len(shapes) if self._collected(shapes) else 1

    def _links(self, one: _Shape, other: _Shape) -> tuple[int, ...] | None:
        """For each array that the second reads: which array of the first it is (or -1: both read the same)."""
        makes = {name: number for number, name in enumerate(one.makes)}  # those that are read are canonical
        found: list[int] = []
        for mine, its in zip(one.reads, other.reads, strict=True):
            if its in makes:
                found.append(makes[its])
            elif its == mine:
                found.append(-1)
            else:
                return None
        return tuple(found) if any(number >= 0 for number in found) else None

    def _collector(self, readers: frozenset[str], following: _Shape) -> str | None:
        """The op that joins what all repeats make, "" if only the next one reads it; None if anything else does."""
        others = readers - following.ops
        if not others:
            return ""
        name = next(iter(others))
        return name if len(others) == 1 and name and self.circuit.op(name).kind == "cat" else None

    def _collected(self, shapes: Sequence[_Shape]) -> bool:
        """Whether each op that collects what repeats make takes it of all of them, in order."""
        for number in range(len(shapes[0].makes) if len(shapes) > 1 else 0):
            named = {self._collector(a.strays[number], b) for a, b in itertools.pairwise(shapes)}
            collector = named.pop()
            if named or collector is None:
                return False
            if not collector:
                continue
            taken = [self.canonical(name) for name in self.circuit.op(collector).inputs]
            made = [self.canonical(shape.makes[number]) for shape in shapes]
            if not any(taken[n : n + len(made)] in (made, made[::-1]) for n in range(len(taken))):
                return False
        return True

    # shapes -------------------------------------------------------------------------------------------

    def _shape(self, at: int, period: int) -> _Shape:
        """Structure in numbers: equal for what would be drawn alike, names aside."""
        if (at, period) not in self.shapes:
            items = self.items[at : at + period]
            title = items[0].title if period == 1 and isinstance(items[0], Block) else ""
            self.shapes[at, period] = self._shape_of(title, [name for item in items for name in _names(item)])
        return self.shapes[at, period]

    def _shape_of(self, title: str, names: list[str]) -> _Shape:
        arrays: dict[str, int] = {}
        wires: dict[str, int] = {}
        reads: dict[str, None] = {}
        key: list[object] = [title]
        steps: list[int] = []
        stepped: list[str] = []
        inside: set[str] = set()
        ops = [self.circuit.op(name) for name in names]
        for op in ops:
            taken: list[int] = []
            attrs = {k: _numbered(v, taken) if k == "index" else v for k, v in op.attrs.items()}
            steps += taken
            stepped += [op.name] * bool(taken)
            row: list[object] = [op.fn, op.kind, str(sorted(attrs.items()))]
            for name in op.inputs:
                tensor = self.circuit.tensor(name)
                if name in inside:
                    row.append(arrays[name])
                elif name in self.static:
                    row.append((tensor.kind, tensor.shape))
                elif (base := self.canonical(name)) in inside:
                    row.append((arrays[base], tensor.shape))
                else:
                    arrays.setdefault(base, len(arrays))
                    reads[base] = None
                    row.append(("read", arrays[base], tensor.shape))
            for axis in op.axes:
                number = wires.setdefault(axis.wire, len(wires))
                row.append((number, axis.role, axis.ins, axis.outs))
            for name in op.outputs:
                inside.add(name)
                arrays[name] = len(arrays)
                row.append(self.circuit.tensor(name).shape)
            key.append(tuple(row))
        makes = tuple(name for op in ops for name in op.outputs)
        own = frozenset(names)
        strays = tuple(frozenset(self._readers(name)) - own for name in makes)
        return _Shape(hash(tuple(key)), tuple(reads), makes, strays, tuple(steps), tuple(stepped), own)

    def _readers(self, name: str) -> set[str]:
        """The ops that read an array, through reindexing; "" for a reader outside the circuit."""
        found = {""} if name in self.circuit.outputs else set[str]()
        for reader in self.circuit.consumers.get(name, ()):
            op = self.circuit.op(reader)
            if reader in self.hidden:
                continue
            if op.kind == "reindex":
                for out in op.outputs:
                    found |= self._readers(out)
            elif not op.outputs or any(out not in self.static for out in op.outputs):  # zeros_like(x) does not read x
                found.add(reader)
        return found


def is_silent(op: Op) -> bool:
    """Whether an op gives back the numbers that it got: reindexing, dropout in evaluation, a factor of one."""
    one = op.fn in ("mul", "div") and op.attrs.get("scalar") == 1 and len(op.inputs) == 1
    return op.kind == "reindex" or op.attrs.get("active") is False or one


def _names(item: str | Block) -> list[str]:
    return list(item.op_names()) if isinstance(item, Block) else [item]


def _numbered(index: object, found: list[int]) -> object:
    """An index with its numbers taken out."""
    if isinstance(index, (tuple, list)):
        return tuple(_numbered(item, found) for item in index)
    if isinstance(index, int) and not isinstance(index, bool):
        found.append(index)
        return "#"
    return index
