"""What is not drawn: families of further outputs, and what no output needs; with a note that says so."""

from __future__ import annotations

import re
from dataclasses import replace

from circuitlab.circuit import Block, Circuit, Op

_FAMILY = 3


def main_part(circuit: Circuit) -> tuple[Circuit, tuple[str, ...]]:
    """The circuit without its families of further outputs, and without what no output needs.

    A family is three or more outputs of one shape, made by the same line of code (the hidden states or attention
    weights of each layer), or what lies deeper in what forward returned than its first output does
    (``past_key_values.layers[0].keys``). Those of one family with the first output are all main. What no output needs
    only steers Python (a warning about padding, a choice by ``.item()``), or is thrown away.

    Returns:
        the circuit, and notes of what was left out.
    """
    out = _further(circuit)
    outputs = tuple(name for name in circuit.outputs if name not in out)
    every, needed = _needed(circuit, circuit.outputs), _needed(circuit, outputs)
    idle = [op for op in circuit.ops if op.name not in every and op.kind != "reindex"] if outputs else []
    if not out and not idle:
        return circuit, ()
    kept = tuple(op for op in circuit.ops if op.name in needed)
    returns = tuple(path for n, path in zip(circuit.outputs, circuit.returns, strict=False) if n not in out)
    shown = replace(circuit, ops=kept, root=_pruned(circuit.root, needed), outputs=outputs, returns=returns)
    return shown, tuple(filter(None, (_outputs_note(circuit, out), _idle_note(circuit, idle))))


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


def _idle_note(circuit: Circuit, idle: list[Op]) -> str:
    """Of the last of these ops, as that is what the others are for."""
    if not idle:
        return ""
    words = "operation that no output needs is" if len(idle) == 1 else "operations that no output needs are"
    return f"{len(idle)} {words} not drawn, such as {idle[-1].fn} in {idle[-1].source.rpartition('/')[2]}"
