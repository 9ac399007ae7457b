"""What only a GPU can show: sweeps, statistics, sparse experts and memory there.

``python -m tests.bench.gpu`` prints a table (some two minutes); docs/benchmarks_gpu.md holds one.
"""

import gc
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import circuitlab as cl
from circuitlab.analysis.feedforward import blocks
from circuitlab.analysis.states import Combination
from circuitlab.analysis.sweep import sweep
from circuitlab.gallery.gpt import GPT
from circuitlab.gallery.llama import Llama
from circuitlab.gallery.unet import UNet
from tests.bench.sweep import mlp, peers

DEVICE = "cuda"


def best(run, repeats=5):
    """Seconds of the fastest of some runs, each waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def peak(run):
    """Bytes at the peak beyond what was there before, of a second run: the first takes the libraries' workspaces."""
    run()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def row(what, value, bound=""):
    print(f"| {what} | {value} | {bound} |", flush=True)


def _cnn():
    layers, wide = [], 3
    for width in (128, 256, 512):
        layers += [nn.Conv2d(wide, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        wide = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def paths():
    for name, make, shape, size in (("MLP of width 32", lambda: mlp(32), (64,), 256), ("MLP of width 4096", lambda: mlp(4096), (64,), 4096),
                                    ("CNN with BatchNorm", _cnn, (3, 64, 64), 256)):
        torch.manual_seed(0)
        a, b = make().cuda().eval(), make().cuda().eval()
        batches = [(torch.randn(size, *shape, device=DEVICE), torch.randint(0, 10, (size,), device=DEVICE)) for _ in range(8)]
        alphas = np.linspace(0, 1, 101)

        def ours():
            return cl.interpolate(a, b, batches, "cross_entropy", 101, progress=False)

        floor, plain, spent = (best(run, 3) for run in (*peers(a, b, batches, alphas), ours))
        found = sweep(a, Combination.of([a, b]), [[1 - t, t] for t in alphas], batches, "cross_entropy")
        row(f"path of 101 points, {name} ({found.way}) / bare forwards with the loss", f"{spent / floor:.2f} ({spent:.3f} s)", "≤ 1.1")
        row("the same / a loop over load_state_dict", f"{spent / plain:.2f}", "≤ 1")


def observing():
    """What each further batch costs, for what is done once (to copy 1 GB of counts to the processor) does not grow with them."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4096, 16384), nn.ReLU(), nn.Linear(16384, 4096)).cuda().eval().to(dtype)
        batch = torch.randn(4096, 4096, device=DEVICE, dtype=dtype)
        together = torch.zeros(16384, 16384, device=DEVICE, dtype=dtype)

        def bound(count, model=model, batch=batch, together=together):
            with torch.no_grad():
                for _ in range(count):
                    hidden = model[1](model[0](batch))
                    model[2](hidden)
                    fires = (hidden > 0).to(batch.dtype)
                    together.addmm_(fires.T, fires)

        def ours(count, model=model, batch=batch):
            cl.observe(model, [batch] * count, progress=False)

        spent = [best(lambda run=run, count=count: run(count), 3) for run in (bound, ours) for count in (8, 72)]
        name = str(dtype).removeprefix("torch.")
        row(f"observe 16,384 neurons, {name}: 4,096 more positions / their forward and one full product in {name}",
            f"{(spent[3] - spent[2]) / (spent[1] - spent[0]):.2f} ({(spent[3] - spent[2]) / 64 * 1000:.1f} ms)", "≤ 1.05")
        row("the same: once", f"{spent[2] - (spent[3] - spent[2]) / 8:.2f} s")
        del together
        more, few = peak(lambda: ours(72)), peak(lambda: ours(8))
        row("the same: GPU memory beyond model and data, 72 batches / 8", f"{more / 2**30:.2f} / {few / 2**30:.2f} GB", "equal")


def sparse():
    for width, hidden in ((1024, 4096), (4096, 16384)):
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)).cuda().eval().to(dtype)
            block = next(iter(blocks(cl.trace(model, torch.randn(2, width, device=DEVICE, dtype=dtype))).values()))
            part = SimpleNamespace(labels=torch.randperm(hidden).numpy() % 16, ffn=block)
            moe = cl.to_moe(model, {block.wire: part}, top_k=0.25).eval()
            found = []
            with torch.no_grad():
                for n in (1, 64, 1024, 16384):
                    x = torch.randn(n, width, device=DEVICE, dtype=dtype)

                    def many(run, x=x):
                        for _ in range(10):
                            run(x)

                    many(moe)
                    found.append(best(lambda: many(model)) / best(lambda: many(moe)))
            name = str(dtype).removeprefix("torch.")
            row(f"dense block {width}-{hidden} / a quarter of its 16 experts, {name}, 1, 64, 1,024, 16,384 positions",
                ", ".join(f"{ratio:.2f}" for ratio in found), "> 1")


def memory():
    tokens = torch.randint(0, 1000, (8, 512), device=DEVICE)
    cases = {
        "GPT of 12 layers, width 768": (GPT(1000, 512, 768, 12, 12), tokens),
        "Llama of 8 layers, width 1024": (Llama(1000, 1024, 16, 4, 8), tokens),
        "U-Net of 256 x 256": (UNet(), torch.randn(8, 1, 256, 256, device=DEVICE)),
        "CNN with BatchNorm": (_cnn(), torch.randn(64, 3, 64, 64, device=DEVICE)),
    }
    for name, (model, x) in cases.items():
        model = model.cuda().eval()
        circuit = cl.trace(model, x)
        mine = circuit.cost().live[0] - x.nbytes

        def bare():
            with torch.no_grad():
                model(x)

        with sdpa_kernel(SDPBackend.MATH):
            plain = peak(bare)
        row(f"peak of live memory, {name}: cost() / the allocator, attention written out, kernels' workspaces included", f"{mine / plain:.2f} ({plain / 2**20:.0f} MB)", "0.8 to 1.2")
        row("the same / fused attention", f"{mine / peak(bare):.2f}")
        row("live trace there: peak of memory / bare forward's", f"{peak(lambda: cl.trace(model, x, device='live')) / peak(bare):.3f}", "1")
        start = time.perf_counter()
        report = circuit.verify(model, x)
        row("verify there", f"{time.perf_counter() - start:.1f} s", str(report).splitlines()[0])


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("these benchmarks need a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| what | measured | aim |\n|---|---|---|")
    for run in (memory, sparse, observing, paths):
        try:
            run()
        except Exception as error:
            row(run.__name__, f"{type(error).__name__}: {str(error)[:300]}")
