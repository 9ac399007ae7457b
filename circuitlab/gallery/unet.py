"""A U-Net (Ronneberger et al., 2015): down by pooling, up by transposed convolution, with skips joined by concatenation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Two convolutions, each with ReLU. (b, c, h, w) -> (b, c', h, w)."""

    def __init__(self, channels: int, wider: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, 3, padding=1)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))))


class UNet(nn.Module):
    """Images (b, c, h, w) -> class scores (b, classes, h, w); h and w are multiples of 2 ** (levels - 1)."""

    def __init__(self, channels: int = 1, width: int = 16, levels: int = 3, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            DoubleConv(before, after) for before, after in zip([channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, stride=2) for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.join = nn.ModuleList(DoubleConv(2 * narrow, narrow) for narrow in widths[-2::-1])
        self.readout = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            if level:
                skips.append(x)
                x = self.pool(x)
            x = block(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], dim=1))
        return self.readout(x)
