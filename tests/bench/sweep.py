"""Sweeps along a path against bare forward passes, and against the loop over state dicts that one writes by hand."""

import copy
import gc
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import circuitlab as cl

_MEMORY = """
import sys, torch, circuitlab as cl
from tests.bench.memory import peak
torch.manual_seed(0)
a, b = (torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 1024)) for _ in range(2))
data = [(torch.randn(256, 1024), torch.randint(0, 1024, (256,)))]
before = peak()
cl.interpolate(a, b, data, "cross_entropy", points=int(sys.argv[1]), progress=False)
print(before, peak())
"""


def mlp(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def _cnn():
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
                         nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _turns(runs, repeats=7):
    """Processor seconds of each, the least of runs in turn: others on the machine slow all of them."""
    times = [[] for _ in runs]
    for _ in range(repeats):
        for run, spent in zip(runs, times, strict=True):
            gc.collect()
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
    return [min(spent) for spent in times]


def peers(a, b, batches, alphas):
    """What a path is compared with: bare forwards with the loss, and the loop that one writes by hand."""

    def bare():
        with torch.no_grad():
            for _ in alphas:
                for inputs, target in batches:
                    F.cross_entropy(a(inputs), target)

    def by_hand():
        model, first, second = copy.deepcopy(a), a.state_dict(), b.state_dict()
        with torch.no_grad():
            for alpha in alphas:
                model.load_state_dict({k: (1 - alpha) * t + alpha * second[k] if t.is_floating_point() else t for k, t in first.items()})
                sum(F.cross_entropy(model(inputs), target).item() * len(target) for inputs, target in batches)

    return bare, by_hand


def paths(best, row):
    torch.manual_seed(0)
    x, y = torch.randn(1797, 64), torch.randint(0, 10, (1797,))
    for name, make, size, points in (("MLP of width 32", lambda: mlp(32), 1797, 25), ("MLP of width 512", lambda: mlp(512), 512, 25),
                                     ("MLP of width 512, small batches", lambda: mlp(512), 32, 9), ("CNN with BatchNorm", _cnn, 512, 9)):
        a, b = make().eval(), make().eval()
        batches = list(zip(x.split(size), y.split(size), strict=True))
        alphas = np.linspace(0, 1, points)

        def ours():
            cl.interpolate(a, b, batches, "cross_entropy", points, progress=False)

        floor, plain, spent = _turns([*peers(a, b, batches, alphas), ours])
        row(f"path of {points} points, {name} / bare forwards with the loss", f"{spent / floor:.2f} ({spent:.3f} s)", "≤ 1.1")
        row("the same / a loop over load_state_dict", f"{spent / plain:.2f}", "≤ 1")


def memory(best, row):
    peaks = []
    for points in (3, 101):
        out = subprocess.run([sys.executable, "-c", _MEMORY, str(points)], capture_output=True, text=True, check=True).stdout.split()
        peaks.append((int(out[1]) - int(out[0])) / 1024)
    row("peak memory beside two models of 34 MB, path of 101 points / of 3", f"{peaks[1]:.0f} / {peaks[0]:.0f} MB", "equal")


ALL = (paths, memory)

if __name__ == "__main__":
    for bench in ALL:
        bench(None, lambda *told: print(*told))
