"""The networks inside a network: loss against width, and against what it costs.

A network that was trained with many widths at once keeps its accuracy when its wires are cut to their first entries
(SortedNet: Valipour et al., 2023); of an ordinary one, entries are dropped by importance, as in structured pruning (OTO: Chen
et al., 2021). Random entries are always there beside them: they show what the choice is worth.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.results import Result
from circuitlab.circuit import Circuit, Wire
from circuitlab.cost import cost
from circuitlab.cut import Cut, cut, parameters
from circuitlab.errors import InputError

KEEPS = ("first", "norm", "random")


@dataclass(frozen=True)
class WidthCurve(Result):
    """Mean loss over all examples, for each number of entries kept and each way to choose them.

    Attributes:
        wires: names of the wires that are cut. sizes: their whole sizes.
        whole: loss of the whole network.
        widths: for each step the entries that are kept of each wire, ascending.
        flops: of one run on inputs of the traced shapes, for each step. parameters: their number, for each step.
        whole_flops, whole_parameters: of the whole network.
        rows: (keep, step, draw, loss): only "random" is drawn several times.
        changes: the wires that are not just masked, with the reason; see `circuitlab.cut.Cut`.
    """

    wires: tuple[str, ...]
    sizes: tuple[int, ...]
    whole: float
    widths: tuple[tuple[int, ...], ...]
    flops: tuple[int, ...]
    parameters: tuple[int, ...]
    whole_flops: int
    whole_parameters: int
    rows: tuple[tuple[str, int, int, float], ...]
    changes: dict[str, str]

    def loss(self, keep: str, step: int) -> float:
        """The loss at a step, as the mean over draws.

        Raises:
            InputError: that was not measured.
        """
        found = [value for way, at, _, value in self.rows if (way, at) == (keep, step)]
        if not found:
            raise InputError(f"no loss for keep={keep!r} at step {step}; measured are {sorted({row[0] for row in self.rows})} at "
                             f"{len(self.widths)} steps")
        return float(np.mean(found))

    def to_frame(self) -> Any:
        """One row for each step, way and draw: keep, width, share, draw, loss, increase, flops, parameters."""
        import pandas as pd

        rows = [
            {"keep": way, "width": self.widths[step][0], "share": self.widths[step][0] / self.sizes[0], "draw": draw, "loss": value,
             "increase": value - self.whole, "flops": self.flops[step], "parameters": self.parameters[step]}
            for way, step, draw, value in self.rows
        ]
        return pd.DataFrame(rows, columns=["keep", "width", "share", "draw", "loss", "increase", "flops", "parameters"])

    def plot(self, against: str = "width") -> Any:
        """Loss against "width", "flops" or "parameters" as a plotly Figure. See `circuitlab.plots.width_curve`."""
        if against not in ("width", "flops", "parameters"):
            raise InputError(f"against={against!r} is not one of 'width', 'flops', 'parameters'")
        return importlib.import_module("circuitlab.plots").width_curve(self, against)

    def __repr__(self) -> str:
        steps = ", ".join(str(width[0]) for width in self.widths)
        return f"WidthCurve({len(self.wires)} wires, widths {steps} of {self.sizes[0]}, loss of the whole {self.whole:.4g})"


def width_curve(
    circuit: Circuit,
    model: torch.nn.Module,
    wire: Any,
    widths: Sequence[float],
    batches: Any,
    loss: Any = None,
    *,
    keep: Sequence[str] = ("first", "norm", "random"),
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> WidthCurve:
    """Measure a model's loss with fewer entries of a wire.

    Args:
        circuit: traced from this model, in eval mode, with what batches hold (labels too if they give the loss).
        model: is not changed, and run in eval mode.
        wire: a wire, as `circuitlab.cut.cut` takes it; or several, which are cut at once to the same share.
        widths: numbers of entries, or shares up to 1 (1.0 is the whole, 1 is one entry). Of several wires, shares alone
            if they differ in size.
        batches: what can be walked again.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        keep: how entries are chosen: the "first", those of the largest `importance` ("norm"), or at "random".
        draws: number of random choices at each width.
        seed: of the random choices.
        progress: show a progress bar.

    Raises:
        InputError: a wire that cannot be cut, a width out of range, an unknown ``keep``, or batches that are empty.
    """
    walked.check(batches)
    unknown = [way for way in keep if way not in KEEPS]
    if unknown or not keep:
        raise InputError(f"keep={unknown or keep} is not among {KEEPS}")
    if not widths:
        raise InputError("widths is empty: give numbers of entries, or shares of them")
    names = [wire] if isinstance(wire, (str, Wire)) else list(wire) if isinstance(wire, Iterable) else [wire]
    walked.loss_of(loss)
    whole = cut(circuit, dict.fromkeys(names, 0.5))  # checks the wires
    cut_wires = [circuit.wires[name] for name in whole.kept]
    steps = sorted({tuple(_entries(found, width) for found in cut_wires) for width in widths})
    generator = np.random.default_rng(seed)
    scores = {found.name: importance(circuit, model, found.name) for found in cut_wires} if "norm" in keep else {}
    plan: list[tuple[str, int, int, Cut]] = []
    for way in keep:
        for step, numbers in enumerate(steps):
            for draw in range(draws if way == "random" and numbers != tuple(w.size for w in cut_wires) else 1):
                chosen: dict[str, Any] = {}
                if way == "norm":
                    chosen = scores
                elif way == "random":
                    chosen = {found.name: generator.random(found.size) for found in cut_wires}
                asked = {found.name: number for found, number in zip(cut_wires, numbers, strict=True)}
                plan.append((way, step, draw, cut(circuit, asked, keep=chosen)))
    rows: list[tuple[str, int, int, float]] = []
    with walked.evaluated(model) as copied:
        dense = walked.mean_loss(copied, batches, loss, what="loss of the whole", progress=progress)
        for number, (way, step, draw, made) in enumerate(plan):
            small = made.apply(copied).eval()
            rows.append((way, step, draw, walked.mean_loss(small, batches, loss, what=f"loss against width, {number + 1} of {len(plan)}", progress=progress)))
    costs = {step: made.circuit for _, step, _, made in reversed(plan)}
    return WidthCurve(
        tuple(found.name for found in cut_wires), tuple(found.size for found in cut_wires), dense, tuple(steps),
        tuple(_flops(costs[step]) for step in range(len(steps))), tuple(parameters(costs[step]) for step in range(len(steps))),
        _flops(circuit), parameters(circuit), tuple(rows), dict(whole.changes),
    )


def _entries(wire: Wire, width: float) -> int:
    if isinstance(width, float) and 0 < width <= 1:
        return max(1, round(width * wire.size))
    if width != int(width) or not 1 <= width <= wire.size:
        raise InputError(f"widths: {width!r} is not a number from 1 to {wire.size}, the size of the wire {wire.name!r}, nor a share up to 1")
    return int(width)


def _flops(circuit: Circuit) -> int:
    return int(cost(circuit)["flops"].iloc[0])


def importance(circuit: Circuit, model: torch.nn.Module, wire: str) -> np.ndarray:
    """For each entry of a wire the norm of all parameters that it has: the group norm of OTO.

    Args:
        circuit: traced from this model.
        model: is not changed.
        wire: name of a wire.

    Returns:
        float64 (size of the wire,).
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    total = np.zeros(circuit.wires[wire].size)
    for tensor in circuit.tensors:
        for dim, names in enumerate(tensor.dims if tensor.kind == "parameter" else ()):
            owner = _owner(circuit.wires, names, wire)
            if (owner >= 0).any():
                values = named[tensor.name].detach().double().cpu().movedim(dim, 0)
                squares = values.square().reshape(len(values), -1).sum(1).numpy()
                total += np.bincount(owner[owner >= 0], squares[owner >= 0], minlength=len(total))
    return np.sqrt(total)


def _owner(wires: Mapping[str, Wire], names: Iterable[str], wanted: str) -> np.ndarray:
    """For each entry of a product of wires, which entry of a wire it belongs to; -1 where to none."""
    found = np.full(1, -1)
    for name in names:
        wire = wires[name]
        if name == wanted:
            mine = np.arange(wire.size)
        else:
            mine = np.full(wire.size, -1)
            for start, stop, inner in wire.parts:
                mine[start:stop] = _owner(wires, inner, wanted)
        found = np.where(mine >= 0, mine, found[:, None]).ravel()
    return found
