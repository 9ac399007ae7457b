"""Where activations collapse along a path between two models.

Halfway between two networks, channels vary far less over the data than at either end, layer by layer more so, until the
last layers hardly see their inputs (Jordan et al., *REPAIR: REnormalizing Permuted Activations for Interpolation Repair*,
2023). The ratio that is measured here is their Figure 3, for every map with parameters of any circuit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.results import Result
from circuitlab.circuit import Circuit
from circuitlab.errors import InputError
from circuitlab.trace.record import record, trace
from circuitlab.trace.watch import Recorder

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class Collapse(Result):
    """Variance of what each map gives, at points of a path.

    Attributes:
        alphas: (points,), rising from 0 to 1.
        ops: names of the linear maps and convolutions of the circuit, in the order that they run.
        variance: (points, ops): of a channel over examples and positions, mean over channels.
    """

    alphas: tuple[float, ...]
    ops: tuple[str, ...]
    variance: Floats

    @property
    def ratio(self) -> Floats:
        """(points, ops): variance against what lies on the straight line between the ends; 1 where nothing collapses."""
        alpha = np.array(self.alphas)[:, None]
        line = (1 - alpha) * self.variance[0] + alpha * self.variance[-1]
        return np.divide(self.variance, line, out=np.full(self.variance.shape, np.nan), where=line > 0)

    def overlay(self, alpha: float) -> dict[str, float]:
        """Op -> ratio at the nearest point, to be drawn on a diagram of the circuit: ``circuit.view(overlay=...)``."""
        at = int(np.abs(np.array(self.alphas) - alpha).argmin())
        return {op: float(value) for op, value in zip(self.ops, self.ratio[at], strict=True) if np.isfinite(value)}

    def to_frame(self) -> Any:
        """Alpha, op, variance and ratio, as a pandas DataFrame."""
        import pandas as pd

        ratio = self.ratio
        rows = [(alpha, op, self.variance[i, j], ratio[i, j]) for i, alpha in enumerate(self.alphas) for j, op in enumerate(self.ops)]
        return pd.DataFrame(rows, columns=["alpha", "op", "variance", "ratio"])

    def plot(self, **options: Any) -> Any:
        """Ratio along the path, a line for each map, as a plotly Figure. See `circuitlab.plots.collapse`."""
        return importlib.import_module("circuitlab.plots").collapse(self, **options)

    def __repr__(self) -> str:
        ratio = np.where(np.isfinite(self.ratio), self.ratio, np.inf)
        if not ratio.size:
            return "Collapse of no map"
        i, j = np.unravel_index(ratio.argmin(), ratio.shape)
        return f"Collapse of {len(self.ops)} maps over {len(self.alphas)} points: least at {self.ops[j]}, {ratio[i, j]:.2f} at α = {self.alphas[i]:.2f}"


def collapse(at: Callable[[float], torch.nn.Module], batches: Any, alphas: Iterable[float] | int = 11, *, progress: bool = True) -> Collapse:
    """Measure variances along a path.

    Args:
        at: the model at a point, as `Path.at`; 0 and 1 are the ends. The models are not changed, and run in eval mode.
        batches: what can be walked again.
        alphas: points, among them 0 and 1; or how many, evenly.
        progress: show a progress bar.

    Raises:
        InputError: points beside [0, 1], or without the ends; no linear map or convolution in the run; models that run
            differently at different points; empty batches.
    """
    walked.check(batches)
    points = np.linspace(0, 1, alphas) if isinstance(alphas, int) else np.array(sorted(alphas), dtype=np.float64)
    if len(points) < 2 or points[0] != 0 or points[-1] != 1:
        raise InputError(f"alphas={alphas!r} must be at least two points from 0 to 1, both among them")
    channels: Mapping[str, tuple[int, ...]] = {}
    rows: list[dict[str, float]] = []
    for alpha in points.tolist():
        with walked.evaluated(at(alpha)) as model:
            sums: dict[str, _Moments] = {}
            for _, batch in walked.walk(batches, walked.device_of(model), what=f"variance at α = {alpha:.2f}", progress=progress):
                args, kwargs = walked.inputs_of(model, batch)
                channels = channels or _channels(trace(model, *args, **kwargs))
                if not channels:
                    raise InputError("this model has no linear map or convolution whose channels could collapse")
                reader = type("Reader", (_Reader,), {"channels": channels, "sums": sums})
                record(model, args, kwargs, meta=False, recorder_class=reader)
            rows.append({op: found.variance for op, found in sums.items()})
            if set(rows[-1]) != set(channels):
                raise InputError(f"at α = {alpha:g} the model runs differently: {', '.join(sorted(set(channels) ^ set(rows[-1])))}")
    return Collapse(tuple(points.tolist()), tuple(channels), np.array([[row[op] for op in channels] for row in rows]))


def _channels(circuit: Circuit) -> dict[str, tuple[int, ...]]:
    """Linear map or convolution -> the dimensions of its output that it makes."""
    found: dict[str, tuple[int, ...]] = {}
    for op in circuit.ops:
        if op.kind in ("linear", "conv"):
            made = sorted({dim for axis in op.axes if axis.role == "created" for number, dim, _ in axis.outs if number == 0})
            if made:
                found[op.name] = tuple(made)
    return found


class _Moments:
    """Streamed mean and variance of each channel (Chan, Golub & LeVeque, 1983)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: torch.Tensor | float = 0.0
        self.rest: torch.Tensor | float = 0.0

    def add(self, rows: torch.Tensor) -> None:
        n, mean = len(rows), rows.mean(0)
        shift = mean - self.mean
        self.rest = self.rest + ((rows - mean) ** 2).sum(0) + shift**2 * (self.n * n / (self.n + n))
        self.mean = self.mean + shift * (n / (self.n + n))
        self.n += n

    @property
    def variance(self) -> float:
        """Mean over channels."""
        return float(torch.as_tensor(self.rest, device="cpu").mean()) / self.n


class _Reader(Recorder):
    """Takes the moments of what maps give."""

    channels: Mapping[str, tuple[int, ...]]
    sums: dict[str, _Moments]

    def after(self, event: Any, func: Any, before: Any, results: list[torch.Tensor]) -> None:
        dims = self.channels.get(event.name)
        if dims and results:
            given = results[0].detach()
            rest = [dim for dim in range(given.ndim) if dim not in dims]
            width = [given.shape[dim] for dim in dims]
            rows = given.permute(*rest, *dims).reshape(-1, int(np.prod(width)))
            self.sums.setdefault(event.name, _Moments()).add(rows.float() if rows.device.type == "mps" else rows.double())
