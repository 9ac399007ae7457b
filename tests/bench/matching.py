"""Matching of weights against the rebasin package, where that is installed: both from one start, on one core."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import circuitlab as cl
from circuitlab.gallery import digits
from tests.test_symmetry import Residual


def resnet20(width=64):
    sizes = [(width, width, 1)] * 3 + [(width, 2 * width, 2)] + [(2 * width, 2 * width, 1)] * 2
    sizes += [(2 * width, 4 * width, 2)] + [(4 * width, 4 * width, 1)] * 2
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *(Residual(*size) for size in sizes),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def mlp():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def pair(make):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make().eval())
    return models


def distance(a, b):
    with torch.no_grad():
        return float(sum(((p - q) ** 2).sum() for p, q in zip(a.parameters(), b.parameters(), strict=True)).sqrt())


def rows(best, row):
    """All of them, each told to `row(what, value, bound)`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {"MLP 784-512-512-512-10": (mlp, torch.randn(2, 784)), "ResNet-20 of width 64": (resnet20, torch.randn(2, 3, 32, 32))}
        ours = {}
        for name, (make, x) in models.items():
            a, b = pair(make)
            ours[name] = best(lambda: cl.match(a, b, x, restarts=0, progress=False), 3), best(lambda: cl.match(a, b, x, progress=False), 1)
            row(f"match weights, {name}: one start / all four", f"{ours[name][0]:.2f} / {ours[name][1]:.2f} s")
        from rebasin import PermutationCoordinateDescent

        for name, (make, x) in models.items():
            a, b = pair(make)
            peers = [copy.deepcopy(b) for _ in range(3)]
            left = iter(peers)
            seconds = best(lambda: PermutationCoordinateDescent(a, next(left), x).rebasin(), 3)
            row(f"the same, {name}: rebasin / ours from one start", f"{seconds / ours[name][0]:.1f} ({seconds:.2f} s)", "≥ 3")
            near = distance(a, cl.match(a, b, x, restarts=0, progress=False).apply(b))
            row(f"the same: distance / rebasin's, {name}", f"{near / distance(a, peers[0]):.4f}", "≤ 1")
        a, b = pair(digits.Transformer)
        x, other = torch.randn(3, 1, 8, 8), copy.deepcopy(b)
        PermutationCoordinateDescent(a, other, x).rebasin()
        changes = [float((model(x) - b(x)).abs().max()) for model in (other, cl.match(a, b, x).apply(b))]
        row("change of outputs by matching, of a transformer: rebasin / ours", f"{changes[0]:.1g} / {changes[1]:.1g}", "0")
    finally:
        torch.set_num_threads(threads)
