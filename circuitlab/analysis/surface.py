"""The loss around one model along random directions, filter-normalised (Li et al., *Visualizing the loss landscape*, 2018).

Each filter (each slice of a parameter along its first dimension) of a random direction has the length of the model's own
filter, so that surfaces of differently scaled models can be compared. Parameters with one dimension or none, such as
biases and the scales of norms, are fixed, and so are buffers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import grid as grids
from circuitlab.analysis.measures import picked
from circuitlab.analysis.results import Result
from circuitlab.analysis.states import Combination, State, state_of
from circuitlab.analysis.sweep import Sweep, Sweeper
from circuitlab.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Surface(Result):
    """Losses around a model along one direction or two.

    Attributes:
        x: float64 (columns,), y: float64 (rows,), shares of the directions; y is None along one.
        sets: names of the sets of data. names: of the quantities, "loss" first.
        values: float64 (sets, rows, columns, quantities), along one direction (sets, columns, quantities); NaN where a point was
            not evaluated, or is not finite.
        centre: float64 (sets, quantities), those of the model itself.
        about: what the directions are.
        complete: whether every point was evaluated.
    """

    x: Floats
    y: Floats | None
    sets: tuple[str, ...]
    names: tuple[str, ...]
    values: Floats
    centre: Floats
    about: str
    complete: bool = True

    def of(self, name: str = "loss", on: str | None = None) -> Floats:
        """A quantity, float64 (rows, columns) or (columns,), on a set of data (the first, if none is named).

        Raises:
            InputError: that was not measured.
        """
        return picked(self.values, self.sets, self.names, name, on)

    @property
    def loss(self) -> Floats:
        """The loss on the first set of data."""
        return self.of()

    @property
    def axes(self) -> tuple[Floats, ...]:
        """x, and y if there is one."""
        return (self.x,) if self.y is None else (self.x, self.y)

    def to_frame(self) -> Any:
        """A row for each set of data and point, as a pandas DataFrame."""
        return grids.grid_frame(self.values, self.sets, self.names, self.axes)

    def plot(self, **options: Any) -> Any:
        """The loss as a plotly Figure. See `circuitlab.plots.surface`."""
        return importlib.import_module("circuitlab.plots").surface(self, **options)

    def __repr__(self) -> str:
        rest = "" if self.complete else f", {int(np.isnan(self.loss).sum())} points missing"
        return f"Surface({' x '.join(str(len(axis)) for axis in self.axes)} points along {self.about}: {self.sets[0]} loss {self.centre[0, 0]:.4g} at the model{rest})"


def surface(
    model: torch.nn.Module, batches: Any, loss: Any = None, grid: Any = (25, 25), span: float = 1.0, seed: int = 0, *,
    directions: Sequence[State] | None = None, metrics: Any = None, test: Any = None, executor: Executor | None = None,
    resume: str | Path | None = None, seen: Callable[[Surface], None] | None = None, progress: bool = True,
) -> Surface:
    """Measure the loss around a model along random directions.

    Args:
        model: is not changed, and evaluated in eval mode.
        batches: what can be walked again.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        grid: numbers of points along both directions, such as (25, 25); one number is one direction.
        span: how far to go to both sides: at 1, each filter of a random direction is as long as the model's own.
        seed: of the directions, and of the chance within a forward.
        directions: others, such as eigenvectors of the Hessian: name of a parameter -> tensor, as many as the grid has axes. What
            they do not name is fixed.
        metrics: "accuracy", functions of (output, batch), or a dict of these by name.
        test: a second set of batches.
        executor: any `concurrent.futures.Executor`; None evaluates here.
        resume: a .safetensors file: what is in it is not evaluated again, and what is found is written to it.
        seen: is called with the surface so far, as points are evaluated, coarse to fine.
        progress: show a progress bar.

    Raises:
        InputError: no grid, a span that is not above 0, directions that do not fit, a model without a parameter of two dimensions, or
            batches that are empty.
    """
    counts = grids.sizes(grid, line=True)
    if not (math.isfinite(span) and span > 0):
        raise InputError(f"span={span!r} must be a number above 0")
    generator = torch.Generator().manual_seed(seed)
    ways = [filter_normalised(model, generator) for _ in counts] if directions is None else [_fitting(model, way, at) for at, way in enumerate(directions)]
    if len(ways) != len(counts):
        raise InputError(f"{len(ways)} directions do not fit a grid of {len(counts)} axes: grid={grid!r}")
    axes = [np.linspace(-span, span, count) for count in counts]
    about = f"random directions of seed {seed}" if directions is None else "given directions"
    data = {"train": batches} if test is None else {"train": batches, "test": test}
    family = Combination([state_of(model), *ways])
    sweeper = Sweeper(model, family, data, loss, metrics, executor=executor, resume=resume, seed=seed)

    def made(found: Sweep, values: Floats) -> Surface:
        return Surface(axes[0], axes[1] if len(axes) > 1 else None, found.sets, found.names, values, found.values[:, 0], about, found.complete)

    return grids.evaluate(sweeper, [[1.0, *[0.0] * len(axes)]], axes, lambda *at: (1.0, *at), made, seen=seen, progress=progress, what="surface")


def filter_normalised(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A random direction whose filters are as long as the model's; parameters of less than two dimensions are not in it.

    Raises:
        InputError: there are no others.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.named_parameters():
        if tensor.ndim < 2 or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        way = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.complex128 if tensor.is_complex() else torch.float64)
        length = torch.linalg.vector_norm(tensor.detach().cpu().to(way.dtype).flatten(1), dim=1)
        own = torch.linalg.vector_norm(way.flatten(1), dim=1)
        way *= (length / own).reshape(-1, *[1] * (tensor.ndim - 1))
        found[name] = way.to(tensor.dtype)
    if not found:
        raise InputError(f"{type(model).__name__} has no parameters with two dimensions or more, and others are fixed: give directions= of your own")
    return found


def _fitting(model: torch.nn.Module, way: Any, number: int) -> State:
    """A direction whose names and shapes are those of the model's parameters."""
    parameters = dict(model.named_parameters())
    for name, tensor in way.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            told = f"has shape {list(parameters[name].shape)} in the model, and {list(tensor.shape)} in it" if name in parameters else "is no parameter of the model"
            raise InputError(f"directions[{number}]: {name!r} {told}")
    return {name: tensor.detach().to(parameters[name].dtype) for name, tensor in way.items()}


__all__ = ["Surface", "filter_normalised", "surface"]
