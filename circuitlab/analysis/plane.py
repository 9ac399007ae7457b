"""The plane through three models: the loss in it, and how far other checkpoints are from it.

Coordinates are distances: with u the unit vector from a to b, and v the one at a right angle to it towards c, the model
at (x, y) is a + x·u + y·v. Lengths and angles are those of the parameters, each tied one counted once; buffers, such as
running statistics, are weighted with them, and do not count as distances.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
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
from circuitlab.analysis.states import Combination, State, alike, state_of
from circuitlab.analysis.sweep import Sweep, Sweeper
from circuitlab.errors import InputError

Floats = NDArray[np.float64]

THIN = 1e-5
"""Three models are on a line if the triangle's height is below this share of its sides: rounding alone gives 1e-7."""


@dataclass(frozen=True, eq=False)
class Plane(Result):
    """Losses in the plane through three models.

    Attributes:
        x: float64 (columns,), y: float64 (rows,), coordinates of the grid.
        sets: names of the sets of data. names: of the quantities, "loss" first.
        values: float64 (sets, rows, columns, quantities); NaN where a point was not evaluated, or is not finite.
        corners: float64 (3, 2), where the models are. at_corners: float64 (sets, 3, quantities), what they have.
        labels: names of the models.
        trajectory: float64 (checkpoints, 2), where those are in the plane; off: float64 (checkpoints,), how far from it.
        complete: whether every point was evaluated.
    """

    x: Floats
    y: Floats
    sets: tuple[str, ...]
    names: tuple[str, ...]
    values: Floats
    corners: Floats
    at_corners: Floats
    labels: tuple[str, ...] = ("a", "b", "c")
    trajectory: Floats | None = None
    off: Floats | None = None
    complete: bool = True

    def of(self, name: str = "loss", on: str | None = None) -> Floats:
        """A quantity on the grid, float64 (rows, columns), on a set of data (the first, if none is named).

        Raises:
            InputError: that was not measured.
        """
        return picked(self.values, self.sets, self.names, name, on)

    @property
    def loss(self) -> Floats:
        """The loss on the first set of data, float64 (rows, columns)."""
        return self.of()

    def weights(self, x: float, y: float) -> tuple[float, float, float]:
        """What the three models weigh at a point: of ``circuitlab.analysis.states.merge``."""
        return _weights(self.corners, x, y)

    def to_frame(self) -> Any:
        """A row for each set of data and point of the grid, as a pandas DataFrame."""
        return grids.grid_frame(self.values, self.sets, self.names, (self.x, self.y))

    def plot(self, **options: Any) -> Any:
        """The loss as a plotly Figure. See `circuitlab.plots.plane`."""
        return importlib.import_module("circuitlab.plots").plane(self, **options)

    def __repr__(self) -> str:
        corners = ", ".join(f"{label} {value:.4g}" for label, value in zip(self.labels, self.at_corners[0, :, 0], strict=True))
        more = f", {len(self.trajectory)} checkpoints" if self.trajectory is not None else ""
        rest = "" if self.complete else f", {int(np.isnan(self.loss).sum())} points missing"
        return f"Plane({len(self.x)} x {len(self.y)} points{more}, {self.sets[0]} loss: {corners}{rest})"


def plane(
    a: torch.nn.Module, b: torch.nn.Module, c: torch.nn.Module, batches: Any, loss: Any = None,
    grid: Any = (25, 25), trajectory: Sequence[torch.nn.Module | State] | None = None, *,
    margin: float = 0.3, metrics: Any = None, test: Any = None, labels: Sequence[str] = ("a", "b", "c"), executor: Executor | None = None,
    resume: str | Path | None = None, seen: Callable[[Plane], None] | None = None, seed: int = 0, progress: bool = True,
) -> Plane:
    """Measure the loss in the plane through three models of one architecture.

    Args:
        a, b, c: are not changed, and evaluated in eval mode. a is the origin, b is on the x axis.
        batches: what can be walked again.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        grid: numbers of points along x and y.
        trajectory: models or state dicts of the same architecture, such as the checkpoints of a training run; they are
            projected onto the plane.
        margin: how far the grid reaches beyond the models and the trajectory, as a share of their extent.
        metrics: "accuracy", functions of (output, batch), or a dict of these by name.
        test: a second set of batches.
        labels: what the figure calls the models.
        executor: any `concurrent.futures.Executor`; None evaluates here.
        resume: a .safetensors file: what is in it is not evaluated again, and what is found is written to it.
        seen: is called with the plane so far, as points are evaluated, coarse to fine.
        seed: of the chance within a forward, the same at every point.
        progress: show a progress bar.

    Raises:
        InputError: models that differ in architecture, that are the same, or that are on one line; batches that are empty.
    """
    counts = grids.sizes(grid)
    if not (np.isfinite(margin) and margin >= 0):
        raise InputError(f"margin={margin!r} must be a number of at least 0: a share of the extent of the models")
    if len(labels) != 3:
        raise InputError(f"labels={tuple(labels)} must be three names, of a, b and c")
    family = Combination.of([a, b, c], names=("a", "b", "c"))
    states = [_lengths_of(a, model) for model in (a, b, c)]
    corners = _corners(*states)
    rows = [_project(states, corners, _checkpoint(a, item, number)) for number, item in enumerate(trajectory or ())]
    inside = np.array([*corners, *(row[:2] for row in rows)])
    low, high = inside.min(0), inside.max(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    x, y = (np.linspace(low[axis], high[axis], counts[axis]) for axis in (0, 1))
    path = np.array(rows, dtype=np.float64).reshape(-1, 3) if trajectory is not None else None
    data = {"train": batches} if test is None else {"train": batches, "test": test}
    sweeper = Sweeper(a, family, data, loss, metrics, executor=executor, resume=resume, seed=seed)

    def made(found: Sweep, values: Floats) -> Plane:
        return Plane(x, y, found.sets, found.names, values, corners, found.values[:, :3], tuple(labels),
                     None if path is None else path[:, :2], None if path is None else path[:, 2], found.complete)

    return grids.evaluate(sweeper, np.eye(3).tolist(), (x, y), lambda *at: _weights(corners, *at), made, seen=seen, progress=progress, what="plane")


def _lengths_of(model: torch.nn.Module, other: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model that count in distances: those with a gradient to be had, each once."""
    state = state_of(other)
    return {name: state[name] for name, tensor in model.named_parameters() if tensor.is_floating_point() or tensor.is_complex()}


def _checkpoint(model: torch.nn.Module, item: Any, number: int) -> State:
    """The parameters of a checkpoint."""
    if isinstance(item, torch.nn.Module):
        alike([model, item], ["a", f"trajectory[{number}]"])
        return _lengths_of(model, item)
    if not isinstance(item, Mapping):
        raise InputError(f"trajectory[{number}] must be a model or a state dict, and is a {type(item).__name__}")
    wanted = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point() or tensor.is_complex()}
    for name, tensor in wanted.items():
        if not isinstance(item.get(name), torch.Tensor) or item[name].shape != tensor.shape:
            told = f"has {list(item[name].shape)} for it" if isinstance(item.get(name), torch.Tensor) else "does not have it"
            raise InputError(f"trajectory[{number}] is no state dict of a {type(model).__name__}: parameter {name!r} has shape "
                             f"{list(tensor.shape)}, and the dict {told}")
    return {name: item[name].detach() for name in wanted}


def _step(one: State, other: State, name: str) -> torch.Tensor:
    """From one to the other, in double precision where there is one."""
    there = one[name]
    exact = torch.float32 if there.device.type == "mps" else torch.complex128 if there.is_complex() else torch.float64
    return other[name].to(there.device, exact) - there.to(exact)


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.vdot(one.flatten(), other.flatten()).real)


def _corners(a: State, b: State, c: State) -> Floats:
    """Where three models are: a at the origin, b on the x axis, c above it.

    Raises:
        InputError: they are no triangle.
    """
    bb = bc = cc = 0.0
    for name in a:
        to_b, to_c = _step(a, b, name), _step(a, c, name)
        bb, bc, cc = bb + _dot(to_b, to_b), bc + _dot(to_b, to_c), cc + _dot(to_c, to_c)
    if not np.isfinite([bb, bc, cc]).all():
        raise InputError("a, b or c has parameters that are not finite numbers: there is no plane through them")
    size = sum(_dot(t.flatten(), t.flatten()) for t in (_step({name: torch.zeros_like(a[name])}, a, name) for name in a)) ** 0.5
    for one, other, apart in (("a", "b", bb), ("a", "c", cc), ("b", "c", max(bb - 2 * bc + cc, 0.0))):
        if apart**0.5 <= 1e-9 * size or apart == 0:
            raise InputError(f"{one} and {other} have the same parameters: a plane needs three different models")
    along = bc / bb**0.5
    height = sum(_dot(off, off) for off in (_step(a, c, name) - _step(a, b, name) * (bc / bb) for name in a)) ** 0.5
    if height <= THIN * max(bb, cc) ** 0.5:
        raise InputError(f"a, b and c are on one line (c is {height:.3g} off the line through a and b, which are {bb**0.5:.3g} apart): "
                         "a plane needs a third model beside it; along a line, use interpolate")
    return np.array([[0.0, 0.0], [bb**0.5, 0.0], [along, height]])


def _project(states: Sequence[State], corners: Floats, point: State) -> tuple[float, float, float]:
    """Coordinates of a checkpoint in the plane, and its distance from it."""
    a, b, c = states
    ends, (along, height) = corners[1, 0], corners[2]
    x = y = off = 0.0
    for name in a:
        to_b, to_c, to = _step(a, b, name), _step(a, c, name), _step(a, point, name)
        x, y = x + _dot(to_b, to), y + _dot(to_c, to)
    x /= ends
    y = (y - along * x) / height
    first, second = x / ends - y * along / (ends * height), y / height
    for name in a:
        rest = _step(a, point, name) - first * _step(a, b, name) - second * _step(a, c, name)
        off += _dot(rest, rest)
    return x, y, off**0.5


def _weights(corners: Floats, x: float, y: float) -> tuple[float, float, float]:
    ends, (along, height) = float(corners[1, 0]), corners[2].tolist()
    third = y / height
    second = (x - third * along) / ends
    return 1 - second - third, second, third


__all__ = ["Plane", "plane"]
