"""Small classifiers of handwritten digits: pairs of networks that differ in their seed alone, to walk between.

The images are the 1,797 of 8 x 8 pixels that come with scikit-learn (the test set of UCI's *Optical Recognition of
Handwritten Digits*), so that nothing is downloaded. Any of the models is trained in seconds on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitlab.gallery.gpt import Block

SIDE, CLASSES = 8, 10
TEST = 360
BATCH = 64


class Digits(NamedTuple):
    """The images, in [-1, 1], and their classes: one batch for training data and one for test data."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int = 0) -> Digits:
    """1,437 images to train on and 360 to test on, split at random by the seed; (n, 1, 8, 8) and (n,)."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, SIDE, SIDE) / 8 - 1
    y = torch.from_numpy(classes).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu")
    test, train = order[:TEST], order[TEST:]
    return Digits((x[train], y[train]), (x[test], y[test]))


class MLP(nn.Module):
    """Two hidden layers with ReLU. (b, 1, 8, 8) -> (b, 10)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(SIDE * SIDE, width)
        self.second = nn.Linear(width, width)
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        return self.readout(self.second(x).relu())


class CNN(nn.Module):
    """Four convolutions, a pool, the mean over pixels and a linear map. (b, 1, 8, 8) -> (b, 10).

    Args:
        width: channels of the first two convolutions; the others have twice as many.
        norm: makes what follows each convolution, of its number of channels: `nn.BatchNorm2d`, or None for nothing.
    """

    def __init__(self, width: int = 16, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        channels = [1, width, width, 2 * width, 2 * width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels))
        self.norms = nn.ModuleList(norm(n) if norm else nn.Identity() for n in channels[1:])
        self.readout = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for at, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x)).relu()
            if at == 1:
                x = F.max_pool2d(x, 2)
        return self.readout(x.mean((2, 3)))


class Transformer(nn.Module):
    """Each row of pixels is a position, which sees those above it; then the mean over positions. (b, 1, 8, 8) -> (b, 10)."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.positions = nn.Parameter(torch.randn(SIDE, width) * 0.5)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1)) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x).mean(1))


def train(make: Callable[[], nn.Module], data: Digits, seed: int = 0, epochs: int = 40, *, each: Callable[[int, nn.Module], None] | None = None) -> nn.Module:
    """A network trained with Adam at a rate of 0.001 on batches of 64, from a seed of both its first weights and its batches.

    Args:
        make: makes the network.
        data: is trained on its first half.
        seed: the same seed gives the same network; the global random state is as before.
        epochs: walks over the training data.
        each: is called before training and after each epoch, with the number of epochs done and the network.

    Returns:
        The network, in eval mode.
    """
    x, y = data.train
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = make()
        device = next(model.parameters()).device
        x, y = x.to(device), y.to(device)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        if each is not None:
            each(0, model)
        for epoch in range(epochs):
            for batch in torch.randperm(len(x), device="cpu").split(BATCH):
                optimiser.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimiser.step()
            if each is not None:
                each(epoch + 1, model)
    return model.eval()
