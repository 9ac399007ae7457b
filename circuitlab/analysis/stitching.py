"""The stitching matrix: each place of one network joined to each place of another, and how well that works."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.places import Place, find, layers
from circuitlab.analysis.results import Result
from circuitlab.analysis.stitch import LeastSquares, Side, Stitch, mean_loss, misfit, rows, sides, unexplained
from circuitlab.errors import InputError
from circuitlab.trace.compile import Compiled
from circuitlab.trace.guard import random_state


@dataclass(frozen=True, eq=False)
class StitchingMatrix(Result):
    """How well the front of one network up to each place fits to the back of another from each place.

    Attributes:
        titles: names of the two networks' classes.
        rows: places of the first. columns: places of the second.
        error: float64 (rows, columns), share of the variance of the second's features that the stitch leaves unexplained;
            NaN where positions differ.
        loss: float64 (rows, columns), of the stitched networks; NaN where positions differ, or no loss was asked for.
        loss_a, loss_b: of the two networks; None where no loss was asked for.
    """

    titles: tuple[str, str]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    error: NDArray[np.float64]
    loss: NDArray[np.float64]
    loss_a: float | None
    loss_b: float | None

    def to_frame(self) -> Any:
        """One row for each pair: front, back, error, loss, increase over the worse of the two networks."""
        import pandas as pd

        worse = math.nan if self.loss_a is None or self.loss_b is None else max(self.loss_a, self.loss_b)
        found = [
            {"front": front, "back": back, "error": self.error[i, j], "loss": self.loss[i, j], "increase": self.loss[i, j] - worse}
            for i, front in enumerate(self.rows) for j, back in enumerate(self.columns)
        ]
        return pd.DataFrame(found, columns=["front", "back", "error", "loss", "increase"])

    def plot(self, show: str | None = None) -> Any:
        """The matrix of "loss" or "error" as a plotly Figure; by default the loss, if it was measured."""
        if show not in (None, "loss", "error"):
            raise InputError(f"show={show!r} is not 'loss' or 'error'")
        show = show or ("error" if bool(np.isnan(self.loss).all()) else "loss")
        return importlib.import_module("circuitlab.plots").stitching(self, show)

    def __repr__(self) -> str:
        fits = int(np.isfinite(self.error).sum())
        told = "" if self.loss_a is None else f", losses of the two {self.loss_a:.4g} and {self.loss_b:.4g}, of stitched ones from {np.nanmin(self.loss):.4g}"
        return f"StitchingMatrix({len(self.rows)} × {len(self.columns)} places, {fits} pairs fit{told})"


def stitching_matrix(
    model_a: torch.nn.Module,
    model_b: torch.nn.Module,
    batches: Any,
    *,
    places_a: Sequence[str] | None = None,
    places_b: Sequence[str] | None = None,
    loss: Any = None,
    test: Any = None,
    bias: bool = True,
    ridge: float = 0.0,
    progress: bool = True,
) -> StitchingMatrix:
    """Stitch every place of one network to every place of another, each by a fit of its own.

    Args:
        model_a, model_b: as of `circuitlab.analysis.stitch.stitch`.
        batches: what can be walked again; the maps are fitted on them.
        places_a, places_b: names of places; by default the outputs of modules that all data go through.
        loss: as there; None measures the errors of the fits alone.
        test: batches on which the loss is measured; by default those of the fit.
        bias, ridge, progress: as there.

    Raises:
        InputError: an unknown place, networks that do not take the same batches, or no pair of places whose positions
            are the same.
    """
    a, b = sides(model_a, model_b, batches, ridge)
    if test is not None:
        walked.check(test)
    ours = [find(a.circuit, name) for name in places_a] if places_a is not None else layers(a.circuit)
    theirs = [find(b.circuit, name) for name in places_b] if places_b is not None else layers(b.circuit)
    if not ours or not theirs:
        raise InputError("places_a and places_b must name at least one place each")
    with random_state(), torch.no_grad():
        front_a = a.front(ours)
        fits, why = _fitted(a, b, ours, theirs, batches, bias, front_a, progress)
        error, maps = np.full((len(ours), len(theirs)), np.nan), dict[tuple[int, int], Stitch]()
        for i, (fit, fitting) in enumerate(fits):
            if fitting:
                weight, offset, _, left, spread = fit.solve(ridge)
                start = 0
                for j in fitting:
                    part = slice(start, start := start + theirs[j].size)
                    error[i, j] = unexplained(left[part], spread[part])
                    maps[i, j] = a.stitch(b, ours[i], theirs[j], weight[:, part], None if offset is None else offset[part])
        if not maps:
            raise InputError(f"no pair of places can be stitched: {why}")
        shown = batches if test is None else test
        values = np.full(error.shape, np.nan)
        if loss is not None:
            backs = [b.back(place) for place in theirs]
            extras = [a.also(b, back) for back in backs]
            measure, weights = walked.loss_of(loss), np.zeros(error.shape)
            values[tuple(np.array(list(maps)).T)] = 0
            for _, batch in walked.walk(shown, walked.device_of(a.model), what="loss of stitched networks", progress=progress):
                features, inputs = a.run(front_a, batch)
                for (i, j), made in maps.items():
                    output = backs[j](made(features[i]), *(inputs[number] for number in extras[j]))
                    n = walked.weight_of(loss, batch, output)
                    values[i, j] += float(measure(output, batch)) * n
                    weights[i, j] += n
            values /= np.maximum(weights, 1)
        losses = [mean_loss(side.model, loss, shown, like=side.model, progress=progress, what="loss") for side in (a, b)]
    names = [tuple(place.name for place in places) for places in (ours, theirs)]
    return StitchingMatrix((a.circuit.title, b.circuit.title), names[0], names[1], error, values, losses[0], losses[1])


def _fitted(
    a: Side, b: Side, ours: list[Place], theirs: list[Place], batches: Any, bias: bool, front_a: Compiled, progress: bool
) -> tuple[list[tuple[LeastSquares, list[int]]], str]:
    """For each of our places a fit to all of theirs that have the same positions, and which those are."""
    fits: list[tuple[LeastSquares, list[int]]] = []
    why = ""
    front_b = b.front(theirs)
    for _, batch in walked.walk(batches, walked.device_of(a.model), what="fitting stitches", progress=progress):
        before, after = a.features(front_a, ours, batch), b.features(front_b, theirs, batch)
        for i, x in enumerate(before):
            if len(fits) == i:
                reasons = [misfit(x, y, ours[i], place) for y, place in zip(after, theirs, strict=True)]
                why = why or next(filter(None, reasons), "")
                fits.append((LeastSquares(bias), [j for j, reason in enumerate(reasons) if not reason]))
            fit, fitting = fits[i]
            if fitting:
                fit.add(rows(x, ours[i]), torch.cat([rows(after[j], theirs[j]) for j in fitting], 1))
    return fits, why
