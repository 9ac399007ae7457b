"""Self-attention over the positions of an image (Zhang et al., 2019): 1x1 convolutions make queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VisualAttention(nn.Module):
    """(b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int = 64, key: int = 8) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, key, 1)
        self.key = nn.Conv2d(channels, key, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.einsum("bkx,bky->bxy", q, k).softmax(dim=-1)
        mixed = torch.einsum("bxy,bcy->bcx", weights, v).view_as(x)
        return x + self.gain * mixed
