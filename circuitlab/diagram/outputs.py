"""What is not drawn: families of further outputs, and what leads to no output; with notes that say so."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from circuitlab.circuit import Block, Circuit, Op

_FAMILY = 3


@dataclass(frozen=True)
class Shown:
    """What of a circuit is drawn: all of this one but some ops, and notes of what is left out."""

    circuit: Circuit
    hidden: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def main_part(circuit: Circuit) -> Shown:
    """The circuit without its families of further outputs, and with what leads to no output hidden.

    A family is three or more outputs of one shape, made by the same line of code (the hidden states or attention
    weights of each layer), or what lies deeper in what forward returned than its first output does
    (``past_key_values.layers[0].keys``). Those of one family with the first output are all main. What leads to no output
    steers Python (a warning about padding, a number by ``.item()``), or is thrown away: folded blocks still count it in.
    """
    out = _further(circuit)
    outputs = tuple(name for name in circuit.outputs if name not in out)
    every = _needed(circuit, circuit.outputs)
    needed = _needed(circuit, outputs) if out else every
    idle = [op for op in circuit.ops if op.name not in every] if outputs else []
    if not out and not idle:
        return Shown(circuit)
    kept = needed | _needed(circuit, tuple(name for op in idle for name in op.outputs)) | {op.name for op in idle}
    returns = tuple(path for n, path in zip(circuit.outputs, circuit.returns, strict=False) if n not in out)
    ops = tuple(op for op in circuit.ops if op.name in kept)
    part = replace(circuit, ops=ops, root=_pruned(circuit.root, kept), outputs=outputs, returns=returns)
    notes = _outputs_note(circuit, out), _idle_note([op for op in idle if op.kind != "reindex"])
    return Shown(part, frozenset(kept - needed), tuple(filter(None, notes)))


def _further(circuit: Circuit) -> set[str]:
    """The outputs that are not main."""
    families: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name in circuit.outputs:
        tensor = circuit.tensor(name)
        if tensor.op:
            op = circuit.op(tensor.op)
            families.setdefault((op.fn, op.source, tensor.shape), []).append(name)
    first = circuit.outputs[0] if circuit.outputs else ""
    out = {name for found in families.values() if len(found) >= _FAMILY and first not in found for name in found}
    paths = dict(zip(circuit.outputs, circuit.returns, strict=False))
    depth = paths.get(first, "").count(".")
    return out | {n for n, path in paths.items() if n != first and (_deep(path) or path.count(".") > depth)}


def _deep(path: str) -> bool:
    return len(re.findall(r"\w+", path)) > 2


def _needed(circuit: Circuit, outputs: tuple[str, ...]) -> set[str]:
    """The ops that outputs are made of."""
    needed: set[str] = set()
    pending = [circuit.tensor(name).op for name in outputs]
    while pending:
        name = pending.pop()
        if name and name not in needed:
            needed.add(name)
            pending.extend(circuit.tensor(read).op for read in circuit.op(name).inputs)
    return needed


def _pruned(block: Block, needed: set[str]) -> Block:
    items = tuple(
        _pruned(item, needed) if isinstance(item, Block) else item
        for item in block.items
        if isinstance(item, Block) or item in needed
    )
    return replace(block, items=tuple(i for i in items if not isinstance(i, Block) or i.items))


def _outputs_note(circuit: Circuit, out: set[str]) -> str:
    names = [circuit.returned(name) for name in circuit.outputs if name in out]
    count = len(names)
    return f"{count} more output{' is' if count == 1 else 's are'} not drawn, such as {names[0]}" if names else ""


def _idle_note(idle: list[Op]) -> str:
    """Of the last of these ops, as that is what the others are for."""
    if not idle:
        return ""
    words = "operation is not drawn, as it leads" if len(idle) == 1 else "operations are not drawn, as they lead"
    return f"{len(idle)} {words} to no output but through Python: {idle[-1].fn} in {idle[-1].source.rpartition('/')[2]}"
