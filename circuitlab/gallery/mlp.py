"""A multilayer perceptron that recognises small images: the first figure of *Neural Circuit Diagrams*."""

from __future__ import annotations

from torch import Tensor, nn


class Recogniser(nn.Module):
    """Grey images (b, 28, 28) -> class probabilities (b, 10)."""

    def __init__(self, size: int = 28, hidden: int = 512, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(size * size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).softmax(dim=-1)
