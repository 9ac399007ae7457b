"""Weights that torch packs for a kernel into objects of its own: what can be seen of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from circuitlab.trace.events import Operand, Packed, Value

if TYPE_CHECKING:
    from circuitlab.trace.watch import Recorder

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


def operand(recorder: Recorder, value: torch.ScriptObject, operands: list[Operand]) -> Any:
    """A packed weight as one more operand; what has none that we can see, as it is."""
    if id(value) not in recorder.packs:
        made = unpacked(value, recorder._name(recorder.constants.get(id(value), "packed")))
        recorder.packs[id(value)] = value, made
        if made is not None:
            recorder.recording.values.append(made.value)
    made = recorder.packs[id(value)][1]
    if made is None:
        return value
    operands.append(Packed(len(operands), made.value, made.options))
    return operands[-1]


def put_last(operands: list[Operand]) -> None:
    """Packed weights are numbered after the tensors."""
    if any(isinstance(operand, Packed) for operand in operands):
        operands.sort(key=lambda operand: isinstance(operand, Packed))
        for slot, operand in enumerate(operands):
            operand.slot = slot
