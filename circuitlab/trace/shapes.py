"""Results of simple calls on meta tensors without making them: torch computes many shapes in slow Python.

`quick` answers only where shape, type and layout are beyond doubt: contiguous operands of one floating type. Everything
else is really called. `tests/test_shapes.py` holds each answer against torch's own.
"""

from __future__ import annotations

from typing import Any

import torch

_BINARY = frozenset({"add", "sub", "mul", "div", "truediv"})
_SAME = frozenset({"neg", "tril", "triu", "logical_not", "masked_fill", "rms_norm", *_BINARY})


def quick(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a function gives on meta, or None where it must be called."""
    if name in ("grouped_mm", "_grouped_mm"):
        return _grouped_mm(*args, **kwargs) if len(args) > 1 else None
    if name not in _SAME or not args or (kwargs and not (name == "rms_norm" and kwargs.keys() <= {"weight", "eps"})):
        return None
    first = args[0]
    if not isinstance(first, torch.Tensor) or not first.is_contiguous() or type(first) is not torch.Tensor:
        return None
    if name == "logical_not":
        return torch.empty_like(first, dtype=torch.bool)
    if name in ("tril", "triu"):
        return torch.empty_like(first) if first.dim() >= 2 else None
    if not first.is_floating_point():
        return None
    if name == "neg":
        return torch.empty_like(first)
    if name in _BINARY:
        return _binary(first, args[1]) if len(args) == 2 else None
    if name == "masked_fill":
        fits = len(args) == 3 and isinstance(args[2], float) and _within(args[1], first)
        return torch.empty_like(first) if fits and args[1].dtype == torch.bool else None
    sizes = tuple(args[1]) if len(args) > 1 and isinstance(args[1], (tuple, list)) else ()
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    plain = weight is None or (isinstance(weight, torch.Tensor) and weight.dtype == first.dtype)
    known = plain and bool(sizes) and tuple(first.shape[-len(sizes) :]) == sizes
    return torch.empty_like(first) if known and (weight is None or tuple(weight.shape) == sizes) else None


def _binary(first: torch.Tensor, other: Any) -> torch.Tensor | None:
    if type(other) in (int, float):
        return torch.empty_like(first)
    if not isinstance(other, torch.Tensor) or other.dtype != first.dtype or not _within(other, first):
        return None
    return torch.empty_like(first)


def _grouped_mm(
    input: torch.Tensor, other: torch.Tensor, offs: torch.Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor | None:
    """Torch knows this on meta for bfloat16 only."""
    ranks = (input.dim(), other.dim())
    fits = input.shape[-1] == other.shape[-2] and (ranks != (3, 3) or input.shape[0] == other.shape[0])
    plain = bias is None and out_dtype is None and input.dtype == other.dtype and input.is_floating_point()
    if not fits or not plain or not set(ranks) <= {2, 3} or (offs is None) != (ranks == (3, 3)):
        return None
    groups = [offs.shape[0]] if offs is not None and ranks == (2, 2) else [*input.shape[:-2]] if ranks == (3, 3) else []
    return input.new_empty((*groups, input.shape[-2], other.shape[-1]))


def _within(other: Any, first: torch.Tensor) -> bool:
    """Whether a contiguous tensor broadcasts to the shape of another, without making it larger."""
    if not isinstance(other, torch.Tensor) or not other.is_meta or not other.is_contiguous():
        return False
    lead = first.dim() - other.dim()
    if lead < 0 or (other.dim() == 0 and not other.is_floating_point()):
        return False
    return all(a in (1, b) for a, b in zip(other.shape, first.shape[lead:], strict=True))
