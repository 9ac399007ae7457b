"""What changed between two circuits: two models, two versions of one, or one model on two inputs.

Blocks and ops are matched in the order they run, within matched blocks, by what they are; wires, parameters and outputs by name. Sizes
are changes of wires alone, so that a wider model is one line and not one for each op.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from circuitlab.circuit import Block, Circuit, Op, _late
from circuitlab.errors import InputError


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        kind: "added", "removed" or "changed".
        what: "op", "block", "wire", "parameter" or "output".
        before, after: its name in the first and in the second circuit, "" where it is not.
        how: what changed, for people.
    """

    kind: str
    what: str
    before: str
    after: str
    how: str = ""


@dataclass(frozen=True)
class Diff:
    """All differences of two circuits, in the order they run. It is true where there are any."""

    before: Circuit
    after: Circuit
    changes: tuple[Change, ...]

    @property
    def same(self) -> bool:
        """Whether nothing changed."""
        return not self.changes

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def added(self) -> tuple[Change, ...]:
        """What only the second has."""
        return tuple(change for change in self.changes if change.kind == "added")

    @property
    def removed(self) -> tuple[Change, ...]:
        """What only the first has."""
        return tuple(change for change in self.changes if change.kind == "removed")

    @property
    def changed(self) -> tuple[Change, ...]:
        """What both have, not alike."""
        return tuple(change for change in self.changes if change.kind == "changed")

    def to_frame(self) -> Any:
        """The changes as a pandas DataFrame: kind, what, before, after, how."""
        import pandas as pd

        return pd.DataFrame([vars(change) for change in self.changes], columns=["kind", "what", "before", "after", "how"])

    def svg(self, **options: Any) -> str:
        """Both drawings, one above the other, with what changed tinted. See `circuitlab.display.diff_svg`."""
        return _late("display").diff_svg(self, **options)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"image/svg+xml": self.svg(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        """One line for each change; the same change of many layers is one line."""
        if self.same:
            return f"Diff of {self.before.title} and {self.after.title}: no change"
        counts = f"{len(self.added)} added, {len(self.removed)} removed, {len(self.changed)} changed"
        lines = [f"Diff of {self.before.title} and {self.after.title}: {counts}"]
        alike: dict[tuple[str, ...], list[Change]] = {}
        for change in self.changes:
            names = (re.sub(r"\d+", "*", re.sub(r"[_#]\d+$", "", name)) for name in (change.before, change.after))
            key = (change.kind, change.what, *names, change.how)
            alike.setdefault(key, []).append(change)
        for (kind, what, *_), group in alike.items():
            one = group[0]
            name = one.before if one.before == one.after or not one.after else one.after if not one.before else (
                f"{one.before} -> {one.after}")
            times = f", and {len(group) - 1} more like it" if len(group) > 1 else ""
            lines.append(f"  {kind:8}{what} {name}{f': {one.how}' if one.how else ''}{times}")
        return "\n".join(lines)


def diff(before: Circuit, after: Circuit) -> Diff:
    """Tell what changed from one circuit to another.

    Args:
        before, after: any two circuits; the more alike, the more is matched.

    Returns:
        a `Diff`.
    """
    if not isinstance(after, Circuit):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"diff compares with another Circuit, and was given a {type(after).__name__}; trace the model first")
    changes = [*_blocks(before, after, before.root, after.root), *_wires(before, after), *_parameters(before, after)]
    changes += _outputs(before, after)
    return Diff(before, after, tuple(changes))


def _blocks(before: Circuit, after: Circuit, one: Block, other: Block) -> Iterator[Change]:
    """Differences of the insides of two matched blocks."""
    mine, its = [_key(before, item) for item in one.items], [_key(after, item) for item in other.items]
    for tag, a, b, c, d in difflib.SequenceMatcher(None, mine, its, autojunk=False).get_opcodes():
        old, new = one.items[a:b], other.items[c:d]
        if tag == "equal" or (tag == "replace" and [type(i) for i in old] == [type(i) for i in new]):
            for item, twin in zip(old, new, strict=True):
                yield from _pair(before, after, item, twin)
        else:
            for item in old:
                yield _alone("removed", item)
            for item in new:
                yield _alone("added", item)


def _key(circuit: Circuit, item: str | Block) -> tuple[str, ...]:
    """What an item is matched by."""
    if isinstance(item, Block):
        word = item.name.rpartition(".")[2].rpartition("/")[2].split("#")[0]
        return ("block", item.title if word.isdigit() else word)
    op = circuit.op(item)
    return ("op", op.fn, op.kind)


def _pair(before: Circuit, after: Circuit, item: str | Block, twin: str | Block) -> Iterator[Change]:
    if isinstance(item, Block) and isinstance(twin, Block):
        if item.title != twin.title:
            yield Change("changed", "block", item.name, twin.name, f"{item.title} -> {twin.title}")
        yield from _blocks(before, after, item, twin)
    elif isinstance(item, str) and isinstance(twin, str):
        how = _differences(before.op(item), after.op(twin))
        if how:
            yield Change("changed", "op", item, twin, how)


def _differences(one: Op, other: Op) -> str:
    """What an op does otherwise, sizes apart."""
    if one.fn != other.fn:
        return f"{one.fn} -> {other.fn}"
    told: list[str] = []
    for key in dict.fromkeys((*one.attrs, *other.attrs)):
        a, b = one.attrs.get(key), other.attrs.get(key)
        if a != b:
            told.append(f"{key} {a} -> {b}")
    if not told and len(one.inputs) != len(other.inputs):
        told.append(f"{len(one.inputs)} operands -> {len(other.inputs)}")
    if not told and sorted(axis.role for axis in one.axes) != sorted(axis.role for axis in other.axes):
        told.append(f"roles of its axes: {_roles(one)} -> {_roles(other)}")
    if not told and _unsized(one.call) != _unsized(other.call):
        told.append(f"{one.call} -> {other.call}")
    return ", ".join(told)


def _unsized(call: str) -> str:
    """A call without its whole numbers, which sizes may be."""
    return re.sub(r"(?<![\w.$])\d+(?![\w.])", "_", call)


def _roles(op: Op) -> str:
    return " ".join(sorted(axis.role for axis in op.axes))


def _alone(kind: str, item: str | Block) -> Change:
    name = item.name if isinstance(item, Block) else item
    what = "block" if isinstance(item, Block) else "op"
    how = item.title if isinstance(item, Block) else ""
    return Change(kind, what, name if kind == "removed" else "", name if kind == "added" else "", how)


def _wires(before: Circuit, after: Circuit) -> Iterator[Change]:
    for name, wire in before.wires.items():
        twin = after.wires.get(name)
        if twin is None:
            yield Change("removed", "wire", name, "", f"size {wire.size}")
        else:
            told = [] if wire.size == twin.size else [f"size {wire.size} -> {twin.size}"]
            if wire.permutable != twin.permutable:
                told.append("now permutable" if twin.permutable else f"no longer permutable: {twin.why}")
            if told:
                yield Change("changed", "wire", name, name, ", ".join(told))
    for name, wire in after.wires.items():
        if name not in before.wires:
            yield Change("added", "wire", "", name, f"size {wire.size}")


def _parameters(before: Circuit, after: Circuit) -> Iterator[Change]:
    """Parameters and buffers that came, went, or have other axes; sizes are told of wires."""
    old, new = ({t.name: t for t in c.tensors if t.kind in ("parameter", "buffer")} for c in (before, after))
    for name, tensor in old.items():
        if name not in new:
            yield Change("removed", "parameter", name, "", _shape(tensor.shape))
        elif len(tensor.shape) != len(new[name].shape):
            yield Change("changed", "parameter", name, name, f"{_shape(tensor.shape)} -> {_shape(new[name].shape)}")
        elif tensor.dtype != new[name].dtype:
            yield Change("changed", "parameter", name, name, f"{tensor.dtype} -> {new[name].dtype}")
    for name, tensor in new.items():
        if name not in old:
            yield Change("added", "parameter", "", name, _shape(tensor.shape))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _outputs(before: Circuit, after: Circuit) -> Iterator[Change]:
    old, new = (dict(zip(c.returns or c.outputs, c.outputs, strict=False)) for c in (before, after))
    for path in old:
        if path not in new:
            yield Change("removed", "output", path, "")
    for path in new:
        if path not in old:
            yield Change("added", "output", "", path)
