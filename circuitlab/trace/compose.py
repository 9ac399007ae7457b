"""Fused functions in their unfused meaning, as plain torch code that is recorded in their place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(q kᵀ · scale + mask) v, as its documentation defines it."""
    shape = query.shape
    grouped = enable_gqa and query.size(-3) != key.size(-3)
    if grouped:
        # each key-value head serves a group of query heads
        query = query.unflatten(-3, (key.size(-3), query.size(-3) // key.size(-3)))
        key, value = key.unsqueeze(-3), value.unsqueeze(-3)
        if attn_mask is not None and attn_mask.dim() >= 3 and attn_mask.size(-3) > 1:
            attn_mask = attn_mask.unflatten(-3, (query.size(-4), query.size(-3)))
        elif attn_mask is not None and attn_mask.dim() >= 3:
            attn_mask = attn_mask.unsqueeze(-3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        causal = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(causal.logical_not(), float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        else:
            scores = scores + attn_mask
    weights = torch.softmax(scores, dim=-1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    out = torch.matmul(weights, value)
    return out.reshape(*shape[:-1], value.size(-1)) if grouped else out


class _Looked(TorchFunctionMode):
    """``table[head, query]`` with numbers in arrays reads an entry, also where ``vmap`` hides that they are many."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__getitem__":
            table, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
            numbers = [isinstance(item, torch.Tensor) and item.dtype != torch.bool for item in index]
            if any(numbers) and all(number or isinstance(item, int) for number, item in zip(numbers, index, strict=True)):
                index = [torch.tensor(item, device=table.device) if isinstance(item, int) else item for item in index]
                return torch.ops.aten.index.Tensor(table, index)
        return func(*args, **(kwargs or {}))


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_buffers: tuple[Any, ...] = (),
    mask_buffers: tuple[Any, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(score_mod(q kᵀ · scale) where mask_mod) v, and of the scores log₂ Σ 2ˢ and the largest, as its kernel."""
    mask_mod, dtype = block_mask[-1], query.dtype
    grouped = query.size(1) != key.size(1)
    rows = query.unflatten(1, (key.size(1), query.size(1) // key.size(1))) if grouped else query
    columns = key.unsqueeze(2) if grouped else key
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = _cast(rows, precise), _cast(columns, precise)
    scores = torch.matmul(rows, columns.transpose(-2, -1)) * scale
    if score_mod is not flex._identity or mask_mod is not flex.noop_mask:
        def modified(score: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
            made = score if score_mod is flex._identity else score_mod(score, *places, *score_buffers)
            if mask_mod is flex.noop_mask:
                return made
            return torch.where(mask_mod(*places, *mask_buffers), made, float("-inf"))

        scores = scores.flatten(1, 2) if grouped else scores
        places = [torch.arange(size, device=query.device) for size in scores.shape]
        each: Callable[..., torch.Tensor] = modified
        for dim in (3, 2, 1, 0):
            each = torch.vmap(each, (0, *(0 if other == dim else None for other in range(4))))
        with _Looked():
            scores = each(scores, *places)
        scores = scores.unflatten(1, rows.shape[1:3]) if grouped else scores
    weights = _cast(torch._safe_softmax(scores, dim=-1), dtype)  # pyright: ignore[reportPrivateImportUsage]
    out = torch.matmul(weights, _cast(value.unsqueeze(2) if grouped else value, dtype))
    stats = scores.logsumexp(dim=-1) / math.log(2), scores.amax(dim=-1) / math.log(2)
    if grouped:
        return out.flatten(1, 2), stats[0].flatten(1, 2), stats[1].flatten(1, 2)
    return out, *stats


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def before_relu(func: Any, name: str) -> Callable[..., Any] | None:
    """Of an op of ``torch.ops.quantized`` with a fused relu, the two in turn; None of others."""
    single = re.sub("(?<!leaky)_relu", "", name)
    if single == name or not str(func).startswith("quantized."):
        return None
    inner = getattr(torch.ops.quantized, single, None)
    return None if inner is None else lambda *args, **kwargs: torch.relu(inner(*args, **kwargs))


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "flex_attention": flex_attention,
}
"""Name of a fused function -> what is recorded in its place."""
