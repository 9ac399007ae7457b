"""Many evaluations of one model at different numbers: the points of a path, of a plane, of a curve.

A point is a row of weights of a `Combination`. Its numbers are written into one copy of the model, which is run in eval
mode on batches that stay on the device, so memory does not grow with the number of points and the models themselves are
never touched. Units of work are (point, shard of the data); the batch means of each are kept, and added up in one order in
the end: what is found does not depend on the executor, on interruptions, or on what was evaluated before.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis import remote
from circuitlab.analysis.bench import Bench, Prepare, Weights, Work, choose
from circuitlab.analysis.checkpoint import Checkpoints
from circuitlab.analysis.measures import Measures, picked
from circuitlab.analysis.results import Result
from circuitlab.analysis.shards import Shard, shards
from circuitlab.analysis.states import Combination, scratch
from circuitlab.errors import InputError
from circuitlab.trace.guard import random_state

Floats = NDArray[np.float64]
Seen = Callable[[int, dict[str, dict[str, float]]], None]
"""``seen(number of the point, {set: {quantity: mean}})``, called as soon as a point is evaluated."""

UNITS = 16
"""With an executor, points are divided between shards of the data until there are so many units."""


@dataclass(frozen=True, eq=False)
class Sweep(Result):
    """What was found at the points of a sweep.

    Attributes:
        points: float64 (points, models), the weights.
        sets: names of the sets of data. names: of the quantities: "loss", and the metrics.
        values: float64 (sets, points, quantities), means over all examples; NaN where a point was not evaluated, or its
            numbers are not finite.
        done: bool (points,), which points were evaluated.
        way: how: "loop", "graph" or "vmap:n".
    """

    points: Floats
    sets: tuple[str, ...]
    names: tuple[str, ...]
    values: Floats
    done: NDArray[np.bool_]
    way: str = "loop"

    def of(self, name: str = "loss", where: str | None = None) -> Floats:
        """A quantity at all points, float64 (points,), on a set of data (the first, if none is named).

        Raises:
            InputError: that was not measured.
        """
        return picked(self.values, self.sets, self.names, name, where)

    @property
    def complete(self) -> bool:
        """Whether all points were evaluated."""
        return bool(self.done.all())


class Sweeper:
    """Evaluates points of one family on sets of data, as often as it is called.

    Args:
        model: is copied once; its class and hidden state are what is evaluated, its mode does not matter.
        family: the numbers of each point.
        data: name of a set -> batches that can be walked again.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        metrics: "accuracy", functions of (output, batch), or a dict of these by name.
        prepare: is called on each point's model before it is evaluated, with the batches of the first set.
        about: what prepare does, by a name: a resumed sweep must have the same.
        executor: any `concurrent.futures.Executor`; None evaluates here.
        resume: a .safetensors file: what is in it is not evaluated again, and what is found is written to it.
        seed: of the chance that a forward draws, the same at every point.
        way: "loop", "graph", "vmap:n"; None measures what is fastest (always "loop" on a CPU and with an executor).
        room: bytes that batches may take on the device; None is half of the free memory.

    Raises:
        InputError: batches that cannot be walked again, unknown losses or metrics, a file of another sweep.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Combination,
        data: Mapping[str, Any],
        loss: Any = None,
        metrics: Any = None,
        *,
        prepare: Prepare | None = None,
        about: str = "",
        executor: Executor | None = None,
        resume: str | Path | None = None,
        seed: int = 0,
        way: str | None = None,
        room: float | None = None,
    ) -> None:
        for batches in data.values():
            walked.check(batches)
        if executor is not None and not hasattr(executor, "submit"):
            raise InputError(f"executor must be a concurrent.futures.Executor, and is a {type(executor).__name__}; "
                             "of a Dask client, give client.get_executor()")
        self.model, self.family, self.data, self.prepare = model, family, data, prepare
        self.measures = Measures(loss, metrics)
        self.executor, self.seed, self.way, self.room = executor, seed, way, room
        self.device = walked.device_of(model)
        self.held: Shard | None = None  # all of the data, where it fits
        self.bench: Bench | None = None
        self.weights: Floats = np.zeros((0, len(self.measures.names)))  # of each batch, for each quantity
        self.where: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # number of the set of each batch
        self.walked = False  # all of the data was seen
        self.known: dict[bytes, tuple[Floats, NDArray[np.bool_]]] = {}
        self.file = None
        if resume is not None:
            told = {"quantities": self.measures.kinds, "sets": ", ".join(data), "correction": about, "seed": str(seed)}
            self.file = Checkpoints(Path(resume), family, told)
            self.known |= self.file.known
            self.way = way or self.file.way

    def run(self, points: Any, seen: Seen | None = None, *, progress: bool = True, what: str = "evaluating") -> Sweep:
        """Evaluate points.

        Args:
            points: (points, models) weights; equal rows are evaluated once.
            seen: is called with each point that is done, in the order that they become so.
            progress: show a progress bar. what: its name.

        Returns:
            what was found. An interrupt (Ctrl-C, or a notebook's stop button) gives what is there so far, with a warning.
        """
        points = np.ascontiguousarray(points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != len(self.family.states) or not np.isfinite(points).all():
            raise InputError(f"points must be finite numbers of shape (points, {len(self.family.states)}), and are of shape {points.shape}")
        try:
            with _quiet():
                self._run(points, seen, progress, what)
        except KeyboardInterrupt:
            found = self._result(points)
            hint = f"resume={str(self.file.path)!r}" if self.file else "resume='file.safetensors', which keeps what is found"
            warnings.warn(f"interrupted after {int(found.done.sum())} of {len(points)} points: this is what was found so far; "
                          f"go on with {hint}")
            return found
        finally:
            if self.file is not None:
                self.file.write(self.known, self.way)
        return self._result(points)

    def so_far(self, points: Any) -> Sweep:
        """What is known of points, without evaluating any."""
        return self._result(np.ascontiguousarray(points, dtype=np.float64))

    def _run(self, points: Floats, seen: Seen | None, progress: bool, what: str) -> None:
        from tqdm.auto import tqdm

        for shard in self._shards():
            number = shard.number
            span = slice(number, number + len(shard.batches))
            todo: dict[bytes, list[int]] = {}
            for at, row in enumerate(points):
                todo.setdefault(row.tobytes(), []).append(at)
            left = []
            with tqdm(total=len(todo), desc=what, disable=not progress, delay=1, leave=False) as bar:
                for row, places in todo.items():
                    if self._room(row, span.stop)[1][span].all():
                        self._tell(points, places, shard, seen)
                        bar.update()
                    else:
                        left.append(places[0])
                for (at, start, stop), values in self._evaluate(shard, points, left):
                    row = points[at].tobytes()
                    found, done = self.known[row]
                    found[number + start : number + stop] = values
                    done[number + start : number + stop] = True
                    if done[span].all():
                        bar.update()
                        self._tell(points, todo[row], shard, seen)
                    if self.file is not None:
                        self.file.write_now_and_then(self.known, self.way)

    def _tell(self, points: Floats, places: Sequence[int], shard: Shard, seen: Seen | None) -> None:
        if seen is None or not shard.last:
            return
        means = self._mean(points[places[0]].tobytes())
        for at in places:
            seen(at, {name: dict(zip(self.measures.names, row.tolist(), strict=True)) for name, row in zip(self.data, means, strict=True)})

    # data ---------------------------------------------------------------------------------------------

    def _shards(self) -> Iterator[Shard]:
        if self.held is not None:
            yield self.held
            return
        for shard in shards(self.data, self.device, self.room):
            self._look(shard)
            self.walked |= shard.last
            if shard.last and not shard.number:
                self.held = shard
            yield shard

    def _look(self, shard: Shard) -> None:
        """What each batch weighs, and which it is."""
        if not len(self.weights) and self.measures.needs_output(shard.batches[0]):
            copied = scratch(self.model).eval()
            args, kwargs = walked.inputs_of(copied, shard.batches[0])
            with walked.running(copied, shard.batches[0]):
                output = copied(*args, **kwargs)
            self.measures.look(output, shard.batches[0])
        known = len(self.weights) - shard.number
        new = shard.batches[known:] if known >= 0 else []
        if not new:
            return
        if self.file is not None:
            for at, batch in enumerate(new, len(self.weights)):
                self.file.see(at, batch)
        self.where = np.append(self.where, shard.sets[known:])
        self.weights = np.concatenate([self.weights, np.array([self.measures.weights(batch) for batch in new], dtype=np.float64)])

    def _room(self, row: bytes, batches: int) -> tuple[Floats, NDArray[np.bool_]]:
        """What is known of a point, with room for so many batches."""
        found, done = self.known.get(row, (np.zeros((0, len(self.measures.names))), np.zeros(0, dtype=bool)))
        if len(done) < batches:
            more = batches - len(done)
            found = np.concatenate([found, np.full((more, found.shape[1]), np.nan)])
            done = np.concatenate([done, np.zeros(more, dtype=bool)])
        self.known[row] = found, done
        return found, done

    # evaluating ---------------------------------------------------------------------------------------

    def _evaluate(self, shard: Shard, points: Floats, left: Sequence[int]) -> Iterator[tuple[remote.Unit, Floats]]:
        if not left:
            return
        batches = len(shard.batches)
        train = next(iter(self.data))
        first = [b for b, which in zip(shard.batches, shard.sets, strict=True) if not which] if shard is self.held else self.data[train]
        work = Work(self.model, self.family, shard.batches, self.measures, self.prepare, first, self.seed, shard.number)
        rows = [tuple(row.tolist()) for row in points]
        if self.executor is not None:
            pieces = 1 if self.prepare is not None else max(1, min(batches, -(-UNITS // len(left))))
            edges = np.linspace(0, batches, pieces + 1).astype(int).tolist()
            units = [(at, a, b) for at in left for a, b in pairwise(edges)]
            yield from remote.run(self.executor, work, rows, units)
            return
        if self.way is None:
            self.way = choose(work, [rows[at] for at in left])
        work = replace(work, way=self.way)
        bench = self.bench if self.bench is not None and shard is self.held and self.bench.work.way == self.way else Bench(work)
        self.bench = bench if shard is self.held else None
        together = int(self.way.partition(":")[2] or 1)
        for start in range(0, len(left), together) if self.device.type != "cuda" else ():
            chunk = left[start : start + together]
            for at, values in zip(chunk, bench.evaluate([rows[at] for at in chunk], 0, batches), strict=True):
                yield (at, 0, batches), values.double().cpu().numpy()
        if self.device.type == "cuda":
            yield from _ahead(bench, rows, left, together, batches)

    # results ------------------------------------------------------------------------------------------

    def _mean(self, row: bytes) -> Floats:
        """(sets, quantities) means over all examples of a point."""
        found, weights, where = self.known[row][0], self.weights, self.where
        means = np.full((len(self.data), found.shape[1]), np.nan)
        for which in range(len(self.data)):
            rows = where == which
            weight, values = weights[rows], found[: len(where)][rows]
            total = np.where(weight > 0, values * weight, 0).sum(0)
            np.divide(total, weight.sum(0), out=means[which], where=weight.sum(0) > 0)
        return means

    def _result(self, points: Floats) -> Sweep:
        values = np.full((len(self.data), len(points), len(self.measures.names)), np.nan)
        done = np.zeros(len(points), dtype=bool)
        for at, row in enumerate(points):
            found = self.known.get(row.tobytes())
            if self.walked and found is not None and len(found[1]) >= len(self.weights) and found[1][: len(self.weights)].all():
                values[:, at], done[at] = self._mean(row.tobytes()), True
        return Sweep(points, tuple(self.data), self.measures.names, values, done, self.way or "loop")


def _ahead(bench: Bench, rows: Sequence[Weights], left: Sequence[int], together: int, batches: int) -> Iterator[tuple[remote.Unit, Floats]]:
    """Points on a GPU: it is never waited for but in the end, and what it has done by then is yielded on the way."""
    queue: deque[tuple[Sequence[int], torch.Tensor, torch.cuda.Event]] = deque()
    for start in range(0, len(left), together):
        chunk = left[start : start + together]
        values = bench.evaluate([rows[at] for at in chunk], 0, batches)
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        queue.append((chunk, host, event))
        while queue and queue[0][2].query():
            yield from _units(*queue.popleft()[:2], batches)
    while queue:
        chunk, host, event = queue.popleft()
        event.synchronize()
        yield from _units(chunk, host, batches)


def _units(chunk: Sequence[int], host: torch.Tensor, batches: int) -> Iterator[tuple[remote.Unit, Floats]]:
    for at, values in zip(chunk, host, strict=True):
        yield (at, 0, batches), values.double().numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """No gradients; random state is put back; code that torch.compile would compile runs eagerly."""
    with random_state(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def sweep(
    model: torch.nn.Module, family: Combination, points: Any, data: Any, loss: Any = None, metrics: Any = None, *,
    seen: Seen | None = None, progress: bool = True, what: str = "evaluating", **options: Any,
) -> Sweep:
    """Evaluate points once. ``data`` is batches, or a dict of batches by the name of their set; see `Sweeper` for the rest."""
    sets: Mapping[str, Any] = data if isinstance(data, Mapping) else {"train": data}
    return Sweeper(model, family, sets, loss, metrics, **options).run(points, seen, progress=progress, what=what)


__all__ = ["Sweep", "Sweeper", "sweep"]
