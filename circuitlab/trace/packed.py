"""Weights that torch packs for a kernel into objects of its own: what can be seen of them."""

from __future__ import annotations

from typing import Any

import torch

from circuitlab.trace.events import Operand, Packed, Value

_CONV = ("stride", "padding", "output_padding", "dilation", "groups", "transpose")


def unpacked(value: torch.ScriptObject, name: str) -> Packed | None:
    """The weight in a packed object, as an operand; None where it does not say."""
    held: Any = value
    try:
        found = held.unpack()
        weight, *bias = found if isinstance(found, tuple) else (found,)
        options = {"bias": bool(bias) and bias[0] is not None}
        if held._has_method("stride"):
            options |= {key: getattr(held, key)() for key in _CONV}
    except (AttributeError, RuntimeError, TypeError):
        return None
    if not isinstance(weight, torch.Tensor):
        return None
    made = Value(name, tuple(weight.shape), str(weight.dtype)[6:], "constant")
    made.learned = True
    return Packed(0, made, options)


def put_last(operands: list[Operand]) -> None:
    """Packed weights are numbered after the tensors."""
    if any(isinstance(operand, Packed) for operand in operands):
        operands.sort(key=lambda operand: isinstance(operand, Packed))
        for slot, operand in enumerate(operands):
            operand.slot = slot
