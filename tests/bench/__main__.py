"""Run all benchmarks, print a table, and write it to docs/benchmarks.md with --write."""

import gc
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import circuitlab as cl
from circuitlab.gallery.llama import Llama
from tests.bench import matching, modularity, neurons, sweep
from tests.bench.browser import frames
from tests.ui.conftest import FLAGS

ROWS = []


class Passing(TorchFunctionMode):
    """A function mode that does nothing: the price of watching at all."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def best(run, repeats=5):
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def llama(layers, width=4096, heads=32):
    with torch.device("meta"):
        return Llama(32000, width, heads, 8, layers).eval()


def row(what, value, bound=""):
    ROWS.append((what, value, bound))
    print(f"{what:<78} {value:>22}   {bound}", flush=True)


def against_bare_forward():
    model, tokens = llama(32), torch.zeros(1, 128, dtype=torch.long, device="meta")

    def bare():
        with torch.no_grad(), Passing():
            model(tokens)

    floor, ours = best(bare), best(lambda: cl.trace(model, tokens))
    row("trace and wires, 32-layer Llama shape on meta / its bare meta forward", f"{ours / floor:.2f} ({ours:.3f} s)", "≤ 2")


def against_peers():
    model = Llama(1000, 64, 4, 2, 32).eval()
    tokens = torch.zeros(1, 32, dtype=torch.long)
    ours = best(lambda: cl.trace(model, tokens).svg(), 3)
    try:
        import torchview

        peer = best(lambda: torchview.draw_graph(model, input_data=tokens, device="cpu"), 3)
        row("trace to folded SVG, 32 layers / torchview's trace alone", f"{ours / peer:.2f} ({ours:.3f} s)", "≤ 1.5")
    except ImportError:
        print("torchview is not installed")
    try:
        import torchlens

        peer = best(lambda: torchlens.trace(model, tokens), 1)
        row("the same / torchlens' trace", f"{ours / peer:.3f}")
    except Exception as error:
        print(f"torchlens did not run: {type(error).__name__}: {str(error)[:80]}")


def linear_in_layers():
    tokens = torch.zeros(1, 128, dtype=torch.long, device="meta")
    times = {n: best(lambda m=llama(n): cl.trace(m, tokens).svg(), 3) for n in (16, 32, 64, 128)}
    row("seconds per layer, 128 layers / 16 layers (trace to SVG)", f"{(times[128] / 128) / (times[16] / 16):.2f}", "about 1")


def largest():
    """In a process of its own, so that the peak is its own."""
    code = """
import torch, circuitlab as cl
from tests.bench.memory import peak
from circuitlab.gallery.llama import Llama
with torch.device("meta"):
    model = Llama(128256, 16384, 128, 8, 126).eval()
tokens = torch.zeros(1, 128, dtype=torch.long, device="meta")
before = peak()
cl.trace(model, tokens).svg()
print(before, peak())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    row("peak memory, 126 layers of width 16,384: whole process (trace and SVG alone)",
        f"{int(out[1]) / 1024:.0f} MB ({(int(out[1]) - int(out[0])) / 1024:.0f} MB)", "≤ 1 GB")


def unfolding():
    view = cl.trace(llama(32), torch.zeros(1, 128, dtype=torch.long, device="meta")).view(depth=2)

    def twice():
        view.toggle("layers.0.attention")
        view.toggle("layers.0.attention")

    row("unfold a block in the widget, in the kernel", f"{best(twice) / 2 * 1000:.0f} ms", "< 150 ms")


def modules():
    try:
        modularity.rows(row)
    except ImportError:
        print("k-means-constrained is not installed")


def matched_models():
    try:
        matching.rows(best, row)
    except ImportError:
        print("rebasin is not installed")


def frame_times():
    browser = shutil.which("chromium")
    if browser is None:
        print("chromium is not installed")
        return
    found = frames(browser, FLAGS)
    row(f"mean frame, {found['marks']} marks, software rendering: pan / zoom",
        f"{found['pan']:.0f} / {found['zoom']:.0f} ms", "smooth")


def observed_neurons():
    for run in neurons.ALL:
        run(best, row)


def sweeps():
    for run in sweep.ALL:
        run(best, row)


if __name__ == "__main__":
    for run in (against_bare_forward, against_peers, linear_in_layers, largest, unfolding, frame_times, modules, observed_neurons, sweeps, matched_models):
        run()
    if "--write" in sys.argv:
        lines = ["# Benchmarks", "", "Written by `make bench ARGS=--write`; each is a ratio or a bound within one run. On a GPU: [benchmarks_gpu.md](benchmarks_gpu.md).", "",
                 f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}",
                 "", "| what | measured | aim |", "|---|---|---|"]
        lines += [f"| {a} | {b} | {c} |" for a, b, c in ROWS]
        (Path(__file__).parents[2] / "docs" / "benchmarks.md").write_text("\n".join(lines) + "\n")
