"""Main and further outputs: caches and hidden states of every layer would be drawn as dozens of long wires."""

from __future__ import annotations

import re
from dataclasses import replace

from circuitlab.circuit import Block, Circuit

_FAMILY = 3


def main_part(circuit: Circuit) -> tuple[Circuit, tuple[str, ...]]:
    """The circuit without its families of further outputs, and without what only they need.

    A family is three or more outputs of one shape, made by the same line of code (the hidden states or attention
    weights of each layer), or what lies deep in what forward returned (``past_key_values.layers[0].keys``). Those of one
    family with the first output are all main.

    Returns:
        the circuit, and the outputs that were left out.
    """
    families: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name in circuit.outputs:
        tensor = circuit.tensor(name)
        if tensor.op:
            op = circuit.op(tensor.op)
            families.setdefault((op.fn, op.source, tensor.shape), []).append(name)
    first = circuit.outputs[0] if circuit.outputs else ""
    out = {name for found in families.values() if len(found) >= _FAMILY and first not in found for name in found}
    out |= {n for n, path in zip(circuit.outputs, circuit.returns, strict=False) if _deep(path)} - {first}
    if not out:
        return circuit, ()
    outputs = tuple(name for name in circuit.outputs if name not in out)
    needed: set[str] = set()
    pending = [circuit.tensor(name).op for name in outputs]
    while pending:
        name = pending.pop()
        if name and name not in needed:
            needed.add(name)
            pending.extend(circuit.tensor(read).op for read in circuit.op(name).inputs)
    kept = tuple(op for op in circuit.ops if op.name in needed)
    root = _pruned(circuit.root, needed)
    left = tuple(circuit.returned(n) for n in circuit.outputs if n in out)
    returns = tuple(path for n, path in zip(circuit.outputs, circuit.returns, strict=False) if n not in out)
    return replace(circuit, ops=kept, root=root, outputs=outputs, returns=returns), left


def _deep(path: str) -> bool:
    return len(re.findall(r"\w+", path)) > 2


def _pruned(block: Block, needed: set[str]) -> Block:
    items = tuple(
        _pruned(item, needed) if isinstance(item, Block) else item
        for item in block.items
        if isinstance(item, Block) or item in needed
    )
    return replace(block, items=tuple(i for i in items if not isinstance(i, Block) or i.items))


def left_out_note(names: tuple[str, ...]) -> str:
    """What to say of outputs that were left out; "" if there are none."""
    count = len(names)
    return f"{count} more output{' is' if count == 1 else 's are'} not drawn, such as {next(iter(names))}" if names else ""
