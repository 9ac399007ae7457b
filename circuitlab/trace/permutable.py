"""Which wires can be permuted without changing the function, where they sit, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from circuitlab.circuit import Op, Tensor, Wire

Part = tuple[int, int] | None
WherePlaces = dict[str, tuple[tuple[str, int, int, Part], ...]]

_SUM = "it is a sum of parts; those may be permutable one by one"
_PINNING = {
    "ordered": "depends on positions",
    "indexed": "picks entries by number",
    "windowed": "slides a window over it",
    "gathered": "looks entries up by number",
    "opaque": "has no rule, so nothing is known of what it does",
}


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
    inner = 1
    for name in names[1:]:
        inner *= wires[name].size
    for start, stop, parts in wires[names[0]].parts:
        part = (offset + start * inner, offset + stop * inner)
        for factor, name in enumerate(parts):
            yield name, factor, part
        if parts:
            yield from _in_parts(wires, (*parts, *names[1:]), part[0])


def permutability(
    wires: dict[str, Wire],
    ops: tuple[Op, ...],
    tensors: tuple[Tensor, ...],
    inputs: tuple[str, ...],
    returns: Mapping[str, str],
    places: WherePlaces,
    picked: set[str],
) -> dict[str, str]:
    """For each wire "" if it is permutable, else the reason why not, for people.

    ``returns`` holds the outputs, each with where it stands in what forward returned.
    """
    why = dict.fromkeys(picked, "single entries of it are taken by their number")
    by_name = {tensor.name: tensor for tensor in tensors}
    ends = [(name, f"input {name!r}") for name in inputs]
    ends += [(name, f"output {path or name!r}") for name, path in returns.items()]
    for name, end in ends:
        for wire in _deep(by_name[name], wires):
            why.setdefault(wire, f"it is an axis of the {end}")
    for op in ops:
        for axis in op.axes:
            if op.kind == "cat" and axis.role == "joined" and not axis.ins and not wires[axis.wire].parts:
                why.setdefault(axis.wire, f"{op.fn} in {op.name!r} numbers different arrays with it")
            if axis.role in _PINNING:
                where = f" ({op.source})" if op.source else ""
                why.setdefault(axis.wire, f"{op.fn} in {op.name!r} {_PINNING[axis.role]}{where}")
    statistics = {n for op in ops if op.kind == "norm" for n in op.inputs}
    for tensor in tensors:
        if tensor.kind == "constant" or (tensor.kind == "buffer" and tensor.name not in statistics):
            for wire in _deep(tensor, wires):
                why.setdefault(wire, f"the {tensor.kind} {tensor.name!r} has it, which is no parameter")
    holders = _holders(tensors, wires)
    for wire in wires.values():
        if wire.parts:
            why.setdefault(wire.name, _SUM)
        elif wire.name not in holders:
            why.setdefault(wire.name, "no parameter has it")
        elif holders[wire.name] != {place[0] for place in places.get(wire.name, ())}:
            # every parameter that has the wire must have it at a place that `places` can name
            why.setdefault(wire.name, "it lies inside a part that cannot be told apart in a parameter")
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
    return {name: why.get(name, "") for name in wires}


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
