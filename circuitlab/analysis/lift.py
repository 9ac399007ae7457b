"""Which modules of different feed-forward blocks fire together.

With s_m the number of neurons of module m that fire at a position, the lift of two modules is E[s_m t_n] / (E[s_m] E[t_n]): how
much more often pairs of their neurons fire together than if the modules knew nothing of each other, 1 if they do not. Sums
of s_m t_n are exact, and take modules x modules numbers alone.

There are two kinds of controls, and a pair has to beat both (p is the larger):

- **other examples**: each example's firing in one block is paired with another example's in the other. What positions or
  neighbours have in common, whatever the example, is no lift.
- **shuffled**: the neurons of one block dealt out anew to modules of the same sizes, those of the other left as they are. Where
  all neurons fire more on some examples, any modules have some lift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.coupling import Coupling, chain, pooled
from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.functional import adjust
from circuitlab.analysis.membership import Members, indicators
from circuitlab.analysis.neurons import NeuronStats, _alone, _mask, _traced
from circuitlab.analysis.rows import Rows, run
from circuitlab.errors import InputError

POSITIONS = 2**15
"""Positions that are kept, as counts of modules, to pair examples anew."""


def cofiring_lift(
    model: torch.nn.Module,
    batches: Any,
    stats: Mapping[str, NeuronStats],
    partitions: Mapping[Any, Any],
    *,
    mask: Any = "attention_mask",
    controls: int = 49,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Coupling, ...]:
    """How much the modules of feed-forward blocks fire together, each block with the next of those given.

    Args:
        model: that was observed. It is run in eval mode, on a copy that shares its parameters.
        batches: what can be walked again, of tuples (inputs ..., target), dicts or tensors.
        stats: what `observe` gave, which tells above what a neuron fires.
        partitions: wire name -> `Partition`, or one module number for each neuron.
        mask: positions to count, as in `observe`.
        controls: number of times that examples are paired anew, and that neurons are shuffled.
        seed: of these.
        progress: show a progress bar.

    Returns:
        one `Coupling` of kind "lift" for each pair of successive blocks.

    Raises:
        InputError: fewer than two wires, a wire that was not observed, a partition of another wire, blocks that run on different
            positions, or too few positions.
    """
    first = walked.first(batches)
    device = walked.device_of(model)
    with walked.evaluated(model) as copied:
        first = walked.to_device(first, device)
        circuit = _traced(copied, first)
        found = [(_alone(block, walked.examples(first)), labels) for block, labels in chain(circuit, partitions)]
        if missing := [block.wire for block, _ in found if block.wire not in stats]:
            raise InputError(f"stats has nothing of {', '.join(missing)}; observe these wires first: it holds {', '.join(stats)}")
        thresholds = {block.wire: stats[block.wire].threshold for block, _ in found}
        counts = _Counts(copied, found, thresholds, device, controls, np.random.default_rng(seed))
        joints = [_Joint(controls, np.random.default_rng([seed, number])) for number in range(len(found) - 1)]
        for _, batch in walked.walk(batches, device, what="modules firing together", progress=progress):
            firing, examples = counts(batch, _mask(mask, batch)), walked.examples(batch)
            for joint, ((a, _), (b, _)) in zip(joints, pairwise(found), strict=True):
                if len(firing[a.wire].true) != len(firing[b.wire].true):
                    raise InputError(f"{a.wire} runs on {len(firing[a.wire].true)} positions and {b.wire} on {len(firing[b.wire].true)}: "
                                     "they cannot fire together")
                joint.add(firing[a.wire], firing[b.wire], examples)
    return tuple(
        joint.result(a.wire, b.wire, np.bincount(labels_a), np.bincount(labels_b), seed)
        for joint, ((a, labels_a), (b, labels_b)) in zip(joints, pairwise(found), strict=True)
    )


@dataclass
class _Kept:
    """Neurons that fire at each position, (positions, modules): of true modules, of shuffled ones (draws in turn); its example."""

    true: torch.Tensor
    shuffled: torch.Tensor
    example: NDArray[np.int64]


class _Counts:
    """How many neurons of each module fire at each position."""

    def __init__(
        self, model: torch.nn.Module, found: list[tuple[FeedForward, Members]], thresholds: Mapping[str, float], device: torch.device,
        draws: int, rng: np.random.Generator,
    ) -> None:
        self.model, self.thresholds = model, thresholds
        self.blocks = {block.wire: block for block, _ in found}
        self.size = {block.wire: int(labels.max()) + 1 for block, labels in found}
        self.modules = {
            block.wire: torch.from_numpy(np.hstack([indicators(labels), *(indicators(rng.permutation(labels)) for _ in range(draws))])).float().to(device)
            for block, labels in found
        }
        self.exact = torch.float64 if device.type != "mps" else torch.float32

    def __call__(self, batch: Any, mask: torch.Tensor | None) -> dict[str, _Kept]:
        parts = run(self.model, batch, self.blocks)
        found: dict[str, _Kept] = {}
        for wire, modules in self.modules.items():
            seen = Rows(parts[wire], self.blocks[wire], walked.examples(batch), mask, None, wire)
            if not seen.hidden:
                raise InputError(f"the values of {wire} were not read in this run; the model takes another way for this batch than for the first")
            rows = torch.cat([(part.abs() > self.thresholds[wire]).float() @ modules for part in seen.hidden])
            example = torch.arange(len(rows), device=rows.device) * walked.examples(batch) // max(len(rows), 1)
            if seen.mask is not None:
                rows, example = rows[seen.mask], example[seen.mask]
            rows = rows.to(self.exact)
            found[wire] = _Kept(rows[:, : self.size[wire]], rows[:, self.size[wire] :], example.cpu().numpy())
        return found


class _Joint:
    """Sums over positions of what two wires' modules do, as it is and with examples paired anew."""

    def __init__(self, controls: int, rng: np.random.Generator) -> None:
        self.controls, self.rng = controls, rng
        self.n, self.examples, self.shuffled = 0, 0, 0
        self.left: list[NDArray[np.float64]] = []
        self.right: list[NDArray[np.float64]] = []
        self.example: list[NDArray[np.int64]] = []
        self.sums: tuple[Any, ...] = ()
        self.shuffle_source: Any = 0.0
        self.shuffle_target: Any = 0.0

    def add(self, a: _Kept, b: _Kept, examples: int) -> None:
        one, other = (a.shuffled.T @ b.true).cpu().double(), (a.true.T @ b.shuffled).cpu().double()
        self.shuffle_source += np.hstack([one.numpy(), a.shuffled.sum(0).cpu().double().numpy()[:, None]])
        self.shuffle_target += np.vstack([other.numpy(), b.shuffled.sum(0).cpu().double().numpy()])
        self.left.append(a.true.cpu().double().numpy())
        self.right.append(b.true.cpu().double().numpy())
        self.example.append(a.example + self.examples)
        self.examples += examples
        if sum(map(len, self.left)) >= POSITIONS:
            self.flush()

    def flush(self) -> None:
        """Add what is kept."""
        if not self.left:
            return
        s, t, example = np.concatenate(self.left), np.concatenate(self.right), np.concatenate(self.example)
        self.left, self.right, self.example = [], [], []
        n, true = len(s), s.T @ t
        drawn = np.stack([s.T @ t[self._other(example)] for _ in range(self.controls)]) if n >= 8 else np.repeat(true[None], self.controls, 0)
        now = (s.sum(0), t.sum(0), true, drawn)
        self.sums = now if not self.sums else tuple(old + new for old, new in zip(self.sums, now, strict=True))
        self.n += n
        self.shuffled += n if n >= 8 else 0

    def _other(self, example: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each position one of another example: the same of that, if all are as long, else one that is far off."""
        n = len(example)
        lengths = np.unique(example, return_counts=True)[1]
        if len(lengths) >= 6 and (lengths == lengths[0]).all():
            order = self.rng.permutation(len(lengths))
            other = np.empty(len(lengths), dtype=np.int64)
            other[order] = np.roll(order, 1)
            return (other[:, None] * lengths[0] + np.arange(lengths[0])).ravel()
        gap = int(lengths.max()) if n >= 4 * lengths.max() else n // 4
        return (np.arange(n) + self.rng.integers(gap, n - gap + 1)) % n

    def result(self, source: str, target: str, sizes_a: NDArray[np.int64], sizes_b: NDArray[np.int64], seed: int) -> Coupling:
        self.flush()
        if not self.shuffled:
            raise InputError(f"{self.n} positions are too few to tell whether {source} and {target} fire together")
        s, t, true, drawn = self.sums
        a, b = len(s), len(t)
        one, sums_a = self.shuffle_source[:, :b].reshape(-1, a, b), self.shuffle_source[:, b].reshape(-1, a, 1)
        other, sums_b = self.shuffle_target[:a].reshape(a, -1, b).swapaxes(0, 1), self.shuffle_target[a].reshape(-1, 1, b)
        value = _lift(true, s[:, None], t, self.n)
        kinds = _lift(drawn, s[:, None], t, self.n), _lift(one, sums_a, t, self.n), _lift(other, s[:, None], sums_b, self.n)
        p = np.max([pooled(value, controls) for controls in kinds], 0)
        expected = np.max([controls.mean(0) for controls in kinds], 0)
        spread = np.max([controls.std(0, ddof=1) for controls in kinds], 0)
        return Coupling(source, target, "lift", value, expected, spread, p, adjust(p), self.controls, seed, sizes_a, sizes_b)


def _lift(joint: Any, one: Any, other: Any, n: int) -> Any:
    expected = one * other
    return joint * n / np.where(expected > 0, expected, np.nan)
