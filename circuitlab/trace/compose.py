"""Fused functions in their unfused meaning, as plain torch code that is recorded in their place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


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


REPLACEMENTS: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": scaled_dot_product_attention}
"""Name of a fused function -> what is recorded in its place."""
