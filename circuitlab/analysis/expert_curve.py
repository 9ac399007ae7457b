"""Loss of a model against the share of experts that it computes: what a partition of its neurons is worth.

Each position keeps the hidden values of its chosen experts, the others are zero; this is what `to_moe` computes. Random
partitions are always there beside the given one: a random partition with the best choice of experts is already near the
dense model, so a curve without it would mislead.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.experts import block_of, gate, members_of
from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.results import Result
from circuitlab.analysis.tap import Tap
from circuitlab.errors import InputError

SELECTIONS = ("oracle", "gate", "similarity", "random")


@dataclass(frozen=True)
class ExpertCurve(Result):
    """Mean loss over all examples, for each partition, way to choose experts, and share of experts.

    Attributes:
        dense: loss of the model itself.
        rows: (partition, selection, share of experts, loss), where partition is "given" or "random".
        wires: names of the wires that are cut into experts.
        experts: number of experts of each.
    """

    dense: float
    rows: tuple[tuple[str, str, float, float], ...]
    wires: tuple[str, ...]
    experts: tuple[int, ...]

    def loss(self, selection: str, share: float, partition: str = "given") -> float:
        """The loss at a share of experts.

        Raises:
            InputError: that was not measured.
        """
        for part, way, at, value in self.rows:
            if (part, way) == (partition, selection) and abs(at - share) < 1e-9:
                return value
        raise InputError(f"no loss for partition={partition!r}, selection={selection!r}, share={share}; measured are "
                         f"{sorted({row[:2] for row in self.rows})} at {sorted({row[2] for row in self.rows})}")

    def to_frame(self) -> Any:
        """Partition, selection, share, loss and increase over the dense model, as a pandas DataFrame."""
        import pandas as pd

        rows = [(*row[:4], row[3] - self.dense) for row in self.rows]
        return pd.DataFrame(rows, columns=["partition", "selection", "share", "loss", "increase"])

    def plot(self, **options: Any) -> Any:
        """Loss against share as a plotly Figure. See `circuitlab.plots.expert_curve`."""
        return importlib.import_module("circuitlab.plots").expert_curve(self, **options)

    def __repr__(self) -> str:
        shares = sorted({row[2] for row in self.rows})
        return f"ExpertCurve({len(self.wires)} wires, dense loss {self.dense:.4g}, {len(shares)} shares of experts)"


@dataclass
class _Cut:
    """A partition of one wire."""

    block: FeedForward
    members: torch.Tensor
    labels: torch.Tensor
    gates: dict[str, tuple[torch.Tensor, torch.Tensor | None]]
    norms: torch.Tensor


def expert_curve(
    model: torch.nn.Module,
    partitions: Mapping[str, Any],
    batches: Any,
    loss: Any = None,
    selection: Sequence[str] = ("oracle", "gate", "random"),
    *,
    shares: Sequence[float] = (0.125, 0.25, 0.5, 0.75),
    baseline: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> ExpertCurve:
    """Measure a model's loss with only a share of the experts of its feed-forward blocks.

    Args:
        model: is not changed, and run in eval mode.
        partitions: wire name -> `Partition`. All wires are cut at once.
        batches: what can be walked again.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        selection: how each position's experts are chosen: "oracle" by the size of what they would write, Σ|h_j|·‖V_j‖;
            "gate" by the mean key; "similarity" by the mean of keys at length 1; "random".
        shares: of experts, above 0 and below 1; 1 is the dense model.
        baseline: measure a random partition of the same sizes as well.
        seed: of the random choices.
        progress: show a progress bar.

    Raises:
        InputError: an unknown selection, a share out of range, partitions of another model, or batches that are empty.
    """
    walked.check(batches)
    unknown = [way for way in selection if way not in SELECTIONS]
    if unknown or not selection:
        raise InputError(f"selection={unknown or selection} is not among {SELECTIONS}")
    if any(not 0 < share <= 1 for share in shares) or not shares:
        raise InputError(f"shares={tuple(shares)} must be numbers above 0 and up to 1")
    measure = walked.loss_of(loss)
    with walked.evaluated(model) as copied:
        device = walked.device_of(copied)
        cuts = {"given": {wire: _cut(copied, block_of(wire, part, copied), part.labels) for wire, part in partitions.items()}}
        if baseline:
            generator = torch.Generator().manual_seed(seed)
            cuts["random"] = {
                wire: _cut(copied, cut.block, cut.labels.cpu()[torch.randperm(cut.block.size, generator=generator, device="cpu")])
                for wire, cut in cuts["given"].items()
            }
        plan = [("", "", 1.0)] + [(part, way, share) for part in cuts for way in selection for share in shares]
        totals = torch.zeros(len(plan), dtype=torch.float64, device="cpu")
        weight = n = 0
        for number, batch in walked.walk(batches, device, what="loss against experts", progress=progress):
            args, kwargs = walked.inputs_of(copied, batch)
            for at, (part, way, share) in enumerate(plan):
                with walked.running(copied, batch), _Masked(copied, cuts.get(part, {}), way, share, seed + number):
                    output = copied(*args, **kwargs)
                if not at:
                    n = walked.weight_of(loss, batch, output)
                    weight += n
                totals[at] += float(measure(output, batch)) * n
    means = (totals / max(weight, 1)).tolist()
    given = cuts["given"]
    return ExpertCurve(means[0], tuple((*row, mean) for row, mean in zip(plan[1:], means[1:], strict=True)),
                       tuple(given), tuple(len(cut.members) for cut in given.values()))


def _cut(model: torch.nn.Module, block: FeedForward, labels: Any) -> _Cut:
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first, value = block.first[0], block.values[0]
    keys = first.of(named[first.parameter].detach())
    bias = first.of_bias(named[first.bias].detach()) if first.bias else None
    members = members_of(labels).to(keys.device)
    where = torch.zeros(block.size, dtype=torch.int64, device=keys.device)
    for expert, row in enumerate(members):
        where[row[row >= 0]] = expert
    gates = {way: gate(keys, bias, members, way) for way in ("gate", "similarity")}
    return _Cut(block, members, where, gates, value.of(named[value.parameter].detach()).norm(dim=1))


class _Masked(Tap):
    """A tap that zeroes the hidden values of the experts that are not chosen."""

    def __init__(self, model: torch.nn.Module, cuts: Mapping[str, _Cut], selection: str, share: float, seed: int) -> None:
        self.cuts, self.selection, self.share = cuts, selection, share
        self.inputs: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        needs = self._enter if selection in ("gate", "similarity") else None
        super().__init__(model, {wire: cut.block for wire, cut in cuts.items()}, self._mask, needs)

    def _enter(self, wire: str, x: torch.Tensor) -> None:
        self.inputs[wire] = x

    def _mask(self, wire: str, h: torch.Tensor) -> torch.Tensor | None:
        cut = self.cuts[wire]
        experts = len(cut.members)
        number = max(1, round(self.share * experts))
        if number == experts:
            return None
        scores = self._scores(wire, cut, h)
        chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(number, -1, sorted=False).indices, 1)
        return h * chosen[..., cut.labels].to(h.dtype)

    def _scores(self, wire: str, cut: _Cut, h: torch.Tensor) -> torch.Tensor:
        """(..., experts): the larger, the sooner an expert is chosen."""
        experts = len(cut.members)
        if self.selection == "random":
            return torch.rand(*h.shape[:-1], experts, generator=self.generator, device="cpu").to(h.device)
        if self.selection == "oracle":
            size = h.abs() * cut.norms
            return size.new_zeros(*h.shape[:-1], experts).index_add_(-1, cut.labels, size)
        return torch.nn.functional.linear(self.inputs[wire], *cut.gates[self.selection])
