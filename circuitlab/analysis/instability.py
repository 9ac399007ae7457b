"""Instability analysis: from which step on two runs of one training end in one valley (Frankle et al., 2020).

A parent is trained to step k, and from there two children to the end, which differ in the order of data and other chance
alone. If the loss does not rise on the line between the children, training was stable at step k.
"""

from __future__ import annotations

import copy
import importlib
import random
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.landscape import BARRIERS, Path, interpolate
from circuitlab.analysis.results import Result
from circuitlab.errors import InputError
from circuitlab.trace.guard import random_state

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Instability(Result):
    """Paths between children that were forked at several steps.

    Attributes:
        forks: the steps at which children were forked, rising. stop: the step at which they end.
        paths: for each fork, the `Path` between the children of each pair.
        distances: float64 (forks, pairs), between the parameters of the children.
    """

    forks: tuple[int, ...]
    stop: int
    paths: tuple[tuple[Path, ...], ...]
    distances: Floats

    def barrier(self, kind: str = "mean-end", *, of: str = "loss", on: str | None = None) -> Floats:
        """The barrier between each pair of children, float64 (forks, pairs).

        Args:
            kind: see `circuitlab.analysis.landscape.Path.barrier`.
            of: "loss" or a metric; of "accuracy" it is that of the error, which Frankle et al. call the instability.
            on: "train", or "test" if it was given; None is the last of these.
        """
        on = self.paths[0][0].sets[-1] if on is None else on
        return np.array([[path.barrier(kind, of=of, on=on) for path in pairs] for pairs in self.paths])

    def onset(self, threshold: float = 0.02, kind: str = "mean-end", *, of: str = "accuracy", on: str | None = None) -> int | None:
        """The first fork from which on the mean barrier stays below a threshold; None if it does not."""
        below = self.barrier(kind, of=of, on=on).mean(1) < threshold
        unstable = np.flatnonzero(~below)
        first = int(unstable[-1]) + 1 if len(unstable) else 0
        return self.forks[first] if first < len(self.forks) else None

    def to_frame(self) -> Any:
        """A row for each pair of children: fork, pair, distance, and the barriers of the loss, as a pandas DataFrame."""
        import pandas as pd

        kinds = [kind for kind in BARRIERS if kind != "mid" or np.any(np.abs(self.paths[0][0].alphas - 0.5) < 1e-9)]
        barriers = [self.barrier(kind) for kind in kinds]
        rows = [(fork, pair, self.distances[at, pair], *(values[at, pair] for values in barriers))
                for at, fork in enumerate(self.forks) for pair in range(len(self.paths[at]))]
        return pd.DataFrame(rows, columns=["fork", "pair", "distance", *kinds])

    def plot(self, **options: Any) -> Any:
        """Barriers against forks as a plotly Figure. See `circuitlab.plots.instability`."""
        return importlib.import_module("circuitlab.plots").instability(self, **options)

    def __repr__(self) -> str:
        told = ", ".join(f"{value:.3g} at {fork}" for fork, value in zip(self.forks, self.barrier().mean(1), strict=True))
        return f"Instability({len(self.paths[0])} pairs to step {self.stop}; mean barrier on {self.paths[0][0].sets[-1]} {told})"


def instability(
    make: Callable[[], Any], train: Callable[..., Any], forks: Sequence[int], stop: int, batches: Any, loss: Any = None, *,
    pairs: int = 3, points: int = 11, correct: str | None = None, metrics: Any = None, test: Any = None,
    executor: Executor | None = None, seen: Callable[[int, int, Path], None] | None = None, seed: int = 0, progress: bool = True,
) -> Instability:
    """Fork pairs of children from one training run, and measure the barrier between them.

    Args:
        make: gives what is trained, new and at step 0: a model, or a tuple of it and whatever else has a state, as
            ``(model, optimizer, schedule)``. Each must have ``state_dict`` and ``load_state_dict``: by these a fork is made.
        train: ``train(*made, start=, stop=, seed=)`` trains in place from one step to another. The order of data must come from
            the seed, or from the global random state, which is seeded with it.
        forks: steps at which children are forked, such as (0, 20, 100).
        stop: the last step of training.
        batches, loss: of the barrier. See `circuitlab.analysis.landscape.interpolate`, as for the next four.
        pairs: how many pairs of children each fork has; all have seeds of their own, the same ones at every fork.
        points: on each path. correct, metrics, test, executor: of the paths.
        seen: is called with each path: ``seen(fork, pair, path)``.
        seed: of ``make`` and of the parent's training; children have the next ones.
        progress: show a progress bar.

    Raises:
        InputError: forks that are no steps before stop, what has no state, or children that do not depend on their seed.
    """
    from tqdm.auto import tqdm

    try:
        steps = tuple(sorted({int(fork) for fork in forks}))
    except (TypeError, ValueError):
        steps = ()
    if not steps or steps[0] < 0 or steps[-1] >= stop:
        raise InputError(f"forks={forks!r}: give steps from 0 to before stop={stop!r}, such as (0, {max(int(stop) // 10, 1)})")
    if not isinstance(pairs, int) or pairs < 1:
        raise InputError(f"pairs={pairs!r}: give a whole number of at least 1")
    walked.check(batches)
    paths: list[tuple[Path, ...]] = []
    distances: list[list[float]] = []
    options: dict[str, Any] = {"correct": correct, "metrics": metrics, "test": test, "executor": executor, "progress": False}
    with random_state(), tqdm(total=len(steps) * pairs, desc="pairs of children", disable=not progress, delay=1, leave=False) as bar:
        parent = _Run(make, train, seed)
        try:
            at = 0
            for fork in steps:
                parent.go(at, fork, seed)
                at, kept = fork, parent.kept()
                found: list[Path] = []
                apart: list[float] = []
                for pair in range(pairs):
                    one, other = (_Run(make, train, seed, kept).go(fork, stop, seed + 1 + 2 * pair + child) for child in (0, 1))
                    apart.append(_distance(one, other))
                    if not apart[-1]:
                        raise InputError(f"two children of step {fork} are the same at step {stop}, though their seeds are not: train must draw the "
                                         "order of data from seed= or the global random state, and go on from start to stop")
                    found.append(interpolate(one, other, batches, loss, points, **options))
                    if seen is not None:
                        seen(fork, pair, found[-1])
                    bar.update()
                paths.append(tuple(found))
                distances.append(apart)
        except KeyboardInterrupt:
            if not paths:
                raise
            warnings.warn(f"interrupted after {len(paths)} of {len(steps)} forks: this is what was found so far")
    return Instability(steps[: len(paths)], int(stop), tuple(paths), np.array(distances))


class _Run:
    """One training run: what is trained, and how to go on with it."""

    def __init__(self, make: Callable[[], Any], train: Callable[..., Any], seed: int, kept: Sequence[Any] | None = None) -> None:
        _seed(seed)
        made = make()
        self.parts: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
        self.train = train
        if not self.parts or not isinstance(self.parts[0], torch.nn.Module):
            raise InputError(f"make must give a torch.nn.Module, or a tuple that starts with one, and gives {type(made).__name__}")
        stateless = [type(part).__name__ for part in self.parts if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict"))]
        if stateless:
            raise InputError(f"make gives a {stateless[0]}, which has no state_dict and load_state_dict: a fork could not restore it")
        for part, state in zip(self.parts, kept or (), strict=False):
            part.load_state_dict(copy.deepcopy(state))  # optimizers take the very tensors that they are given

    def go(self, start: int, stop: int, seed: int) -> torch.nn.Module:
        """Train from one step to another. Gives the model."""
        if stop > start:
            _seed(seed)
            with torch.enable_grad():
                self.train(*self.parts, start=start, stop=stop, seed=seed)
        return self.parts[0]

    def kept(self) -> list[Any]:
        """The state of all parts."""
        return [copy.deepcopy(part.state_dict()) for part in self.parts]


def _seed(seed: int) -> None:
    """Seed whatever training may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def _distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum(float(torch.linalg.vector_norm(p.detach().double() - q.detach().double().to(p.device))) ** 2 for p, q in pairs) ** 0.5


__all__ = ["Instability", "instability"]
