"""Ridge and mountainside: which curvature a loss barrier is made of.

On the straight line θ(t) = A + t·d, with d = B − A, the loss is above the chord between its ends by exactly

    L(α) − chord(α) = −∫ G(α, t) dᵀH(θ(t))d dt,      G = t(1 − α) for t ≤ α, and α(1 − t) otherwise,

with H the Hessian of the loss: where the loss bends down there is a barrier. dᵀHd is a sum over pairs of blocks of
parameters, and so is the barrier: what each block does alone, and what they do between them. ReLU and its like have kinks,
at which the slope jumps and which no Hessian sees; what they hold is found from the slopes, whose changes are all of the
curvature, kinks included. Losses, slopes and curvature are computed each on its own: that they fit together is checked.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.derivatives import Derivatives, NoSecondDerivativeError
from circuitlab.analysis.landscape import Path
from circuitlab.analysis.landscape import _blocks as block_paths
from circuitlab.analysis.results import Result
from circuitlab.analysis.states import State, alike, own_state, state_of, within
from circuitlab.errors import InputError

Floats = NDArray[np.float64]
REST = "rest"


@dataclass(frozen=True, eq=False)
class Ridge(Result):
    """Losses, slopes and curvature on the line between two models.

    Attributes:
        alphas: float64 (points,), evenly from 0 to 1. loss: float64 (points,), means over all examples.
        blocks: names of the blocks of parameters.
        slopes: float64 (points, blocks), of the loss as each block moves: their sum is dL/dα.
        curvature: float64 (points, blocks, blocks), d_bᵀ H d_c: their sum is dᵀHd.
        lengths: float64 (blocks,), how far each block moves, ‖d_b‖.
        method: "hessian", exact second derivatives; or "difference", differences of slopes over one step to both sides.
        angle: degrees between the ways from a parent to both models, None without one.
    """

    alphas: Floats
    loss: Floats
    blocks: tuple[str, ...]
    slopes: Floats
    curvature: Floats
    lengths: Floats
    method: str
    angle: float | None = None

    @property
    def rise(self) -> Floats:
        """The loss above the chord, L(α) − (1−α)·L(0) − α·L(1): float64 (points,)."""
        return _above_chord(self.alphas, self.loss)

    @property
    def total(self) -> Floats:
        """dᵀHd, float64 (points,)."""
        return self.curvature.sum((1, 2))

    @property
    def alone(self) -> Floats:
        """The rise by each block's own curvature, float64 (points, blocks)."""
        return _by_curvature(self.alphas, np.diagonal(self.curvature, axis1=1, axis2=2))

    @property
    def between(self) -> Floats:
        """The rise by the curvature between different blocks, float64 (points,)."""
        return _by_curvature(self.alphas, self.total - np.trace(self.curvature, axis1=1, axis2=2))

    @property
    def by_slopes(self) -> Floats:
        """The rise by what slopes change, float64 (points, blocks): that of a block holds all of what is between it and others."""
        return _by_slopes(self.alphas, self.slopes)

    @property
    def kinks(self) -> Floats:
        """The rise by kinks, float64 (points,): what slopes change by, and curvature does not tell. About `error` if there are none."""
        return self.by_slopes.sum(1) - _by_curvature(self.alphas, self.total)

    @property
    def residual(self) -> Floats:
        """The rise that is not explained, float64 (points,): that of the losses less that of the slopes."""
        return self.rise - self.by_slopes.sum(1)

    @property
    def error(self) -> Floats:
        """How much the rise by curvature changes if it is computed from every second point alone, float64 (points,)."""
        every = np.unique(np.append(np.arange(0, len(self.alphas), 2), len(self.alphas) - 1))
        coarse = _by_curvature(self.alphas[every], self.total[every], self.alphas)
        return np.abs(coarse - _by_curvature(self.alphas, self.total))

    @property
    def by_ends(self) -> Floats:
        """What the Hessians of both models would make the rise, the curvature going evenly from one to the other: float64 (points,)."""
        t, (first, last) = self.alphas, self.total[[0, -1]]
        return _above_chord(t, first * t**2 / 2 + (last - first) * t**3 / 6)

    def barrier(self, kind: str = "chord") -> float:
        """The barrier: see `circuitlab.analysis.landscape.Path.barrier`."""
        return Path(self.alphas, ("train",), ("loss",), self.loss[None, :, None]).barrier(kind)

    def to_frame(self) -> Any:
        """A row for each point: loss, rise, and what it is made of, as a pandas DataFrame."""
        import pandas as pd

        columns = {"alpha": self.alphas, "loss": self.loss, "slope": self.slopes.sum(1), "curvature": self.total, "rise": self.rise,
                   **{f"rise by {block}": self.alone[:, at] for at, block in enumerate(self.blocks)},
                   "rise between blocks": self.between, "rise by kinks": self.kinks, "residual": self.residual, "error": self.error,
                   "rise by the ends": self.by_ends}
        return pd.DataFrame(columns)

    def plot(self, **options: Any) -> Any:
        """Loss, curvature and what the rise is made of as a plotly Figure. See `circuitlab.plots.ridge`."""
        return importlib.import_module("circuitlab.plots").ridge(self, **options)

    def __repr__(self) -> str:
        top = int(np.argmax(np.abs(self.rise)))
        forked = "" if self.angle is None else f", fork of {self.angle:.0f}°"
        how = "second derivatives" if self.method == "hessian" else "differences of slopes"
        return (f"Ridge({len(self.alphas)} points, {len(self.blocks)} blocks{forked}: rise {self.rise[top]:.4g} at α={self.alphas[top]:.3g}, "
                f"of it blocks alone {self.alone[top].sum():.4g}, between them {self.between[top]:.4g}, kinks {self.kinks[top]:.4g}; the ends "
                f"would tell {self.by_ends[top]:.4g}; residual {np.abs(self.residual).max():.1g}; {how})")


def ridge(
    a: torch.nn.Module, b: torch.nn.Module, batches: Any, loss: Any = None, points: int = 25, *,
    blocks: Sequence[str] | Mapping[str, Sequence[str]] | None = None, parent: torch.nn.Module | None = None,
    method: str | None = None, double: bool = True, seed: int = 0, progress: bool = True,
) -> Ridge:
    """Find the curvature that the loss barrier between two models is made of.

    Args:
        a, b: of one architecture. They are not changed, and evaluated in eval mode.
        batches: what can be walked again.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        points: how many, evenly from a to b. At each there are one gradient, and one product with the Hessian for each block.
        blocks: paths of modules; or lists of these by name. What is in none is a block of its own. None is the blocks that the
            model is made of.
        parent: the model that both were trained from, for the angle of the fork.
        method: "hessian", second derivatives; "difference", differences of slopes, which see kinks; None is second derivatives
            where the model has them.
        double: compute in double precision, if the model runs in it. Single precision is good to some four digits, and faster:
            by about four times for convolutions on a CPU.
        seed: of the chance within a forward.
        progress: show a progress bar.

    Raises:
        InputError: models that differ in architecture or not at all, blocks that are not there or overlap, batches that are empty,
            or a loss without gradients.
    """
    if not isinstance(points, int) or points < 5:
        raise InputError(f"points={points!r}: give a whole number of at least 5; curvature is integrated over them")
    if method not in (None, "hessian", "difference"):
        raise InputError(f"method={method!r} is not known; give 'hessian', 'difference' or None")
    alike([a, b] if parent is None else [a, b, parent], ["a", "b", "parent"][: 2 if parent is None else 3])
    walked.check(batches)
    first, last = _own(a), _own(b, a)
    moved = [name for name, tensor in first.items() if tensor.is_floating_point() or tensor.is_complex()]
    moved = [name for name in moved if not torch.equal(first[name], last[name].to(first[name].device))]
    if not moved:
        raise InputError("a and b have the same parameters: there is no line between them")
    parts = _blocks(a, moved, blocks)
    derived = Derivatives(a, batches, loss, moved, seed=seed, double=double)
    start = {name: derived.target[name].clone() for name in first}
    derived.write(last)
    end = {name: derived.target[name].clone() for name in first}
    walk = _Walk(derived, start, end, parts)
    alphas = np.linspace(0, 1, points)
    try:
        used = method or walk.check()
    except NoSecondDerivativeError:
        used = "difference"
    losses, slopes, curvature = walk.run(alphas, used == "hessian", progress)
    lengths = np.array([math.sqrt(sum(_square(step) for step in direction.values())) for direction in walk.directions])
    return Ridge(alphas, losses, tuple(parts), slopes, curvature, lengths, used, None if parent is None else _angle(a, b, parent))


class _Walk:
    """Losses, slopes and curvature at points of the line."""

    def __init__(self, derived: Derivatives, start: State, end: State, parts: Mapping[str, Sequence[str]]) -> None:
        self.derived, self.start, self.end, self.parts = derived, start, end, parts
        self.directions = [{name: end[name] - start[name] for name in names} for names in parts.values()]

    def to(self, alpha: float, block: int | None = None, step: float = 0.0) -> None:
        """Write a point; with a block, that one a step further."""
        numbers = dict(self.end if alpha > 0.5 else self.start)
        for at, direction in enumerate(self.directions):
            here = alpha + (step if at == block else 0.0)
            numbers |= {name: torch.lerp(self.start[name], self.end[name], here) for name in direction}
        self.derived.write(numbers)

    def check(self) -> str:
        """The method that there is: curvature must be what slopes say, at one of a few places at least, as the others may be kinks.

        Raises:
            NoSecondDerivativeError: the model tells that it has no second derivatives.
        """
        whole = {name: step for direction in self.directions for name, step in direction.items()}
        for alpha in (0.31, 0.52, 0.77):
            self.to(alpha)
            if self.derived.is_right(whole):
                return "hessian"
        return "difference"

    def run(self, alphas: Floats, second: bool, progress: bool) -> tuple[Floats, Floats, Floats]:
        """Loss (points,), slopes (points, blocks), curvature (points, blocks, blocks)."""
        from tqdm.auto import tqdm

        n = len(self.directions)
        losses, slopes, curvature = np.zeros(len(alphas)), np.zeros((len(alphas), n)), np.zeros((len(alphas), n, n))
        with tqdm(total=len(alphas), desc="curvature", disable=not progress, delay=1, leave=False) as bar:
            for at, alpha in enumerate(alphas.tolist()):
                self.to(alpha)
                losses[at], slopes[at], found = self.derived.along(self.directions, second=second)
                curvature[at] = self._differences(alpha, 1 / (len(alphas) - 1)) if found is None else found
                bar.update()
        return losses, slopes, curvature

    def _differences(self, alpha: float, step: float) -> Floats:
        rows = []
        for block in range(len(self.directions)):
            sides = []
            for side in (step, -step):
                self.to(alpha, block, side)
                sides.append(self.derived.along(self.directions, second=False)[1])
            rows.append((sides[0] - sides[1]) / (2 * step))
        found = np.array(rows)
        return (found + found.T) / 2


def _own(model: torch.nn.Module, like: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model, each tied one once, by the names that another gives them."""
    state = state_of(model)
    return {name: state[name] for name in own_state(like or model)}


def _blocks(model: torch.nn.Module, moved: Sequence[str], blocks: Any) -> dict[str, list[str]]:
    """Block -> the names in it that move; those that are in none are in the last.

    Raises:
        InputError: a path that is not there, or blocks that overlap.
    """
    given: dict[str, Any] = dict(blocks) if isinstance(blocks, Mapping) else {
        path or "all": [path] for path in ([blocks] if isinstance(blocks, str) else block_paths(model) if blocks is None else blocks)}
    found: dict[str, list[str]] = {}
    for block, paths in given.items():
        inside = within(model, paths)
        double = sorted(name for other in found.values() for name in other if name in inside)
        if double:
            raise InputError(f"blocks: {double[0]!r} is in block {block!r} and in one before it; a parameter can be in one block only")
        names = [name for name in moved if name in inside]
        if names:
            found[block] = names
    rest = [name for name in moved if not any(name in names for names in found.values())]
    return found | ({REST: rest} if rest else {})


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double() if not tensor.is_complex() else tensor)) ** 2


def _angle(a: torch.nn.Module, b: torch.nn.Module, parent: torch.nn.Module) -> float:
    """Degrees between the ways from a parent to two models.

    Raises:
        InputError: a child is the parent.
    """
    names = [name for name, tensor in a.named_parameters() if tensor.is_floating_point()]
    first, second, origin = (state_of(model) for model in (a, b, parent))
    one = two = both = 0.0
    for name in names:
        from_, device = origin[name].double(), origin[name].device
        to_a, to_b = first[name].to(device).double() - from_, second[name].to(device).double() - from_
        one, two, both = one + _square(to_a), two + _square(to_b), both + float((to_a * to_b).sum())
    if not one or not two:
        raise InputError(f"parent has the same parameters as {'b' if one else 'a'}: there is no fork")
    return math.degrees(math.acos(max(-1.0, min(1.0, both / math.sqrt(one * two)))))


# integrals --------------------------------------------------------------------------------------------


def _above_chord(t: Floats, values: Floats) -> Floats:
    """Values (points, ...) less the straight line between the first and the last."""
    share = t.reshape(-1, *[1] * (values.ndim - 1))
    return values - (1 - share) * values[0] - share * values[-1]


def _by_curvature(t: Floats, curvature: Floats, at: Floats | None = None) -> Floats:
    """−∫ G(α, t)·c(t) dt for each α: what has c as its second derivative, above its chord. c is a cubic spline through its points."""
    from scipy.interpolate import CubicSpline

    at = t if at is None else at
    return _above_chord(at, CubicSpline(t, curvature).antiderivative(2)(at))


def _by_slopes(t: Floats, slopes: Floats) -> Floats:
    """The same from first derivatives, whose changes are all of the curvature."""
    from scipy.interpolate import CubicSpline

    return _above_chord(t, CubicSpline(t, slopes).antiderivative(1)(t))


__all__ = ["Ridge", "ridge"]
