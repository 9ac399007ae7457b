"""Scaled dot-product attention and multi-head attention (Vaswani et al., 2017), written out in plain operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ScaledDotProductAttention(nn.Module):
    """Queries (b, y, k), keys (b, x, k), values (b, x, k) -> (b, y, k)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("byk,bxk->byx", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("byx,bxk->byk", scores.softmax(dim=-1), v)


class MultiHeadAttention(nn.Module):
    """Queries from (b, y, m), keys and values from (b, x, m) -> (b, y, m)."""

    def __init__(self, width: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for layer, given in ((self.query, y), (self.key, x), (self.value, x))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        mixed = scores.softmax(dim=-1) @ v
        return self.out(mixed.transpose(-3, -2).flatten(-2))
