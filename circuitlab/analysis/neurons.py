"""Which neurons of a feed-forward block fire, and which fire together: statistics streamed over batches.

One pass for all blocks, on the model's device; no activations are kept. Counts are exact integers, whatever the batches
are split into, as long as the model computes the same numbers.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.feedforward import FeedForward, blocks
from circuitlab.analysis.labels import Labels
from circuitlab.analysis.results import Result
from circuitlab.analysis.rows import Rows, run
from circuitlab.analysis.sample import Reservoir, Sample
from circuitlab.circuit import Circuit, Wire
from circuitlab.errors import InputError

ROWS = 4096
"""Positions that are counted at once."""
BLOCK = 2048
"""Neurons whose pairs with all later ones are counted at once."""
TRIED = 8  # batches, for one that reaches all blocks that are asked for
CALIBRATION = 4096
"""Positions that the default threshold of a smooth activation is taken from."""
BINS = tuple(sorted({2.0 ** (step / 4) for step in range(-64, 49)} | {1 - 2.0 ** (-step / 4) for step in range(8, 85)}))
"""Edges of the histograms of a neuron's values, on both sides of zero: quarter octaves from 2^-16 to 2^12, and of the distance
to 1, where tanh and sigmoid saturate, down to 2^-21."""


@dataclass(frozen=True)
class NeuronStats(Result):
    """What the neurons of one wire did over all positions of all batches.

    Attributes:
        wire: name of the hidden wire, and ffn: its block; with [e] after it for expert e of many in one parameter.
        n: number of positions counted (tokens; without padding).
        threshold: a neuron fires where ``|h| > threshold``.
        firing: int64 (neurons,), positions at which each fires.
        cofiring: integer (neurons, neurons), positions at which both fire; the diagonal is `firing`.
        mean, mean_abs, second: float64 (neurons,), means of h, |h| and h².
        keys: (neurons, inputs), rows of the map before the activation (gate rows of gated blocks), as they were.
        values: (neurons, outputs), rows of the value map.
        label_names: names of the labels, () without labels.
        label_n: int64 (labels,), positions of each label.
        label_firing: int64 (labels, neurons). label_abs: float64 (labels, neurons), sums of |h|.
        histogram: int32 (labels, neurons, bins) of h, between `BINS`; None without labels.
        batches: number of batches walked. complete: whether that was all of them.
        sample: some positions with what the block read there; None if that could not be had.
    """

    wire: str
    ffn: FeedForward
    n: int
    threshold: float
    firing: torch.Tensor
    cofiring: torch.Tensor
    mean: torch.Tensor
    mean_abs: torch.Tensor
    second: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    label_names: tuple[str, ...] = ()
    label_n: torch.Tensor | None = None
    label_firing: torch.Tensor | None = None
    label_abs: torch.Tensor | None = None
    histogram: torch.Tensor | None = None
    batches: int = 0
    complete: bool = True
    sample: Sample | None = None

    @property
    def magnitude(self) -> torch.Tensor:
        """Mean size of what each neuron writes, E|h_j|·‖V_j‖: float64 (neurons,)."""
        return self.mean_abs * self.values.double().norm(dim=1)

    @property
    def frequency(self) -> torch.Tensor:
        """Share of positions at which each neuron fires: float64 (neurons,)."""
        return self.firing.double() / self.n

    @cached_property
    def dead(self) -> int:
        """Number of neurons that never fire."""
        return int((self.firing == 0).sum())

    def to_frame(self) -> Any:
        """One row for each neuron, as a pandas DataFrame: neuron, firing, frequency, mean, mean_abs, second, magnitude."""
        import pandas as pd

        columns = {"firing": self.firing, "frequency": self.frequency, "mean": self.mean, "mean_abs": self.mean_abs,
                   "second": self.second, "magnitude": self.magnitude}
        made = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        if self.label_names and self.label_firing is not None and self.label_n is not None:
            share = self.label_firing.double() / self.label_n.clamp(min=1)[:, None]
            for name, row in zip(self.label_names, share, strict=True):
                made[f"fires on {name}"] = row.numpy()
        return made.rename_axis("neuron").reset_index()

    def functional(self, **options: Any) -> Any:
        """How well each neuron detects each label. See `circuitlab.analysis.functional.functional`."""
        import importlib

        return importlib.import_module("circuitlab.analysis.functional").functional(self, **options)

    def plot(self, **options: Any) -> Any:
        """Firing and co-firing as a plotly Figure. See `circuitlab.plots.neurons`."""
        import importlib

        return importlib.import_module("circuitlab.plots").neurons(self, **options)

    def __repr__(self) -> str:
        state = "" if self.complete else f", stopped after {self.batches} batches"
        return (f"NeuronStats({self.wire}: {self.ffn.size} neurons over {self.n} positions, a neuron fires at "
                f"{float(self.frequency.mean()):.1%} of them (|h| > {self.threshold:g}), {self.dead} never do{state})")


def observe(
    model: torch.nn.Module,
    batches: Any,
    wires: Iterable[Wire | str] | None = None,
    labels: Any = None,
    *,
    threshold: float | None = None,
    mask: Any = "attention_mask",
    sample: int = 2048,
    seed: int = 0,
    resume: Mapping[str, NeuronStats] | None = None,
    progress: bool = True,
) -> dict[str, NeuronStats]:
    """Count firing and co-firing of the neurons of feed-forward blocks, in one pass over batches.

    The model is run in eval mode, without gradients, on a copy that shares its parameters. Interrupting it (Ctrl-C, the
    stop button) gives the statistics so far; give them as ``resume`` to go on.

    Args:
        model: any module with feed-forward blocks.
        batches: what can be walked again, of tuples (inputs ..., target), dicts or tensors.
        wires: hidden wires, as ``circuit.ffn.values()``, their names, or paths of their blocks; None takes all.
        labels: what the examples or positions are about: one integer or string for each example, or arrays of one for
            each position; or a function of a batch that gives them for it.
        threshold: a neuron fires where |h| is above it. By default 0 where the activation has exact zeros (ReLU); else
            the root mean square of h over the first 4,096 positions, to two digits.
        mask: positions to count: the name of an entry of dict batches (nothing is masked where it is missing), a
            function of a batch that gives booleans for each position, or None.
        sample: number of positions, drawn at random, whose inputs and hidden values are kept: `partition` compares neurons
            with random ones that read the same inputs. 0 keeps none.
        seed: of that draw.
        resume: what an interrupted call gave.
        progress: show a progress bar.

    Returns:
        wire name -> `NeuronStats`, on the CPU. Where one parameter holds all experts, each has its own, as "f[3]", of the positions
        that were sent to it. Experts that got none are left out, and where each is a module, without wires=, those that the first
        batch does not reach. Where tied weights make one wire of several blocks, those after the first stand under their paths.

    Raises:
        InputError: a wire that is no feed-forward block's, batches that are empty or can be walked only once, labels
            of another length, values that are not finite, or a wire on which no neuron ever fires.
    """
    walked.check(batches)
    with walked.evaluated(model) as copied:
        device = walked.device_of(copied)
        chosen = _reached(copied, batches, wires, device)
        known = Labels(labels, batches)
        counts = {name: _Count(block, copied, len(known.names), device, sample, seed) for name, block in _each(chosen).items()}
        skip = _resumed(counts, resume, known)
        _calibrate(counts, chosen, threshold, copied, batches, mask, device, progress)
        seen, complete, unmet = skip, True, set(chosen) - {_whole(name, chosen) for name, count in counts.items() if count.n}
        try:
            for number, batch in walked.walk(batches, device, what="observing neurons", progress=progress, skip=skip):
                parts = run(copied, batch, chosen)
                unmet -= {wire for wire in parts if parts[wire].hidden}
                wanted, marks = _mask(mask, batch), known.of(number, batch, device)
                for name, count in counts.items():
                    count.add(Rows(parts[_whole(name, chosen)], count.block, walked.examples(batch), wanted, marks, name), number)
                seen = number + 1
        except KeyboardInterrupt:
            complete = False
            warnings.warn(f"interrupted after {seen} batches: these are the statistics so far; go on with observe(..., resume=stats)")
    if complete and unmet:
        raise InputError(f"the values of {', '.join(sorted(unmet))} were met in no batch: nothing reached them, or they are mapped (torch.vmap)")
    empty = [name for name, count in counts.items() if count.block.expert is not None and not count.n]
    if empty:
        warnings.warn(f"left out: no position was sent to {', '.join(empty)}")
    return {name: count.result(known.names, seen, complete) for name, count in counts.items() if name not in empty}


# what is observed -------------------------------------------------------------------------------------


def _traced(model: torch.nn.Module, batch: Any) -> Circuit:
    from circuitlab.trace.record import trace

    args, kwargs = walked.inputs_of(model, batch)
    return trace(model, *args, **kwargs)


def _reached(model: torch.nn.Module, batches: Any, wires: Iterable[Wire | str] | None, device: torch.device) -> dict[str, FeedForward]:
    """Wire name -> block, of the first batch; where what runs depends on the data, of the first of some that reaches all that are asked for."""
    wanted = wires if wires is None or isinstance(wires, (str, Wire)) else list(wires)
    missed: InputError | None = None
    for batch in itertools.islice(iter(batches), TRIED):
        circuit = _traced(model, walked.to_device(batch, device))
        try:
            return {name: _alone(block, walked.examples(batch)) for name, block in _chosen(circuit, wanted, stacked=True).items()}
        except InputError as error:
            if circuit.device == "meta" or wanted is None:
                raise
            missed = missed or error
    if missed is None:
        raise InputError("batches is empty: there is nothing to run the model on")
    raise InputError(f"{missed}; or it depends on the data what runs, and none of the first batches reaches all that is asked for")


def _chosen(circuit: Circuit, wires: Iterable[Wire | str] | None, *, stacked: bool = False) -> dict[str, FeedForward]:
    """Wire name -> block, of the wires that are asked for; those of stacked experts are left out if they cannot be told apart."""
    found = blocks(circuit)
    if wires is None:
        asked: list[Wire | str] = list(found)
    else:
        asked = [wires] if isinstance(wires, (str, Wire)) else list(wires)
    chosen: dict[str, FeedForward] = {}
    left: list[str] = []
    for number, wire in enumerate(asked):
        name, places = (wire.name, wire.places) if isinstance(wire, Wire) else (wire, ())
        same = [block for block in found.values() if (circuit.wires[block.wire].places == places if places else block.wire == name)]
        # tied weights make one wire of several blocks: each time that it is given, it is the next one's
        block = found[name] if isinstance(wire, str) and name in found else same[min(asked[:number].count(wire), len(same) - 1)] if same else None
        if block is None:
            what = repr(wire.name if isinstance(wire, Wire) else wire)
            has = f"those of {type(circuit).__name__} {circuit.title} are {', '.join(b.wire for b in found.values())}" if found else (
                f"{circuit.title} has none")
            raise InputError(f"{what} is no hidden wire of a feed-forward block; {has}; see circuit.ffn")
        if block.stacked > 1 and not (stacked and block.told):
            left.append(f"{block.wire} is left out: neuron j of its {block.stacked} experts, which share one parameter, is "
                        f"another in each ({block.values[0].parameter})")
            continue
        key = wire.name if isinstance(wire, Wire) else block.wire
        chosen[block.path if key in chosen and chosen[key] != block else key] = block
    if left and not chosen:
        raise InputError("; ".join(left))
    for why in left:
        warnings.warn(why)
    if not chosen:
        raise InputError(f"{circuit.title} has no feed-forward block to observe: no hidden wire that linear maps make and contract "
                         "with only elementwise functions between; see circuit.ffn")
    return chosen


def _each(blocks: Mapping[str, FeedForward]) -> dict[str, FeedForward]:
    """The same with each of stacked experts by itself."""
    found: dict[str, FeedForward] = {}
    for name, block in blocks.items():
        one = block.stacked == 1
        found |= {name: block} if one else {f"{name}[{e}]": replace(block, expert=e) for e in range(block.stacked)}
    return found


def _whole(name: str, blocks: Mapping[str, FeedForward]) -> str:
    """Name of the wire that an expert is of."""
    return name if name in blocks else name.rpartition("[")[0]


def _alone(block: FeedForward, examples: int) -> FeedForward:
    """The block of a run on one example, whose axis is no wire: it is the first of size 1."""
    if block.batch is not None or examples > 1 or block.picked:
        return block
    return replace(block, batch=next((number for number, dim in enumerate(block.positions) if not dim), 0))


def _mask(mask: Any, batch: Any) -> torch.Tensor | None:
    if callable(mask):
        return cast("torch.Tensor", mask(batch)).bool()
    if isinstance(mask, str) and isinstance(batch, Mapping):
        found = cast("Mapping[str, Any]", batch).get(mask)
        return found.bool() if isinstance(found, torch.Tensor) and found.ndim == 2 else None
    return None


@cache
def _multiplies_halves(device: torch.device) -> bool:
    """Whether products of bfloat16 can be added up in float32 there, which is many times as fast."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    try:
        torch.mm(*torch.ones(2, 16, 16, dtype=torch.bfloat16, device=device), out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


class _Count:
    """The sums over positions of one wire, or of one expert's part of it."""

    def __init__(self, block: FeedForward, model: torch.nn.Module, labels: int, device: torch.device, sample: int = 0, seed: int = 0) -> None:
        self.block, self.device = block, device
        self.name = block.wire if block.expert is None else f"{block.wire}[{block.expert}]"
        self.threshold = 0.0
        size = block.size
        self.exact = torch.float64 if device.type != "mps" else torch.float32
        self.n = 0
        self.firing = torch.zeros(size, dtype=torch.int64, device=device)
        self.together = torch.zeros(size, size, device=device)  # whole numbers below 2^24 are exact
        self.since, self.total = 0, None
        self.sums = torch.zeros(3, size, dtype=self.exact, device=device)
        self.label_n = torch.zeros(labels, dtype=torch.int64, device=device)
        self.label_firing = torch.zeros(labels, size, dtype=torch.int64, device=device)
        self.label_abs = torch.zeros(labels, size, dtype=self.exact, device=device)
        bins = 2 * len(BINS) + 1
        self.histogram = torch.zeros(labels, size, bins, dtype=torch.int32, device=device) if labels else None
        self.edges = torch.tensor([-edge for edge in reversed(BINS)] + list(BINS), device=device)
        self.named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        first, value = block.first[0], block.values[0]
        self.keys = first.of(self.named[first.parameter].detach(), block.expert).cpu().clone()
        self.values = value.of(self.named[value.parameter].detach(), block.expert).cpu().clone()
        self.reservoir = Reservoir(sample, seed) if sample else None

    def add(self, seen: Rows, number: int) -> None:
        """Add the positions of one batch."""
        start = 0
        for whole, read in zip(seen.hidden, seen.inputs, strict=True):
            for at in range(0, len(whole), ROWS):
                rows, inputs = whole[at : at + ROWS], None if read is None else read[at : at + ROWS]
                part = slice(start, start + len(rows))
                start += len(rows)
                marks = None if seen.marks is None else seen.marks[part]
                if seen.mask is not None:
                    keep = seen.mask[part]
                    rows, marks, inputs = rows[keep], None if marks is None else marks[keep], None if inputs is None else inputs[keep]
                if self.block.experts is not None and self.block.expert is not None and inputs is not None:
                    sent = inputs.any(-1)  # positions that were not sent to this expert are zero
                    rows, marks, inputs = rows[sent], None if marks is None else marks[sent], inputs[sent]
                if self.reservoir is not None and len(rows):
                    self.reservoir.add(self.n, inputs, rows)
                self._add(rows.float(), marks)
        if not bool(self.sums[1].isfinite().all()):
            bad = int((~self.sums[1].isfinite()).nonzero()[0])
            raise InputError(f"neuron {bad} of {self.name} is not finite in batch {number}: the model's activations are NaN or "
                             "infinite there; look at the weights and at that batch")

    def _add(self, rows: torch.Tensor, marks: torch.Tensor | None) -> None:
        if not len(rows):
            return
        size = rows.abs()
        fires = (size > self.threshold).float()
        self.n += len(rows)
        self._flush(len(rows))
        self._count(fires)
        self.firing += fires.sum(0).long()
        for number, values in enumerate((rows, size, rows.square())):
            self.sums[number] += values.sum(0, dtype=self.exact)
        if marks is not None:
            self._mark(rows, size, fires, marks)

    def _count(self, fires: torch.Tensor) -> None:
        """Add who fires with whom, above the diagonal. Zeros and ones have exact products in bfloat16 too, added up in float32."""
        half = _multiplies_halves(self.device)
        fires = fires.bfloat16() if half else fires
        for at in range(0, self.block.size, BLOCK):
            these, with_these, sums = fires[:, at : at + BLOCK].T, fires[:, at:], self.together[at : at + BLOCK, at:]
            if half:
                sums += torch.mm(these, with_these, out_dtype=torch.float32)
            else:
                sums.addmm_(these, with_these)

    def _mark(self, rows: torch.Tensor, size: torch.Tensor, fires: torch.Tensor, marks: torch.Tensor) -> None:
        keep = marks >= 0
        if not bool(keep.all()):
            rows, size, fires, marks = rows[keep], size[keep], fires[keep], marks[keep]
        hot = torch.nn.functional.one_hot(marks, len(self.label_n)).float()
        self.label_n += hot.sum(0).long()
        self.label_firing += (hot.T @ fires).long()
        self.label_abs += (hot.T @ size).to(self.exact)
        if self.histogram is not None:
            bins = torch.bucketize(rows, self.edges)
            place = (marks[:, None] * self.block.size + torch.arange(self.block.size, device=self.device)) * self.histogram.shape[2] + bins
            flat = self.histogram.view(-1)
            flat.scatter_add_(0, place.flatten(), torch.ones(1, dtype=torch.int32, device=self.device).expand(place.numel()))

    def _flush(self, rows: int) -> None:
        """Keep the float counts below 2^24, from where whole numbers are no longer exact."""
        self.since += rows
        if self.since >= 2**24:
            self.total = self.together.long() if self.total is None else self.total.add_(self.together.long())
            self.together.zero_()
            self.since = rows

    def result(self, names: tuple[str, ...], seen: int, complete: bool) -> NeuronStats:
        """The statistics on the CPU."""
        together = self.together.int() if self.total is None else self.total + self.together.long()
        for at in range(0, self.block.size, BLOCK):
            part = slice(at, at + BLOCK)
            together[at + BLOCK :, part] = together[part, at + BLOCK :].T
        if complete and not bool(self.firing.any()):
            largest = float(self.sums[1].max() / max(self.n, 1))
            raise InputError(f"no neuron of {self.name} fires: no |h| is above the threshold {self.threshold:g} at {self.n} "
                             f"positions (the largest mean |h| is {largest:.3g}); give a lower threshold=")
        sums = self.sums.cpu().double() / max(self.n, 1)
        labelled = bool(names)
        return NeuronStats(
            self.name, self.block, self.n, self.threshold, self.firing.cpu(), together.cpu(), sums[0], sums[1], sums[2],
            self.keys, self.values, names, self.label_n.cpu() if labelled else None,
            self.label_firing.cpu() if labelled else None, self.label_abs.cpu().double() if labelled else None,
            None if self.histogram is None else self.histogram.cpu(), seen, complete,
            None if self.reservoir is None else self.reservoir.sample(self.block, self.named),
        )

    def go_on(self, stats: NeuronStats) -> None:
        """Start from what was counted before."""
        self.n, self.threshold, self.since = stats.n, stats.threshold, 0
        if self.reservoir is not None and stats.n:
            self.reservoir.go_on(stats.sample, self.device)
        self.firing = stats.firing.to(self.device, copy=True)
        self.total = stats.cofiring.to(self.device).long().triu() if stats.n >= 2**24 else None
        if self.total is None:
            self.together, self.since = stats.cofiring.to(self.device).float(), stats.n
        self.sums = torch.stack([stats.mean, stats.mean_abs, stats.second]).mul(stats.n).to(self.device, self.exact)
        if stats.label_n is not None and stats.label_firing is not None and stats.label_abs is not None:
            self.label_n = stats.label_n.to(self.device, copy=True)
            self.label_firing = stats.label_firing.to(self.device, copy=True)
            self.label_abs = stats.label_abs.to(self.device, self.exact, copy=True)
            self.histogram = None if stats.histogram is None else stats.histogram.to(self.device, copy=True)


def _resumed(counts: Mapping[str, _Count], resume: Mapping[str, NeuronStats] | None, known: Labels) -> int:
    """Start counts from those of an interrupted call; the number of batches that it walked."""
    if resume is None:
        return 0
    missing = [name for name, count in counts.items() if name not in resume and count.block.expert is None]
    different = [name for name, stats in resume.items() if name in counts and stats.label_names != known.names]
    if missing or different or len({stats.batches for stats in resume.values()}) > 1:
        raise InputError(f"resume must be what observe gave for the same wires and labels: {missing or different} differ")
    for name, stats in resume.items():
        if name in counts:
            counts[name].go_on(stats)
    return next(iter(resume.values())).batches


def _calibrate(
    counts: Mapping[str, _Count], chosen: Mapping[str, FeedForward], threshold: float | None, model: torch.nn.Module, batches: Any,
    mask: Any, device: torch.device, progress: bool,
) -> None:
    """Set the thresholds."""
    if threshold is not None:
        if not 0 <= threshold < float("inf"):
            raise InputError(f"threshold={threshold} must be a number of at least 0: a neuron fires where |h| is above it")
        for count in counts.values():
            count.threshold = float(threshold)
        return
    smooth = {name: count for name, count in counts.items() if not count.block.zeros and not count.n}
    squares: dict[str, tuple[float, int]] = dict.fromkeys(smooth, (0.0, 0))
    for _, batch in walked.walk(batches, device, what="setting thresholds", progress=progress) if smooth else ():
        parts = run(model, batch, chosen)
        for name, count in smooth.items():
            seen = Rows(parts[_whole(name, chosen)], count.block, walked.examples(batch), _mask(mask, batch), None, name)
            rows = torch.cat(seen.hidden) if seen.hidden else torch.zeros(0, count.block.size, device=device)
            rows = (rows if seen.mask is None else rows[seen.mask])[: CALIBRATION - squares[name][1]]
            total, n = squares[name]
            squares[name] = (total + float(rows.to(count.exact).square().sum()), n + len(rows))
        if all(n >= CALIBRATION for _, n in squares.values()):
            break
    for name, (total, n) in squares.items():
        smooth[name].threshold = float(f"{(total / max(n * smooth[name].block.size, 1)) ** 0.5:.1e}")
