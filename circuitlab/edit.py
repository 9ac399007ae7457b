"""Circuit -> Circuit: the same run under other names, or the part of it before or after some arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from circuitlab.circuit import Block, Circuit, Wire, unknown
from circuitlab.errors import InputError


def rename(circuit: Circuit, names: Mapping[str, str]) -> Circuit:
    """Other names for wires, everywhere they occur.

    Args:
        circuit: is left as it is.
        names: wire name, or a label that only one wire has -> new name. The new name's last word (after the last dot)
            becomes the label.

    Raises:
        InputError: an unknown wire, a label of several wires, an empty name, or a name that is taken.
    """
    labels: dict[str, list[str]] = {}
    for wire in circuit.wires.values():
        labels.setdefault(wire.label, []).append(wire.name)
    change: dict[str, str] = {}
    for old, new in names.items():
        if not isinstance(new, str) or not new.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"rename({old!r} -> {new!r}): the new name must be a word")
        found = [old] if old in circuit.wires else labels.get(old, [])
        if not found:
            raise unknown("wire", old, [*circuit.wires, *labels])
        if len(found) > 1:
            raise InputError(f"{len(found)} wires have the label {old!r}; give one of their names, e.g. {found[:4]}")
        change[found[0]] = new.strip()
    kept = [name for name in circuit.wires if name not in change]
    taken = [*kept, *change.values()]
    twice = next((name for name in change.values() if taken.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"the name {twice!r} would belong to two wires; wires that are one are found, not named so")

    def of(name: str) -> str:
        return change.get(name, name)

    def wire_of(wire: Wire) -> Wire:
        parts = tuple((start, stop, tuple(of(n) for n in inner)) for start, stop, inner in wire.parts)
        new = change.get(wire.name)
        if new is None:
            return replace(wire, parts=parts)
        return replace(wire, name=new, label=new.rpartition(".")[2] or new, parts=parts)

    return replace(
        circuit,
        wires={of(name): wire_of(wire) for name, wire in circuit.wires.items()},
        tensors=tuple(replace(t, dims=tuple(tuple(of(n) for n in dim) for dim in t.dims)) for t in circuit.tensors),
        ops=tuple(replace(op, axes=tuple(replace(a, wire=of(a.wire)) for a in op.axes)) for op in circuit.ops),
    )


def before(circuit: Circuit, tensors: Iterable[str]) -> Circuit:
    """What of a run makes some arrays: it takes what the whole takes, and gives these, in a tuple if they are several.

    Args:
        circuit: is left as it is.
        tensors: names of arrays that the run makes.
    """
    outputs = tuple(tensors)
    ops = needed(circuit, outputs)
    returns = ("",) if len(outputs) == 1 else tuple(f"[{number}]" for number in range(len(outputs)))
    return _part(circuit, ops, circuit.inputs, outputs, returns)


def after(circuit: Circuit, tensor: str, *, whole: bool = False) -> Circuit:
    """What of a run is made of an array: it takes that, and what else is needed of the inputs, and gives what depends on it.

    What does not depend on the array but is needed (masks, position embeddings, a residual path around it) is computed as
    in the whole, of the inputs.

    Args:
        circuit: is left as it is.
        tensor: name of an array that the run makes.
        whole: give all that the whole gives: also outputs that do not depend on the array, and the array itself if it is one.

    Raises:
        InputError: no output depends on it.
    """
    reached = dependents(circuit, [tensor])
    outputs = tuple(name for name in circuit.outputs if name in reached and name != tensor)
    if not outputs:
        raise InputError(f"no output of {circuit.title} is made of {tensor!r}: there is nothing after it")
    outputs = circuit.outputs if whole else outputs
    returns = tuple(path for name, path in zip(circuit.outputs, circuit.returns, strict=False) if name in outputs)
    ops = needed(circuit, outputs, (tensor,))
    read = {name for op in circuit.ops if op.name in ops for name in op.inputs}
    inputs = (tensor, *(name for name in circuit.inputs if name in read and name != tensor))
    part = _part(circuit, ops, inputs, outputs, returns or ("",) * len(outputs))
    return replace(part, root=replace(part.root, kind="module"))  # it does not take what the whole takes


def needed(circuit: Circuit, outputs: Iterable[str], given: Iterable[str] = ()) -> set[str]:
    """The ops that make some arrays, of other arrays that are given; and those that check what they read."""
    made_by = {name: op for op in circuit.ops for name in op.outputs}
    known, found = set(given), set[str]()
    pending = [name for name in outputs if name not in known]
    while pending:
        op = made_by.get(pending.pop())
        if op is not None and op.name not in found:
            found.add(op.name)
            pending.extend(name for name in op.inputs if name not in known)
    for op in circuit.ops:  # numbers that steered Python code
        if not op.outputs and all(name in known or name not in made_by or made_by[name].name in found for name in op.inputs):
            found.add(op.name)
    return found


def dependents(circuit: Circuit, tensors: Iterable[str]) -> set[str]:
    """These arrays, and all that are made of them."""
    found = set(tensors)
    for op in circuit.ops:
        if not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return found


def _part(circuit: Circuit, ops: set[str], inputs: tuple[str, ...], outputs: tuple[str, ...], returns: tuple[str, ...]) -> Circuit:
    def pruned(block: Block) -> Block:
        items = (pruned(item) if isinstance(item, Block) else item for item in block.items)
        return replace(block, items=tuple(i for i in items if (any(True for _ in i.op_names()) if isinstance(i, Block) else i in ops)))

    kept = tuple(op for op in circuit.ops if op.name in ops)
    used = {name for op in kept for name in (*op.inputs, *op.outputs)} | {*inputs, *outputs}
    tensors = tuple(
        replace(tensor, kind="input", op="") if tensor.name in inputs else tensor for tensor in circuit.tensors if tensor.name in used
    )
    return replace(circuit, ops=kept, tensors=tensors, root=pruned(circuit.root), inputs=inputs, outputs=outputs, returns=returns)
