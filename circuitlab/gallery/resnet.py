"""A residual network with identity mappings (He et al., 2016b): norm and ReLU come before each convolution."""

from __future__ import annotations

from torch import Tensor, nn


class IdentityBlock(nn.Module):
    """(b, c, h, w) -> (b, c', h / stride, w / stride)."""

    def __init__(self, channels: int, wider: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        same = stride == 1 and channels == wider
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, wider, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.norm1(x)))
        out = self.conv2(self.relu(self.norm2(out)))
        return out + self.shortcut(x)


class IdentityResNet(nn.Module):
    """Images (b, 3, h, w) -> logits (b, classes)."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64), depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        before = channels[0]
        for level, wider in enumerate(channels):
            for number in range(depth):
                blocks.append(IdentityBlock(before, wider, stride=2 if level and not number else 1))
                before = wider
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        self.relu = nn.ReLU()
        self.readout = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.blocks(self.stem(x))))
        return self.readout(x.mean(dim=(-2, -1)))
