"""Which wires can be permuted without changing the function, where they sit, and why the others cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from circuitlab.circuit import PASSING_ROLES, Axis, Circuit, Op, Tensor, Wire

Part = tuple[int, int] | None
WherePlaces = dict[str, tuple[tuple[str, int, int, Part], ...]]

_ROLES = {
    "ordered": "{fn} treats its entries by their position",
    "indexed": "{fn} picks entries of it by their number",
    "windowed": "{fn} slides a window over it, so it matters which entries are neighbours",
    "gathered": "{fn} looks its entries up by their number",
    "opaque": "circuitlab has no rule for {fn}, so it does not know what that does to it",
}
_KINDS = {  # what the role means in ops of a kind
    ("create", "ordered"): "{fn} numbers its entries",
    ("scan", "ordered"): "{fn} goes through it in order",
    ("sort", "ordered"): "{fn} sorts it, and the numbers of its entries tell which is which",
    ("norm", "ordered"): "{fn} normalises it in groups of neighbours",
    ("scatter", "gathered"): "{fn} sends its entries to places given by number",
}
_WINDOW = "it is the window that {fn} slides, in which entries have their places"
_SUM = "it is made of parts"


def places_of(tensors: tuple[Tensor, ...], wires: dict[str, Wire]) -> WherePlaces:
    """For each wire the parameters and buffers it sits in.

    A place is (name, dimension, factor position, part). Where the wire sits in a part of a sum, part is the
    (start, stop) of that part along the dimension, and the factor position counts within it.
    """
    found: dict[str, list[tuple[str, int, int, Part]]] = {}
    for tensor in tensors:
        if tensor.kind not in ("parameter", "buffer"):
            continue
        for dim, names in enumerate(tensor.dims):
            for name, factor, part in inside(wires, names):
                found.setdefault(name, []).append((tensor.name, dim, factor, part))
    return {name: tuple(places) for name, places in found.items()}


def inside(wires: Mapping[str, Wire], names: tuple[str, ...]) -> Iterator[tuple[str, int, Part]]:
    """The wires of a dimension, each with its factor position and None, and those in the parts of its leading wire."""
    for factor, name in enumerate(names):
        yield name, factor, None
    if names:
        yield from _in_parts(wires, names, 0)


def _in_parts(wires: Mapping[str, Wire], names: tuple[str, ...], offset: int) -> Iterator[tuple[str, int, Part]]:
    for part, product, fresh in part_products(wires, names, offset):
        for factor, name in enumerate(product[:fresh]):
            yield name, factor, part


def part_products(
    wires: Mapping[str, Wire], names: tuple[str, ...], offset: int = 0
) -> Iterator[tuple[tuple[int, int], tuple[str, ...], int]]:
    """The parts of a dimension's leading wire, and theirs: (start, stop), the wires there, how many are the part's own."""
    if not names:
        return
    inner = math.prod(wires[name].size for name in names[1:])
    for start, stop, parts in wires[names[0]].parts:
        part = (offset + start * inner, offset + stop * inner)
        yield part, (*parts, *names[1:]), len(parts)
        if parts:
            yield from part_products(wires, (*parts, *names[1:]), part[0])


def permutability(
    wires: dict[str, Wire],
    ops: tuple[Op, ...],
    tensors: tuple[Tensor, ...],
    inputs: tuple[str, ...],
    returns: Mapping[str, str],
    places: WherePlaces,
    picked: set[str],
    odd: Mapping[str, str],
) -> dict[str, str]:
    """For each wire "" if it is permutable, else the reason why not, for people.

    ``returns`` holds the outputs, each with where it stands in what forward returned; ``odd`` the parameters that are no
    plain arrays, and what they are.
    """
    why = dict.fromkeys(picked, "single entries of it are picked by their number")
    by_name = {tensor.name: tensor for tensor in tensors}
    ends = [(name, f"input {name!r}") for name in inputs]
    ends += [(name, f"output {path or name!r}") for name, path in returns.items()]
    for name, end in ends:
        for wire in _deep(by_name[name], wires):
            why.setdefault(wire, f"it is an axis of the {end}")
    for op in ops:
        for axis in op.axes:
            reason = _reason(op, axis)
            if op.kind == "cat" and axis.role == "joined" and not axis.ins and not wires[axis.wire].parts:
                reason = "{fn} puts different arrays side by side with it"
            if reason:
                where = f" ({op.source})" if op.source else ""
                why.setdefault(axis.wire, reason.format(fn=f"{op.fn} in {op.name!r}") + where)
    statistics = {n for op in ops if op.kind == "norm" for n in op.inputs}
    for tensor in tensors:
        if tensor.kind == "constant" or (tensor.kind == "buffer" and tensor.name not in statistics):
            for wire in _deep(tensor, wires):
                why.setdefault(wire, f"the {tensor.kind} {tensor.name!r} has it: fixed numbers, which stay where they are")
        elif tensor.name in odd:
            for wire in _deep(tensor, wires):
                why.setdefault(wire, f"the {tensor.kind} {tensor.name!r} is a {odd[tensor.name]}, whose entries cannot be moved")
    holders = _holders(tensors, wires)
    for wire in wires.values():
        if wire.parts:
            why.setdefault(wire.name, _SUM)
        elif wire.name not in holders:
            why.setdefault(wire.name, "no parameter has it, so there is nothing to permute")
        elif holders[wire.name] != {place[0] for place in places.get(wire.name, ())}:
            # every parameter that has the wire must have it at a place that `places` can name
            why.setdefault(wire.name, "in a parameter it takes up a part of each block of another wire (of each head, say), "
                            "and such places cannot be named yet")
    # a sum that is pinned pins its parts, and theirs
    pending = [name for name, reason in why.items() if wires[name].parts and reason != _SUM]
    while pending:
        whole = pending.pop()
        for _, _, names in wires[whole].parts:
            for name in names:
                if why.get(name, _SUM) == _SUM:
                    why[name] = f"it is a part of {whole!r}: {why[whole]}"
                    if wires[name].parts:
                        pending.append(name)
    sums = [name for name, reason in why.items() if reason == _SUM]
    told = {name: _told(name, wires, why) for name in sums}
    return {name: told.get(name, why.get(name, "")) for name in wires}


def _told(name: str, wires: Mapping[str, Wire], why: Mapping[str, str]) -> str:
    """Why a sum is not permutable: of its parts, which are, or why none is."""
    pending, inner = [name], list[str]()
    while pending:
        for _, _, names in wires[pending.pop()].parts:
            inner += [n for n in names if not wires[n].parts]
            pending += [n for n in names if wires[n].parts]
    free = [part for part in dict.fromkeys(inner) if not why.get(part)]
    if free:
        return f"{_SUM}, which a permutation must not mix; of those, it can permute {', '.join(map(repr, free))}"
    return f"{_SUM}, none of which can be permuted" + (f": {why[inner[0]]}" if inner else "")


def _reason(op: Op, axis: Axis) -> str:
    """Why an op pins an axis, for people; "" if it does not."""
    if axis.role == "windowed" and not axis.outs and not any(number == 0 for number, _, _ in axis.ins):
        return _WINDOW
    if axis.role == "ordered" and not op.outputs:
        return "{fn} gives its entries to Python one by one"
    return _KINDS.get((op.kind, axis.role)) or _ROLES.get(axis.role, "")


def _deep(tensor: Tensor, wires: dict[str, Wire]) -> set[str]:
    """The wires of a tensor, parts of sums included."""
    found: set[str] = set()
    pending = [name for dim in tensor.dims for name in dim]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending.extend(inner for _, _, names in wires[name].parts for inner in names)
    return found


def _holders(tensors: tuple[Tensor, ...], wires: dict[str, Wire]) -> dict[str, set[str]]:
    """Wire -> the parameters and buffers that have it, in whatever part."""
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        if tensor.kind in ("parameter", "buffer"):
            for name in _deep(tensor, wires):
                found.setdefault(name, set()).add(tensor.name)
    return found


# wires within wires ------------------------------------------------------------------------------------------


def nesting(circuit: Circuit) -> dict[str, tuple[str, ...]]:
    """Permutable wire -> the wires that it stands within everywhere, outermost first.

    For each index of those, the wire may be permuted in a way of its own: the entries of one head need not be permuted
    as those of another. So it is if every array that has the wire has the outer one too, and every op that treats the
    two does so for each index of the outer one alone, or for all pairs alike.
    """
    wires = circuit.wires
    around: dict[str, set[str]] = {}
    for tensor in circuit.tensors:
        for name, others in _around(tensor, wires).items():
            around[name] = around[name] & others if name in around else others
    mates = {wire.name: dict(_mates(wires, wire.name)) for wire in wires.values() if wire.parts}
    seen: dict[str, list[tuple[Axis, set[str], tuple[Axis, ...]]]] = {}
    for op in circuit.ops:
        for axis in op.axes:
            for name, beside in ((axis.wire, set[str]()), *mates.get(axis.wire, {}).items()):
                seen.setdefault(name, []).append((axis, beside, op.axes))
    found = {
        name: tuple(
            other for other in around.get(name, ())
            if all(
                other in beside or any(_alone(axis, its) for its in axes if its.wire == other)
                for axis, beside, axes in seen.get(name, ())
            )
        )
        for name, wire in wires.items()
        if wire.permutable
    }
    return _acyclic(found, list(wires))


def _mates(wires: Mapping[str, Wire], whole: str) -> Iterator[tuple[str, set[str]]]:
    """The wires within a sum, each with those that it is multiplied with there."""
    for _, _, names in wires[whole].parts:
        for name in names:
            yield name, set(names) - {name}
            yield from _mates(wires, name)


def _around(tensor: Tensor, wires: Mapping[str, Wire]) -> dict[str, set[str]]:
    """For each wire of a tensor, those that stand once beside it: in its product, or in another dimension."""
    direct = Counter(name for dim in tensor.dims for name in dim)
    products = [(None, dim, names) for dim, names in enumerate(tensor.dims)]
    for dim, names in enumerate(tensor.dims):
        products += [(part, dim, product) for part, product, _ in part_products(wires, names)]
    found: dict[str, set[str]] = {}
    for part, dim, names in products:
        beside = Counter(names) + Counter(name for n, other in enumerate(tensor.dims) if n != dim for name in other)
        once = {name for name, count in beside.items() if count == 1}
        # a wire behind a sum stands in the product of each of its parts too, where it was met already
        for name in names if part is None else [n for n in names if not direct[n]]:
            mine = once - {name} if beside[name] == 1 else set[str]()
            found[name] = found[name] & mine if name in found else mine
    return found


def _alone(axis: Axis, outer: Axis) -> bool:
    """Whether an op that has both axes leaves what permutes the first differently for each index of the other."""
    places, others = [*axis.ins, *axis.outs], [*outer.ins, *outer.outs]
    for mine, its in ((axis.ins, outer.ins), (axis.outs, outer.outs)):
        numbers, beside = [number for number, _, _ in mine], [number for number, _, _ in its]
        if len(set(numbers)) != len(numbers) or not set(numbers) <= {n for n in beside if beside.count(n) == 1}:
            return False
    if outer.role in PASSING_ROLES:
        return True
    if axis.role != outer.role:
        return False
    return axis.role in ("contracted", "created") or [p[:2] for p in places] == [p[:2] for p in others]


def _acyclic(found: Mapping[str, tuple[str, ...]], order: list[str]) -> dict[str, tuple[str, ...]]:
    """Without circles: of two wires that stand within each other, the first is the outer; what is around is so all the way."""
    kept: dict[str, tuple[str, ...]] = {}
    for name in sorted(found, key=lambda name: (len(found[name]), order.index(name))):
        mine = {other for other in found[name] if name not in kept.get(other, ()) and (other in kept or other not in found)}
        while True:
            closed = {other for other in mine if set(kept.get(other, ())) <= mine}
            if closed == mine:
                break
            mine = closed
        if mine:
            kept[name] = tuple(sorted(mine, key=lambda other: (len(kept.get(other, ())), order.index(other))))
        else:
            kept[name] = ()
    return {name: kept[name] for name in found if kept[name]}
