"""Places in a network: an array that it computes, and the axis of it that holds features.

A wire such as a residual stream passes many arrays; a place tells which. It is named by the path of a module, whose output it
is: ``"layer1"``, ``"transformer.h.3"``; where the output has several axes of features, or the module several outputs, with the
wire before it: ``"model.d@model.layers.0"``. The name of an array of the circuit, such as ``"fc1.linear"``, will do as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from circuitlab.circuit import Block, Circuit, Tensor
from circuitlab.edit import after, dependents, needed
from circuitlab.errors import InputError

_DATA = frozenset({"batch", "position", "spatial", "window"})
"""Kinds of wires that number examples and positions, not features."""
_MANY = 24
"""More places than this are thinned out, to those of outer modules."""


@dataclass(frozen=True)
class Place:
    """An array of a circuit and one of its axes.

    Attributes:
        name: as it was asked for.
        tensor: name of the array.
        dim: the axis, a whole dimension: of heads times their size if the wire is one of the two.
        size: its number of entries.
    """

    name: str
    tensor: str
    dim: int
    size: int


def find(circuit: Circuit, name: str) -> Place:
    """The place of that name.

    Raises:
        InputError: it is none, or could be several; the error lists places.
    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"a place is named by a module's path, or 'wire@path', and a {type(name).__name__} was given")
    wire, _, path = name.rpartition("@")
    found = _arrays(circuit, path)
    if found is None and not wire and name in circuit.wires:
        passes = [place.name for place in outputs(circuit) if name in circuit.tensor(place.tensor).dims[place.dim]]
        if len(passes) != 1:
            raise InputError(f"the wire {name!r} is in {len(passes)} outputs of modules; say which: {_listed(f'{name}@{p}' for p in passes)}")
        return find(circuit, f"{name}@{passes[0]}")
    if found is None:
        raise _unknown(circuit, path)
    if not found:
        raise InputError(f"the module {path!r} gives no array of its own that is a floating-point number; {_some(circuit)}")
    if wire:
        if wire not in circuit.wires and not any(w.label == wire for w in circuit.wires.values()):
            raise InputError(f"{name!r}: there is no wire {wire!r}; in what {path!r} gives are {_wires(circuit, found)}")
        mine = {wire} if wire in circuit.wires else {w.name for w in circuit.wires.values() if w.label == wire}
        spots = [(tensor, dim) for tensor in found for dim, names in enumerate(tensor.dims) if mine.intersection(names)]
        if not spots:
            raise InputError(f"{name!r}: the wire {wire!r} is in nothing that {path!r} gives; there are {_wires(circuit, found)}")
    else:
        spots = [(tensor, dim) for tensor in found for dim in _features(circuit, tensor)]
    if len(spots) != 1:
        arrays = {tensor.name for tensor, _ in spots}
        if len(arrays) > 1:
            raise InputError(f"{path!r} gives several arrays; say which: {_listed(f'{wire}@{a}' if wire else a for a in arrays)}")
        raise InputError(f"{name!r} has {len(spots)} axes of features; say which: "
                         f"{_listed(f'{w}@{path}' for w in _wires(circuit, found).split(', '))}")
    tensor, dim = spots[0]
    return Place(name, tensor.name, dim, tensor.shape[dim])


def _arrays(circuit: Circuit, path: str) -> list[Tensor] | None:
    """The floating-point arrays that a path stands for; None where it is no path."""
    block = next((block for block in circuit.root.blocks() if block.name == path), None)
    if block is not None:
        return [tensor for tensor in _given(circuit, block) if tensor.dtype.startswith(("float", "bfloat"))]
    found = next((tensor for tensor in circuit.tensors if tensor.name == path and tensor.kind == "value"), None)
    return None if found is None else [found]


def _given(circuit: Circuit, block: Block) -> Iterator[Tensor]:
    """The arrays that a block makes and that are read outside of it, or returned."""
    inside, ends = set(block.op_names()), set(circuit.outputs)
    for op in map(circuit.op, block.op_names()):
        for name in op.outputs:
            if name in ends or any(reader not in inside for reader in circuit.consumers.get(name, ())):
                yield circuit.tensor(name)


def _features(circuit: Circuit, tensor: Tensor) -> list[int]:
    return [dim for dim, names in enumerate(tensor.dims) if any(circuit.wires[name].kind not in _DATA for name in names)]


def outputs(circuit: Circuit) -> list[Place]:
    """The places that are named by a module alone, each array once, by the outermost module; in the order they are made."""
    found: dict[str, Place] = {}
    for block in sorted(circuit.root.blocks(), key=lambda block: block.name.count(".")):
        arrays = _arrays(circuit, block.name) if block.kind == "module" else None
        if arrays and len(arrays) == 1 and arrays[0].name not in found:
            dims = _features(circuit, arrays[0])
            if len(dims) == 1:
                found[arrays[0].name] = Place(block.name, arrays[0].name, dims[0], arrays[0].shape[dims[0]])
    order = {tensor.name: number for number, tensor in enumerate(circuit.tensors)}
    return sorted(found.values(), key=lambda place: order[place.tensor])


def layers(circuit: Circuit) -> list[Place]:
    """The places that all data pass: outputs of modules around which nothing that was learned, or given, goes.

    Of very many, those of outer modules.

    Raises:
        InputError: there is none.
    """
    inputs = dependents(circuit, circuit.inputs)
    learned = dependents(circuit, [tensor.name for tensor in circuit.tensors if tensor.kind == "parameter"])
    found = [place for place in outputs(circuit) if place.tensor in inputs and _is_passed(circuit, place, inputs & learned)]
    if not found:
        raise InputError(f"{circuit.title} has no module that all data go through one after the other; name places: {_some(circuit)}")
    depth = 0
    while len(found) > _MANY and any(place.name.count(".") > depth for place in found):
        outer = [place for place in found if place.name.count(".") <= depth]
        if len(outer) > 1:
            return outer
        depth += 1
    return found


def _is_passed(circuit: Circuit, place: Place, data: set[str]) -> bool:
    reached = dependents(circuit, [place.tensor])
    if place.tensor in circuit.outputs or reached.isdisjoint(circuit.outputs):
        return False
    rest = after(circuit, place.tensor)
    if any(circuit.tensor(name).dtype.startswith(("float", "bfloat")) for name in rest.inputs[1:]):
        return False
    made = {name for op in needed(circuit, rest.outputs, (place.tensor,)) for name in circuit.op(op).outputs}
    return not any(name in data and name not in reached for name in made)


def _wires(circuit: Circuit, tensors: list[Tensor]) -> str:
    names = [name for tensor in tensors for dim in tensor.dims for name in dim if circuit.wires[name].kind not in _DATA]
    return ", ".join(dict.fromkeys(names))


def _listed(names: object) -> str:
    found = [repr(name) for name in dict.fromkeys(names)]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")


def _some(circuit: Circuit) -> str:
    return f"places are {_listed(place.name for place in outputs(circuit))}"


def _unknown(circuit: Circuit, path: str) -> InputError:
    known = [place.name for place in outputs(circuit)]
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
    return InputError(f"{circuit.title} has no place {path!r}; {hint}{_some(circuit)}")
