"""Streamed statistics against the forward and one product of matrices; sparse experts against the dense block."""

import subprocess
import sys
from types import SimpleNamespace

import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.feedforward import blocks

_MEMORY = """
import torch, circuitlab as cl
from tests.bench.memory import peak
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 16384), torch.nn.ReLU(), torch.nn.Linear(16384, 256))
cl.observe(model, [torch.randn(2048, 256)], progress=False)
print(peak())
"""


def observing(best, row):
    """One wire of 4,096 neurons, 8,192 positions in batches of 1,024."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)).eval()
    batches = list(torch.randn(8192, 1024).split(1024))
    together = torch.zeros(4096, 4096)

    def bound():
        with torch.no_grad():
            for batch in batches:
                hidden = model[1](model[0](batch))
                model[2](hidden)
                fires = (hidden > 0).float()
                together.addmm_(fires.T, fires)

    floor, ours = best(bound, 3), best(lambda: cl.observe(model, batches, progress=False), 3)
    row("observe 4,096 neurons over 8,192 positions / bare forward and one full product", f"{ours / floor:.2f} ({ours:.2f} s)", "≤ 1.05")


def observing_memory(best, row):
    out = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True).stdout
    row("peak memory, observe 16,384 neurons over 2,048 positions, whole process", f"{int(out) / 1024 / 1024:.2f} GB", "< 3 GB")


def sparse(best, row):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)).eval()
    block = next(iter(blocks(cl.trace(model, torch.randn(2, 1024))).values()))
    part = SimpleNamespace(labels=torch.randperm(4096) % 16, ffn=block)
    moe = cl.to_moe(model, {block.wire: part}, top_k=0.25).eval()
    with torch.no_grad():
        for n in (1, 8, 256):
            x = torch.randn(n, 1024)
            dense, ours = best(lambda: model(x), 9), best(lambda: moe(x), 9)
            row(f"dense block of 4,096 neurons / a quarter of its 16 experts, {n} position{'s' if n > 1 else ''}", f"{dense / ours:.2f}", "> 1")


ALL = (observing, observing_memory, sparse)
