"""Evaluating points on one device: one copy of the model that numbers are written into, and batches that stay there.

On a CPU the points are gone through one by one, which is as fast as the forward passes are: stacking parameters
(`torch.vmap`) was slower for every net tried. On a GPU small nets are bound by launching kernels, so there the ways to do
it are measured, once, on the first points: the loop, the loop with its forward passes as CUDA graphs, and `vmap` over as
many points as memory allows. A way that fails there, or gives other numbers than the loop, is not taken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.measures import Measures
from circuitlab.analysis.states import Combination, own_state, scratch
from circuitlab.trace.events import tensors_in

Weights = Sequence[float]
Prepare = Callable[[torch.nn.Module, Weights, Sequence[Any]], None]
"""``prepare(model, weights, batches)``: changes a model in eval mode, whose numbers were just written, before it is
evaluated, as a correction of its statistics does; batches are those of the first set of data."""

_COPYING = threading.Lock()


@dataclass(frozen=True)
class Work:
    """All that it takes to evaluate points: what is sent to the workers of an executor.

    Attributes:
        model: that is copied; its numbers do not matter.
        family: which numbers belong to the weights of a point.
        batches: on the model's device.
        measures: what is measured.
        prepare: is called before each point. ``first``: what it is given.
        seed: of the chance within a forward, the same at every point.
        number: of the first batch among all.
        way: "loop", "graph" or "vmap:n" for n points at once.
    """

    model: torch.nn.Module
    family: Combination
    batches: Sequence[Any]
    measures: Measures
    prepare: Prepare | None = None
    first: Any = ()
    seed: int = 0
    number: int = 0
    way: str = "loop"


class Bench:
    """One copy of a model, at which points are evaluated one after the other."""

    def __init__(self, work: Work) -> None:
        self.work = work
        with _COPYING:  # copying touches tables that threads share
            self.model = scratch(work.model).eval()
        self.target = own_state(self.model)
        self.device = walked.device_of(self.model)
        self.exact = torch.float32 if self.device.type == "mps" else torch.float64
        self.calls = [walked.inputs_of(self.model, batch) for batch in work.batches]
        self.graphs: dict[Any, _Graph] = {}

    def evaluate(self, points: Sequence[Weights], start: int, stop: int) -> torch.Tensor:
        """Batch means, (points, batches from start to stop, quantities), on the device."""
        if self.work.way.startswith("vmap") and len(points) > 1 and self.work.prepare is None:
            return self._stacked(points, start, stop)
        found = [self._one(point, start, stop) for point in points]
        return torch.stack(found) if len(found) > 1 else found[0][None]

    def _one(self, point: Weights, start: int, stop: int) -> torch.Tensor:
        self.work.family.write(self.target, point)
        if self.work.prepare is not None:
            self.work.prepare(self.model, point, self.work.first)
        run = self._graphed if self.work.way == "graph" else self._run
        found: list[list[torch.Tensor]] = []
        for number in range(start, stop):
            self._seed(number)
            found.append(run(number))
        if self.device.type == "cpu":  # numbers are there: nothing is waited for
            return torch.from_numpy(np.array([[value.item() for value in row] for row in found], dtype=np.float64))
        return torch.stack([torch.stack(column).to(self.exact) for column in zip(*found, strict=True)], 1)

    def _run(self, number: int) -> list[torch.Tensor]:
        args, kwargs = self.calls[number]
        with walked.running(self.model, self.work.batches[number]):
            output = self.model(*args, **kwargs)
        return self.work.measures(output, self.work.batches[number])

    def _seed(self, number: int) -> None:
        seed = self.work.seed + self.work.number + number
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    # many points at once ------------------------------------------------------------------------------

    def _stacked(self, points: Sequence[Weights], start: int, stop: int) -> torch.Tensor:
        stacks = {name: tensor.new_empty((len(points), *tensor.shape)) for name, tensor in self.target.items()}
        for at, point in enumerate(points):
            self.work.family.write({name: stack[at] for name, stack in stacks.items()}, point)

        def one(state: dict[str, torch.Tensor], number: int) -> tuple[torch.Tensor, ...]:
            args, kwargs = self.calls[number]
            output = torch.func.functional_call(self.model, state, args, kwargs, tie_weights=True)
            return tuple(self.work.measures(output, self.work.batches[number]))

        found: list[torch.Tensor] = []
        for number in range(start, stop):
            self._seed(number)
            columns = torch.vmap(one, in_dims=(0, None), randomness="same")(stacks, number)
            found.append(torch.stack([column.to(self.exact) for column in columns], 1))
        return torch.stack(found, 1)

    # CUDA graphs --------------------------------------------------------------------------------------

    def _graphed(self, number: int) -> list[torch.Tensor]:
        batch = self.work.batches[number]
        key = _signature(batch)
        if key not in self.graphs:
            self.graphs[key] = _Graph(self.model, self.work.measures, batch)
        return self.graphs[key].run(batch)


class _Graph:
    """A forward pass and its measures, recorded as a CUDA graph for batches of one shape."""

    def __init__(self, model: torch.nn.Module, measures: Measures, batch: Any) -> None:
        self.held = walked.mapped(batch, torch.clone)
        args, kwargs = walked.inputs_of(model, self.held)

        def forward() -> list[torch.Tensor]:
            return measures(model(*args, **kwargs), self.held)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = forward()

    def run(self, batch: Any) -> list[torch.Tensor]:
        for (_, held), (_, new) in zip(tensors_in(self.held, torch.Tensor), tensors_in(batch, torch.Tensor), strict=True):
            held.copy_(new, non_blocking=True)
        self.graph.replay()
        return [tensor.clone() for tensor in self.found]


def _signature(batch: Any) -> Any:
    return tuple((path, tuple(tensor.shape), tensor.dtype) for path, tensor in tensors_in(batch, torch.Tensor))


# the choice -------------------------------------------------------------------------------------------


def choose(work: Work, points: Sequence[Weights]) -> str:
    """The fastest way to evaluate these points on the device of the work, measured on a few of them."""
    if walked.device_of(work.model).type != "cuda" or work.prepare is not None or len(points) < 8:
        return "loop"
    bench = Bench(work)
    stop = min(len(work.batches), 2)
    many = _room_for(bench, points)
    ways = ["loop", "graph", *([f"vmap:{many}"] if many > 1 else [])]
    del bench
    best, fastest, right = "loop", float("inf"), None
    graphed = False
    for way in ways:
        if way.startswith("vmap") and best == "loop" and graphed:
            continue  # what takes its time on the GPU, and not to be started, is no faster together
        tried = list(points[: many if way.startswith("vmap") else 2])
        try:
            found, spent = _timed(replace(work, way=way), tried, stop)
        except Exception:
            if way == "loop":
                raise
            continue
        graphed = graphed or way == "graph"
        right = found if right is None else right
        both = min(len(found), len(right))
        if spent < 0.9 * fastest and torch.allclose(found[:both], right[:both], rtol=1e-3, atol=1e-5, equal_nan=True):
            best, fastest = way, spent
    torch.cuda.empty_cache()
    return best


def _timed(work: Work, points: Sequence[Weights], stop: int) -> tuple[torch.Tensor, float]:
    """What a way of evaluating gives, and its seconds for each point."""
    bench = Bench(work)
    found = bench.evaluate(points, 0, stop)  # warm: kernels are chosen, graphs are recorded
    torch.cuda.synchronize(bench.device)
    start = time.perf_counter()
    bench.evaluate(points, 0, stop)
    torch.cuda.synchronize(bench.device)
    return found, (time.perf_counter() - start) / len(points)


def _room_for(bench: Bench, points: Sequence[Weights]) -> int:
    """How many points fit at once: their parameters and activations in a quarter of the free memory."""
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    bench.evaluate(points[:1], 0, 1)
    each = torch.cuda.max_memory_allocated(bench.device) - before + sum(t.nbytes for t in bench.target.values())
    free, _ = torch.cuda.mem_get_info(bench.device)
    return max(1, min(len(points), 64, int(free / 4 / max(each, 1))))
