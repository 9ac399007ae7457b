"""Repeated isomorphic blocks: found by their structure, drawn once with a count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from circuitlab.circuit import Block, Circuit


@dataclass(frozen=True)
class _Shape:
    """A block's structure, with names replaced by order of appearance; and what it reads and makes."""

    key: int
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def fold_repeats(
    circuit: Circuit,
    block: Block,
    static: frozenset[str],
    aliases: dict[str, str],
    canonical: Callable[[str], str],
) -> tuple[list[str | Block], list[int]]:
    """The items of a block, runs of like blocks once, and how often each stands for.

    A run is folded where every block has the same ops on the same pattern of wires and the same parameter shapes, each
    reads what the one before made (or something that all read), and nothing else reads what lies between. ``aliases``
    learns that what the last of a run makes is drawn as made by the first.
    """
    items = [item for item in block.items if isinstance(item, Block) or not _silent(circuit, item, static)]
    shapes = [_shape(circuit, item, static, canonical) if isinstance(item, Block) else None for item in items]
    kept: list[str | Block] = []
    counts: list[int] = []
    at = 0
    while at < len(items):
        length = _run(circuit, items, shapes, at, canonical)
        kept.append(items[at])
        counts.append(length)
        if length > 1:
            first, last = shapes[at], shapes[at + length - 1]
            assert first is not None
            assert last is not None
            aliases.update(zip(last.makes, first.makes, strict=True))
        at += length
    return kept, counts


def _silent(circuit: Circuit, name: str, static: frozenset[str]) -> bool:
    op = circuit.op(name)
    return op.kind == "reindex" or all(out in static for out in op.outputs)


def _run(
    circuit: Circuit,
    items: list[str | Block],
    shapes: list[_Shape | None],
    at: int,
    canonical: Callable[[str], str],
) -> int:
    """How many like blocks follow each other from here."""
    length = 1
    pattern: tuple[int, ...] | None = None
    while at + length < len(items):
        one, other = shapes[at + length - 1], shapes[at + length]
        if one is None or other is None or one.key != other.key or not one.makes:
            break
        found = _links(one, other, canonical)
        if found is None or (pattern is not None and found != pattern):
            break
        block = items[at + length]
        assert isinstance(block, Block)
        inside = set(block.op_names())
        if any(not _only_read_by(circuit, name, inside) for name in one.makes):
            break
        pattern = found
        length += 1
    return length


def _links(one: _Shape, other: _Shape, canonical: Callable[[str], str]) -> tuple[int, ...] | None:
    """For each array that the second reads: which array of the first it is (or -1: both read the same)."""
    makes = {canonical(name): number for number, name in enumerate(one.makes)}
    found: list[int] = []
    for mine, its in zip(one.reads, other.reads, strict=True):
        if its in makes:
            found.append(makes[its])
        elif its == mine:
            found.append(-1)
        else:
            return None
    return tuple(found) if any(number >= 0 for number in found) else None


def _only_read_by(circuit: Circuit, name: str, inside: set[str]) -> bool:
    if name in circuit.outputs:
        return False
    for reader in circuit.consumers.get(name, ()):
        if reader in inside:
            continue
        op = circuit.op(reader)
        if op.kind != "reindex" or not all(_only_read_by(circuit, out, inside) for out in op.outputs):
            return False
    return True


def _shape(circuit: Circuit, block: Block, static: frozenset[str], canonical: Callable[[str], str]) -> _Shape:
    """A block's structure in numbers: equal for blocks that would be drawn alike, names aside."""
    arrays: dict[str, int] = {}
    wires: dict[str, int] = {}
    reads: dict[str, None] = {}
    key: list[object] = [block.title]
    inside: set[str] = set()
    ops = [circuit.op(name) for name in block.op_names()]
    names = {op.name for op in ops}
    for op in ops:
        row: list[object] = [op.fn, op.kind, str(sorted(op.attrs.items()))]
        for name in op.inputs:
            tensor = circuit.tensor(name)
            if name in inside:
                row.append(arrays[name])
            elif name in static:
                row.append((tensor.kind, tensor.shape))
            else:
                base = canonical(name)
                if base not in arrays:
                    arrays[base] = len(arrays)
                reads[base] = None
                row.append(("read", arrays[base], tensor.shape))
        for axis in op.axes:
            number = wires.setdefault(axis.wire, len(wires))
            row.append((number, axis.role, axis.ins, axis.outs))
        for name in op.outputs:
            inside.add(name)
            arrays[name] = len(arrays)
            row.append(circuit.tensor(name).shape)
        key.append(tuple(row))
    makes = tuple(
        name
        for op in ops
        for name in op.outputs
        if name not in static
        and (name in circuit.outputs or any(reader not in names for reader in circuit.consumers.get(name, ())))
    )
    return _Shape(hash(tuple(key)), tuple(reads), makes)
