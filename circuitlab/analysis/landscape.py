"""The straight line between two models, and the barrier on it.

θ(α) = (1−α)·A + α·B on all floating-point parameters and buffers; integers are taken from the nearer end. Two models are
linearly connected if the loss does not rise between them. How much it rises is measured in ways that differ (`Path.barrier`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.correction import correction
from circuitlab.analysis.measures import picked
from circuitlab.analysis.results import Result
from circuitlab.analysis.states import Combination, merge
from circuitlab.analysis.sweep import Sweep, Sweeper
from circuitlab.errors import InputError
from circuitlab.trace.guard import random_state

Floats = NDArray[np.float64]
BARRIERS = ("chord", "mean-end", "max-end", "mid")


@dataclass(frozen=True)
class Ends:
    """What a path is between: two models, the batches and the loss, what corrects a point, and what evaluates such a path again."""

    models: tuple[torch.nn.Module, torch.nn.Module]
    batches: Any
    loss: Any
    corrected: Any
    interpolate: Callable[..., Path]


@dataclass(frozen=True, eq=False)
class Path(Result):
    """A loss, and metrics, along the line from a model A (α=0) to a model B (α=1).

    Attributes:
        alphas: float64 (points,), rising.
        sets: names of the sets of data: "train", and "test" if it was given.
        names: "loss", and those of the metrics.
        values: float64 (sets, points, quantities): means over all examples.
        correct: None, "batchnorm" or "repair": what was done to the points between A and B.
        layers: paths of the modules that move, None for all. The end at 1 is then A with B's layers.
        complete: False if the sweep was interrupted; alphas are then those that were evaluated.
    """

    alphas: Floats
    sets: tuple[str, ...]
    names: tuple[str, ...]
    values: Floats
    correct: str | None = None
    layers: tuple[str, ...] | None = None
    complete: bool = True
    _source: Ends | None = field(default=None, init=False, repr=False)

    def of(self, name: str = "loss", on: str | None = None) -> Floats:
        """A quantity along the path, float64 (points,), on a set of data: "train" or "test".

        Raises:
            InputError: that was not measured.
        """
        return picked(self.values, self.sets, self.names, name, on)

    @property
    def loss(self) -> Floats:
        """The loss, float64 (points,), on the batches (the first set of data)."""
        return self.of("loss")

    @property
    def metrics(self) -> dict[str, Floats]:
        """Name -> metric, float64 (points,), on the batches."""
        return {name: self.of(name) for name in self.names[1:]}

    @property
    def test_loss(self) -> Floats:
        """The loss, float64 (points,), on the test batches."""
        return self.of("loss", "test")

    @property
    def test_metrics(self) -> dict[str, Floats]:
        """Name -> metric, float64 (points,), on the test batches."""
        return {name: self.of(name, "test") for name in self.names[1:]}

    def barrier(self, kind: str = "chord", *, of: str = "loss", on: str | None = None, skipna: bool = False) -> float:
        """How much the loss L rises between the ends, as one number, in the unit of the loss. It may be negative.

        Args:
            kind: "chord", the largest L(α) − [(1−α)·L(0) + α·L(1)] between the ends (Entezari et al., 2022);
                "mean-end", max L − ½(L(0) + L(1)) (Ainsworth et al., *Git Re-Basin*; Frankle et al., 2020, with the error);
                "max-end", the largest L between the ends − max(L(0), L(1));
                "mid", L(½) − ½(L(0) + L(1)) (Jordan et al., *REPAIR*).
            of: "loss" or the name of a metric, which is taken as a loss. For "accuracy" it is the error, 1 − accuracy.
            on: "train" or "test"; None is the batches.
            skipna: leave out points where it is not a number; otherwise one of them makes the barrier NaN.

        Raises:
            InputError: an unknown kind; the path was not evaluated at 0 and 1, or at ½ for "mid".
        """
        if kind not in BARRIERS:
            raise InputError(f"barrier kind {kind!r} is not among {BARRIERS}")
        values = self.of(of, on)
        values = 1 - values if of == "accuracy" else values
        start, end = self._at(0.0, kind), self._at(1.0, kind)
        first, last = values[start], values[end]
        if kind == "mid":
            return float(values[self._at(0.5, kind)] - (first + last) / 2)
        between = (self.alphas > 0) & (self.alphas < 1)
        inside = between if kind != "mean-end" and between.any() else (self.alphas >= 0) & (self.alphas <= 1)
        alphas, rise = self.alphas[inside], values[inside]
        if kind == "chord":
            rise = rise - ((1 - alphas) * first + alphas * last)
        elif kind == "mean-end":
            rise = rise - (first + last) / 2
        else:
            rise = rise - np.maximum(first, last)  # NaN if one is
        rise = rise[~np.isnan(rise)] if skipna else rise
        return float(rise.max()) if len(rise) else float("nan")

    def _at(self, alpha: float, kind: str) -> int:
        places = np.flatnonzero(np.abs(self.alphas - alpha) < 1e-9)
        if not len(places):
            hint = "an odd number of points has the middle" if alpha == 0.5 else "the path needs both ends"
            raise InputError(f"barrier({kind!r}) needs the loss at α={alpha:g}, which was not evaluated: {hint}; points are "
                             f"{[round(float(a), 4) for a in self.alphas[:8]]}{' ...' if len(self.alphas) > 8 else ''}")
        return int(places[0])

    @property
    def ends(self) -> Ends:
        """The models that the path is between, and how it was evaluated.

        Raises:
            InputError: the path was loaded from a file, which does not hold the models.
        """
        if self._source is None:
            layers = f", layers={set(self.layers)}" if self.layers else ""
            raise InputError(f"a path that was loaded from a file has no models; give them: landscape.merge([a, b], [1 - alpha, alpha]{layers})")
        return self._source

    def at(self, alpha: float) -> torch.nn.Module:
        """The model at a point: a copy in A's mode, corrected as the path was.

        Raises:
            InputError: the path was loaded from a file, which does not hold the models.
        """
        ends = self.ends
        made = merge(ends.models, _weights([alpha])[0].tolist(), layers=self.layers)
        if ends.corrected is not None:
            with random_state(), torch.compiler.set_stance("force_eager"):
                ends.corrected.at(made, _weights([alpha])[0].tolist(), ends.batches)
        return made

    def view(self, **options: Any) -> Any:
        """The path as a view in a notebook, with a diagram that shows where activations collapse, and layers to choose.

        Args:
            points: at which activations are measured, evenly.
            layers: evaluate the layers one by one, to choose from.
            depth: levels of blocks to unfold in the diagram.
            progress: show progress bars.

        Raises:
            InputError: as `ends`.
        """
        return importlib.import_module("circuitlab.widgets.walk").walk(self, **options)

    def to_frame(self) -> Any:
        """alpha, the loss and metrics, and those on the test batches as test_loss ..., as a pandas DataFrame."""
        import pandas as pd

        columns = {"alpha": self.alphas}
        for number, on in enumerate(self.sets):
            columns |= {name if not number else f"{on}_{name}": self.of(name, on) for name in self.names}
        return pd.DataFrame(columns)

    def plot(self, **options: Any) -> Any:
        """The path as a plotly Figure. See `circuitlab.plots.path`."""
        return importlib.import_module("circuitlab.plots").path(self, **options)

    def __repr__(self) -> str:
        try:
            told = ", ".join(f"{on} barrier {self.barrier('chord', on=on):.4g} over the chord" for on in self.sets)
        except InputError:
            told = "without both ends"
        extra = (f", corrected by {self.correct}" if self.correct else "") + (f", {len(self.layers)} layers move" if self.layers else "")
        return f"Path({len(self.alphas)} points{extra}: {told}{'' if self.complete else '; interrupted'})"


def interpolate(
    model_a: torch.nn.Module,
    model_b: torch.nn.Module,
    batches: Any,
    loss: Any = None,
    points: int | Sequence[float] = 25,
    correct: str | None = None,
    layers: Iterable[str] | None = None,
    executor: Executor | None = None,
    *,
    metrics: Any = None,
    test: Any = None,
    refine: int = 0,
    resume: str | File | None = None,
    seen: Callable[[Path], None] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Evaluate the models on the straight line between two models of one architecture.

    Neither is changed. Points are run in eval mode in a copy of A; at 0 and 1 it holds the numbers of A and B, bit for bit. An
    interrupt (Ctrl-C, or a notebook's stop button) gives the points that were evaluated so far, with a warning.

    Args:
        model_a, model_b: with the same parameters and buffers. They are not aligned: see ``match``.
        batches: what can be walked again, such as a list or a DataLoader: training data, also for corrections. They are kept on
            the model's device if they fit, and run as they are: large batches are fast.
        loss: "cross_entropy", "mse", a function of (output, batch) that gives a batch's mean, or None for the output's own.
        points: how many, evenly from 0 to 1, or which α. Exactly these are evaluated.
        correct: what is done to the points between the models. "batchnorm": running statistics are reset on the batches.
            "repair": means and standard deviations of channels are set to those between A and B (Jordan et al., 2023), where a layer
            has no bias the latter alone.
        layers: paths of the modules that move, such as ``{"transformer.h.3"}``; all others stay A's. None: all move. With
            corrections the point at 1, which is no model of its own then, is corrected too.
        executor: any `concurrent.futures.Executor` to evaluate on, such as a process pool or a Dask client's ``get_executor()``.
        metrics: "accuracy", functions of (output, batch), or a dict of these by name.
        test: a second set of batches.
        refine: at most so many points more, halving steps where the loss bends most.
        resume: a .safetensors file; what is in it is not evaluated again, and what is found is written to it now and then.
        seen: is called with the path so far, as points are evaluated.
        seed: of the chance within a forward, the same at every point.
        progress: show a progress bar.

    Raises:
        InputError: models that differ in names, shapes or types of their parameters, a layer that is not there, points that are
            no numbers, a correction that cannot be done, or batches that are empty.
    """
    alphas = _alphas(points)
    if not isinstance(refine, int) or refine < 0:
        raise InputError(f"refine={refine!r}: give how many points more, a whole number from 0")
    walked.check(batches)
    family = Combination.of([model_a, model_b], layers, ["model_a", "model_b"])
    moving = None if layers is None else (layers,) if isinstance(layers, str) else tuple(sorted(layers))
    data = {"train": batches} if test is None else {"train": batches, "test": test}
    with random_state(), torch.compiler.set_stance("force_eager"):
        corrected = correction(correct, [model_a, model_b], family, batches)
    about = f"{correct or 'none'}"
    sweeper = Sweeper(model_a, family, data, loss, metrics, prepare=corrected, about=about, executor=executor, resume=resume, seed=seed)

    alike = partial(interpolate, model_a, model_b, batches, loss, points, correct, executor=executor, metrics=metrics, test=test, seed=seed)
    ends = Ends((model_a, model_b), batches, loss, corrected, alike)

    def made(found: Sweep, complete: bool) -> Path:
        order = np.argsort(found.points[:, 1], kind="stable")
        order = order[found.done[order]]
        path = Path(found.points[order, 1], found.sets, found.names, found.values[:, order], correct, moving, complete)
        object.__setattr__(path, "_source", ends)
        return path

    left = refine
    found = _run(sweeper, alphas, made, seen, progress)
    while left > 0 and found.complete:
        more = _bends(made(found, complete=True), left)
        if not len(more):
            break
        left -= len(more)
        found = _run(sweeper, np.concatenate([found.points[:, 1], more]), made, seen, progress)
    return made(found, found.complete)


def _run(
    sweeper: Sweeper, alphas: Floats, made: Callable[[Sweep, bool], Path], seen: Callable[[Path], None] | None, progress: bool
) -> Sweep:
    """Evaluate points, coarse ones first."""
    order = _coarse_first(len(alphas))
    points = _weights(alphas[order])

    def tell(at: int, values: Mapping[str, Mapping[str, float]]) -> None:
        if seen is not None:
            seen(made(sweeper.so_far(points), False))

    return sweeper.run(points, tell if seen is not None else None, progress=progress, what="along the path")


def _weights(alphas: Any) -> Floats:
    alphas = np.asarray(alphas, dtype=np.float64)
    return np.stack([1 - alphas, alphas], 1)


def _alphas(points: Any) -> Floats:
    """The points that are asked for, rising."""
    if isinstance(points, int):
        if points < 2:
            raise InputError(f"points={points}: a path has at least its 2 ends")
        return np.linspace(0, 1, points)
    try:
        found = np.unique(np.asarray([float(point) for point in points], dtype=np.float64))
    except (TypeError, ValueError):
        found = np.array([np.nan])
    if not len(found) or not np.isfinite(found).all():
        raise InputError(f"points={points!r}: give how many, or the numbers α themselves, such as [0, 0.5, 1]")
    return found


def _coarse_first(n: int) -> NDArray[np.intp]:
    """An order in which the ends come first, then the middle, then the middles between these."""
    order, gaps = [0, n - 1][:n], [(0, n - 1)]
    while gaps:
        a, b = gaps.pop(0)
        if b - a > 1:
            middle = (a + b) // 2
            order.append(middle)
            gaps += [(a, middle), (middle, b)]
    return np.array(order, dtype=np.intp)


def _bends(path: Path, most: int) -> Floats:
    """Middles of the steps beside which the loss bends most."""
    alphas, loss = path.alphas, path.loss
    if len(alphas) < 3:
        return (alphas[:-1] + alphas[1:])[:most] / 2
    steps = np.diff(alphas)
    inner = (loss[:-2] * steps[1:] + loss[2:] * steps[:-1]) / (steps[1:] + steps[:-1])
    bend = np.nan_to_num(np.abs(loss[1:-1] - inner), nan=0, posinf=0, neginf=0)
    score = np.maximum(np.append(bend, 0), np.insert(bend, 0, 0))
    score[steps < 2e-4] = 0
    best = np.argsort(-score, kind="stable")[: min(most, max(1, len(steps) // 4))]
    best = best[score[best] > 1e-9 * max(np.ptp(loss[np.isfinite(loss)]), 1e-12)]
    return alphas[best] + steps[best] / 2


# layer by layer ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerPaths(Result):
    """A path for each layer, in which it alone moves from A to B: A with one layer of B at the end.

    Attributes:
        layers: paths of the modules.
        paths: one `Path` for each, at the same points.
    """

    layers: tuple[str, ...]
    paths: tuple[Path, ...]

    def barrier(self, kind: str = "chord", *, of: str = "loss", on: str | None = None) -> Floats:
        """The barrier of each, float64 (layers,). See `Path.barrier`."""
        return np.array([path.barrier(kind, of=of, on=on) for path in self.paths])

    def rise(self, of: str = "loss", on: str | None = None) -> Floats:
        """How much the loss rises by taking over each layer, L(1) − L(0): float64 (layers,)."""
        return np.array([path.of(of, on)[-1] - path.of(of, on)[0] for path in self.paths])

    def to_frame(self) -> Any:
        """layer, rise and the barriers of each, as a pandas DataFrame."""
        import pandas as pd

        kinds = [kind for kind in BARRIERS if kind != "mid" or np.any(np.abs(self.paths[0].alphas - 0.5) < 1e-9)]
        columns: dict[str, Any] = {"layer": list(self.layers), "rise": self.rise()}
        return pd.DataFrame(columns | {kind: self.barrier(kind) for kind in kinds})

    def plot(self, **options: Any) -> Any:
        """Bars for the layers as a plotly Figure. See `circuitlab.plots.layer_paths`."""
        return importlib.import_module("circuitlab.plots").layer_paths(self, **options)

    def __repr__(self) -> str:
        top = sorted(zip(self.rise(), self.layers, strict=True), reverse=True)[:3]
        return f"LayerPaths({len(self.layers)} layers, loss rises most by {', '.join(f'{name} ({rise:+.3g})' for rise, name in top)})"


def layerwise(
    model_a: torch.nn.Module,
    model_b: torch.nn.Module,
    batches: Any,
    loss: Any = None,
    layers: Sequence[str] | None = None,
    points: int | Sequence[float] = 11,
    *,
    progress: bool = True,
    **options: Any,
) -> LayerPaths:
    """Move one layer at a time from A to B.

    Args:
        model_a, model_b: see `interpolate`, which also takes ``options``.
        layers: paths of modules; None is the blocks that the model is made of.
        points: on each path.
        progress: show a progress bar.

    Raises:
        InputError: see `interpolate`.
    """
    from tqdm.auto import tqdm

    names = _blocks(model_a) if layers is None else list(layers)
    paths: list[Path] = []
    for name in tqdm(names, desc="layer by layer", disable=not progress, delay=1, leave=False):
        path = interpolate(model_a, model_b, batches, loss, points, layers={name}, progress=False, **options)
        paths.append(path)
        if not path.complete:
            break
    done = len(paths) - (not paths[-1].complete) if paths else 0
    return LayerPaths(tuple(names[:done]), tuple(paths[:done]))


def _blocks(model: torch.nn.Module, path: str = "") -> list[str]:
    """The modules with parameters that a model is made of; lists of them, and what holds only one, are opened."""
    found: list[str] = []
    children = [(name, child) for name, child in model.named_children() if next(child.parameters(), None) is not None]
    for name, child in children:
        where = f"{path}.{name}" if path else name
        inner = isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)) or len(children) == 1
        found += (_blocks(child, where) if inner else []) or [where]
    return found


__all__ = ["BARRIERS", "LayerPaths", "Path", "interpolate", "layerwise", "merge"]
