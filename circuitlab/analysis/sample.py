"""A few positions of a feed-forward block as they were: what it read there, and what its neurons did.

Each position has a random rank, which is a function of its number and the seed; those of the lowest ranks are kept. So the
sample is the same however positions come in batches, and can be continued.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.maps import Weight


@dataclass(frozen=True, eq=False)
class Sample:
    """Some positions of a wire, drawn at random without replacement, in the order that they came.

    Attributes:
        positions: int64 (sample,), their numbers among those counted.
        inputs: float32 (sample, inputs), what the block's first map read.
        hidden: float32 (sample, neurons), values of the wire.
        bias: float32 (neurons,), of the map before the activation.
        ups: (neurons, inputs) and up_bias: float32 (neurons,), of the other map of a gated block; None if it is not gated.
        seed: that the positions were drawn with.
    """

    positions: torch.Tensor
    inputs: torch.Tensor
    hidden: torch.Tensor
    bias: torch.Tensor
    ups: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    seed: int = 0


class Reservoir:
    """Keeps the positions of the lowest ranks.

    Args:
        size: how many.
        seed: of the ranks.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.positions = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.inputs = self.hidden = torch.zeros(0, 0, device="cpu")
        self.known = True

    def add(self, start: int, inputs: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """Offer positions that are numbered from ``start``: (positions, inputs) and (positions, neurons)."""
        if inputs is None:
            self.known = False  # inputs of some positions alone would be no sample
        if not self.known or inputs is None:
            return
        positions = torch.arange(start, start + len(hidden), device=hidden.device)
        if not len(self.positions):
            self.positions = positions[:0]
            self.inputs, self.hidden = inputs[:0].float(), hidden[:0].float()
        ranks = torch.cat([_rank(self.positions, self.seed), _rank(positions, self.seed)])
        kept = ranks.topk(min(self.size, len(ranks)), largest=False).indices
        old = len(self.positions)
        new = kept[kept >= old] - old
        stays = torch.zeros(old, dtype=torch.bool, device=hidden.device)
        stays[kept[kept < old]] = True
        free = (~stays).nonzero().flatten()
        for name, rows in (("positions", positions), ("inputs", inputs), ("hidden", hidden)):
            held, come = getattr(self, name), rows[new].to(getattr(self, name).dtype)
            held[free] = come[: len(free)]
            setattr(self, name, torch.cat([held, come[len(free) :]]) if len(come) > len(free) else held)

    def sample(self, block: FeedForward, named: dict[str, torch.Tensor]) -> Sample | None:
        """What was kept, on the CPU; None if inputs were not to be had.

        Args:
            block: whose positions these are.
            named: parameters of the model.
        """
        if not self.known or not len(self.positions):
            return None
        order = self.positions.argsort()
        first, up = block.first[0], block.keys[0]

        def bias(weight: Weight) -> torch.Tensor:
            entries = weight.of_bias(named[weight.bias].detach(), block.expert) if weight.bias in named else torch.zeros(block.size, device="cpu")
            return entries.float().cpu().clone()

        made = Sample(self.positions[order].cpu(), self.inputs[order].cpu(), self.hidden[order].cpu(), bias(first), seed=self.seed)
        if not block.gated:
            return made
        return replace(made, ups=up.of(named[up.parameter].detach(), block.expert).cpu().clone(), up_bias=bias(up))

    def go_on(self, sample: Sample | None, device: torch.device) -> None:
        """Start from what was kept before."""
        if sample is None:
            self.known = False
            return
        self.positions, self.inputs, self.hidden = (t.to(device, copy=True) for t in (sample.positions, sample.inputs, sample.hidden))


def _rank(positions: torch.Tensor, seed: int) -> torch.Tensor:
    """A number for each position that looks random (splitmix64; Steele, Lea & Flood, 2014)."""

    def shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x >> bits) & (2 ** (64 - bits) - 1)

    x = (positions + 1 + (seed << 40)) * -7046029254386353131
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return x ^ shifted(x, 31)
