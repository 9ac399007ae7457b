"""What is lost without some neurons: groups of neurons are set to zero, and the loss is measured on each label's examples.

If a group specialises in a label, that label's loss rises, and others' less: the matrix of group by label is diagonal (Zhang
et al., *Emergent Modularity in Pre-trained Transformers*, 2023; Xiao et al., *Configurable Foundation Models*, 2024). Any
neurons are missed a little, so each group stands beside random sets of as many neurons of the same wires.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.functional import Functional
from circuitlab.analysis.labels import Labels
from circuitlab.analysis.membership import members
from circuitlab.analysis.neurons import _chosen, _traced
from circuitlab.analysis.results import Result
from circuitlab.analysis.tap import Tap
from circuitlab.circuit import Circuit
from circuitlab.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PruneMatrix(Result):
    """Loss on each label's examples while a group of neurons is set to zero.

    Attributes:
        groups: names of the groups, such as the labels that they are functional for.
        label_names: names of the labels that the loss is measured on.
        wires: names of the wires. sizes: int64 (groups, wires), neurons that are set to zero.
        weight: int64 (labels,), what the mean of a label's loss is over: examples, or targets.
        baseline: float64 (labels,), loss with all neurons.
        loss: float64 (groups, labels), loss without the group.
        random: float64 (groups, draws, labels), loss without random sets of the same sizes.
        seed: of the random sets.
    """

    groups: tuple[str, ...]
    label_names: tuple[str, ...]
    wires: tuple[str, ...]
    sizes: Ints
    weight: Ints
    baseline: Floats
    loss: Floats
    random: Floats
    seed: int

    @property
    def increase(self) -> Floats:
        """How much the loss rises without a group: float64 (groups, labels)."""
        return self.loss - self.baseline

    @property
    def random_increase(self) -> Floats:
        """How much the loss rises without random sets, on average: float64 (groups, labels)."""
        return self.random.mean(1) - self.baseline

    @property
    def random_spread(self) -> Floats:
        """Standard deviation of that over random sets, NaN for fewer than two: float64 (groups, labels)."""
        draws = self.random.shape[1]
        return self.random.std(1, ddof=1) if draws > 1 else np.full(self.loss.shape, np.nan)

    @property
    def pvalue(self) -> Floats:
        """(r + 1) / (n + 1), where r of n random sets raise the loss as much or more: float64 (groups, labels)."""
        worse = (self.random >= self.loss[:, None]).sum(1)
        return (worse + 1) / (self.random.shape[1] + 1)

    def to_frame(self) -> Any:
        """One row for each group and label: group, neurons, label, loss, increase, random, spread, pvalue."""
        import pandas as pd

        groups, labels = self.loss.shape
        return pd.DataFrame({
            "group": np.repeat(np.array(self.groups, dtype=object), labels), "neurons": np.repeat(self.sizes.sum(1), labels),
            "label": np.tile(np.array(self.label_names, dtype=object), groups), "loss": self.loss.ravel(),
            "increase": self.increase.ravel(), "random": self.random_increase.ravel(), "spread": self.random_spread.ravel(),
            "pvalue": self.pvalue.ravel(),
        })

    def plot(self, *, beyond_random: bool = False) -> Any:
        """How much the loss rises as a plotly Figure; or how much more than without random sets."""
        import importlib

        shown = self.increase - self.random_increase if beyond_random else self.increase
        return importlib.import_module("circuitlab.plots").matrix(
            shown, self.groups, self.label_names, title="rise of the loss" + (" beyond that of random sets" if beyond_random else ""),
            row_title="without the neurons of", column_title="loss on", diverging=True,
        )

    def __repr__(self) -> str:
        lines = [f"PruneMatrix({', '.join(self.wires)}): loss rises by"]
        for row, group in enumerate(self.groups):
            told = ", ".join(f"{self.increase[row, at]:+.3g} on {name} (random {self.random_increase[row, at]:+.3g})"
                             for at, name in enumerate(self.label_names))
            lines.append(f"  without {group} ({int(self.sizes[row].sum())} neurons): {told}")
        return "\n".join(lines)


def prune_matrix(
    model: torch.nn.Module,
    neurons: Any,
    batches: Any,
    loss: Any = None,
    labels: Any = None,
    *,
    draws: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> PruneMatrix:
    """Set each group of neurons to zero, and measure the loss on the examples of each label.

    Batches are split by label, so losses are exactly those of a label's examples, whatever the loss function. That a batch
    can be split is tested: the loss of the first batch has to be the mean of that of its first example and of the others.

    Args:
        model: any module with feed-forward blocks. It is run in eval mode, on a copy that shares its parameters.
        neurons: ``{wire name: groups}``, where groups are a `Functional` (a group for each label), a `Partition` (a group for
            each module) or ``{group: neuron indices}``; groups of one name are set to zero together, in all wires.
            A `Functional` or a `Partition` may also be given alone.
        batches: what can be walked again, of tuples (inputs ..., target), dicts or tensors.
        loss: function of (output, batch), "cross_entropy", "mse", or None for the output's own.
        labels: what the examples are about: one integer or string for each, or a function of a batch that gives them.
        draws: number of random sets of each size, all different.
        seed: of the random sets.
        progress: show a progress bar.

    Raises:
        InputError: a wire that is no feed-forward block's, indices that it does not have, labels that are missing or are for
            positions, or batches that cannot be split into examples.
    """
    walked.check(batches)
    if labels is None:
        raise InputError("labels is missing: give what each example is about, one integer or string for each")
    if draws < 1:
        raise InputError(f"draws={draws} must be at least 1: without random sets beside it, a matrix says nothing")
    first = walked.first(batches)
    measure, known, device = walked.loss_of(loss), Labels(labels, batches), walked.device_of(model)
    with walked.evaluated(model) as copied:
        blocks, grouped = _blocks(_traced(copied, walked.to_device(first, device)), _grouped(neurons))
        masks, sizes = _masks(grouped, blocks)
        sets, use = _with_random(masks, draws, seed)
        run = _Run(copied, blocks, loss, measure, device, seed)
        total = np.zeros((len(sets) + 1, len(known.names)))
        weight = np.zeros(len(known.names), dtype=np.int64)
        for number, batch in walked.walk(batches, device, what="pruning neurons", progress=progress):
            marks = _marks(known, number, batch, device)
            if number == 0:
                run.check(batch)
            for label in marks.unique().tolist():
                if label < 0:
                    continue
                part = _rows(batch, marks == label)
                value, n = run(part, None)
                if not n:
                    continue
                weight[label] += n
                total[0, label] += value * n
                for at, masked in enumerate(sets, 1):
                    total[at, label] += run(part, masked)[0] * n
    mean = np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
    return PruneMatrix(
        tuple(masks), known.names, tuple(grouped), sizes, weight, mean[0], mean[1 : len(masks) + 1], mean[np.array(use) + 1], seed
    )


Masks = dict[str, torch.Tensor]
"""Wire -> bool (neurons,), True where a neuron is set to zero."""


class _Run:
    """Loss of the model on a batch, with some neurons at zero."""

    def __init__(
        self, model: torch.nn.Module, blocks: Mapping[str, FeedForward], loss: Any, measure: walked.Loss, device: torch.device, seed: int
    ) -> None:
        self.model, self.blocks, self.loss, self.measure, self.device, self.seed = model, blocks, loss, measure, device, seed

    def __call__(self, batch: Any, masks: Masks | None) -> tuple[float, int]:
        """The batch's loss, and how many terms it is the mean of."""
        args, kwargs = walked.inputs_of(self.model, batch)
        torch.manual_seed(self.seed)  # what is drawn at random in a run is the same in all
        if masks is None:
            with walked.running(self.model, batch):
                output = self.model(*args, **kwargs)
        else:
            moved = {wire: mask.to(self.device) for wire, mask in masks.items()}
            reached: set[str] = set()

            def zero(wire: str, hidden: torch.Tensor) -> torch.Tensor:
                reached.add(wire)
                return hidden.masked_fill(moved[wire], 0)

            with walked.running(self.model, batch), Tap(self.model, {wire: self.blocks[wire] for wire in moved}, zero):
                output = self.model(*args, **kwargs)
            if missed := sorted(set(moved) - reached):
                raise InputError(f"{', '.join(missed)}: its values were not read by {self.blocks[missed[0]].values[0].parameter} in this run, "
                                 "so they cannot be set to zero; the model takes another way for this batch than for the first")
        value = self.measure(output, batch)
        return float(value), walked.weight_of(self.loss, batch, output)

    def check(self, batch: Any) -> None:
        """An `InputError` unless the loss is the mean over examples, each of which is computed alone."""
        n = walked.examples(batch)
        if n < 2:
            return
        alone = torch.arange(n, device="cpu") == 0
        whole, weight = self(batch, None)
        if not math.isfinite(whole):
            raise InputError(f"the loss of the first batch is {whole}; look at the model and at that batch")
        parts = [self(_rows(batch, keep), None) for keep in (alone, ~alone)]
        split = sum(value * w for value, w in parts if w) / max(sum(w for _, w in parts), 1)
        coarse = max((torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point()), default=1e-7)
        if sum(w for _, w in parts) != weight or abs(split - whole) > max(1e-4, 8 * coarse) * abs(whole) + 1e-6:
            raise InputError(
                f"the loss of the first batch ({n} examples) is {whole:.6g}, and the mean of that of its first and of the others {split:.6g}: "
                "examples cannot be measured by label, for the loss is no mean over examples, the model mixes examples or draws random "
                "numbers, or the tensors of a batch do not have examples first"
            )


# groups -----------------------------------------------------------------------------------------------


def _grouped(neurons: Any) -> dict[str, dict[str, Any]]:
    """Wire name -> group -> neuron indices."""
    if isinstance(neurons, Functional) or hasattr(neurons, "labels"):
        if not getattr(neurons, "wire", ""):
            raise InputError(f"this {type(neurons).__name__} does not know its wire; give {{wire name: partition}}")
        neurons = {neurons.wire: neurons}
    if not isinstance(neurons, Mapping) or not neurons:
        raise InputError(f"neurons must be {{wire name: groups}}, a Functional or a Partition, and is a {type(neurons).__name__}")
    found: dict[str, dict[str, Any]] = {}
    for wire, groups in cast("Mapping[Any, Any]", neurons).items():
        name = wire if isinstance(wire, str) else wire.name
        if isinstance(groups, Functional):
            found[name] = dict(groups.sets)
        elif isinstance(groups, Mapping):
            found[name] = {str(group): chosen for group, chosen in cast("Mapping[Any, Any]", groups).items()}
        else:
            labels = members(groups)
            found[name] = {f"module {module}": np.flatnonzero(labels == module) for module in range(int(labels.max()) + 1)}
            found[name][""] = len(labels)  # to be compared with the wire's size
    return found


def _blocks(circuit: Circuit, grouped: dict[str, dict[str, Any]]) -> tuple[dict[str, FeedForward], dict[str, dict[str, Any]]]:
    """The block of each wire, and the groups by the names that the circuit has for the wires."""
    blocks: dict[str, FeedForward] = {}
    named: dict[str, dict[str, Any]] = {}
    for wire, groups in grouped.items():
        (block,) = _chosen(circuit, [wire]).values()
        if block.wire in named:
            raise InputError(f"{wire!r} is the wire {block.wire}, for which groups are given twice")
        blocks[block.wire], named[block.wire] = block, groups
    return blocks, named


def _masks(grouped: dict[str, dict[str, Any]], blocks: Mapping[str, FeedForward]) -> tuple[dict[str, Masks], Ints]:
    """Group -> masks of its wires, and the number of neurons of each group in each wire."""
    masks: dict[str, Masks] = {}
    for wire, groups in grouped.items():
        size = blocks[wire].size
        if groups.pop("", size) != size:
            raise InputError(f"the partition given for {wire} is of another number of neurons than its {size}")
        for group, chosen in groups.items():
            index = torch.as_tensor(np.asarray(chosen) if not isinstance(chosen, torch.Tensor) else chosen, device="cpu").flatten()
            if index.numel() and (index.is_floating_point() or index.dtype == torch.bool or not 0 <= int(index.min()) <= int(index.max()) < size):
                raise InputError(f"group {group!r} must hold indices of neurons of {wire}, integers from 0 to {size - 1}; "
                                 f"it holds {index.tolist()[:8]} ...")
            mask = torch.zeros(size, dtype=torch.bool, device="cpu")
            mask[index.long()] = True
            masks.setdefault(group, {})[wire] = mask
    if not masks:
        raise InputError("neurons holds no group")
    sizes = np.array([[int(group[wire].sum()) if wire in group else 0 for wire in grouped] for group in masks.values()], dtype=np.int64)
    return masks, sizes.reshape(len(masks), len(grouped))


def _with_random(masks: dict[str, Masks], draws: int, seed: int) -> tuple[list[Masks], list[list[int]]]:
    """The groups' masks and then those of random sets, shared by groups of equal sizes; and which sets are each group's."""
    rng = np.random.default_rng(seed)
    lengths = {wire: len(mask) for group in masks.values() for wire, mask in group.items()}
    wires = sorted({wire for group in masks.values() for wire in group}, key=list(lengths).index)
    sets, known, use = list(masks.values()), cast("dict[tuple[int, ...], list[int]]", {}), []
    for group in masks.values():
        key = tuple(int(group[wire].sum()) if wire in group else 0 for wire in wires)
        if key not in known:
            known[key] = []
            for _ in range(draws):
                drawn: Masks = {}
                for wire, count in zip(wires, key, strict=True):
                    if count:
                        drawn[wire] = torch.zeros(lengths[wire], dtype=torch.bool, device="cpu")
                        drawn[wire][torch.from_numpy(rng.permutation(lengths[wire])[:count])] = True
                known[key].append(len(sets))
                sets.append(drawn)
        use.append(known[key])
    return sets, use


# examples ---------------------------------------------------------------------------------------------


def _marks(known: Labels, number: int, batch: Any, device: torch.device) -> torch.Tensor:
    """The label of each example of a batch, -1 where there is none."""
    marks = known.of(number, batch, device)
    n = walked.examples(batch)
    assert marks is not None
    if marks.numel() != n or marks.shape[:1] != (n,):
        raise InputError(f"a loss is measured on whole examples, so labels must be one for each: batch {number} has {n} examples "
                         f"and labels of shape {tuple(marks.shape)}")
    return marks.reshape(n)


def _rows(batch: Any, keep: torch.Tensor) -> Any:
    """Some examples of a batch: those rows of what has as many rows as the batch has examples."""
    n = walked.examples(batch)

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[keep.to(value.device)] if value.ndim and value.shape[0] == n else value
        if isinstance(value, Mapping):
            return {key: part(item) for key, item in cast("Mapping[str, Any]", value).items()}
        if isinstance(value, (list, tuple)):
            items: Iterator[Any] = map(part, cast("Sequence[Any]", value))
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    return part(batch)
