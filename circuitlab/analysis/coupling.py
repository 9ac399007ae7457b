"""How strongly the modules of one feed-forward block feed those of the next, through the residual stream that both share.

Neuron i of a block writes its value V_i to the stream, and neuron j of a later block reads the stream with its key K_j (with
its gate, if it is gated): what i does moves j by V_i·K_j, directly. Two modules are coupled by the mean |cos(V_i, K_j)| of their
neurons; vectors are taken at unit length, for long ones would seem coupled to all. The norm before the later block is folded
into its keys where the circuit shows it: its gain scales them, and a LayerNorm takes their mean out.

Some modules are coupled more to all others than the rest are. So what is judged is the **interaction**, what a pair has beyond the
means of its two modules, against two controls; it has to beat both (p is the larger):

- **shuffled**: the neurons of one block dealt out anew to modules of the same sizes, those of the other left as they are. The
  variance is known exactly, of two the larger counts; p is that of the normal.
- **rotated**: the stream turned at random between the two blocks. Neurons of a module write and read alike, and so couplings of
  whole modules scatter more than those of shuffled neurons, even between blocks that know nothing of each other.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.functional import adjust
from circuitlab.analysis.maps import Weight
from circuitlab.analysis.membership import Members, indicators, members
from circuitlab.analysis.neurons import _chosen
from circuitlab.analysis.results import Result
from circuitlab.circuit import Circuit, Tensor
from circuitlab.errors import InputError

Floats = NDArray[np.float64]
_SCALES = frozenset("mul mul_ multiply div div_ true_divide divide dropout".split())
ROWS = 2048
"""Neurons whose couplings with all of the next block are held at once."""


@dataclass(frozen=True, eq=False)
class Coupling(Result):
    """What the modules of two wires have to do with each other.

    Attributes:
        source, target: names of the wires, in the order of the run.
        kind: "weights" (mean |cos| of values and keys) or "lift" (of firing together).
        value: float64 (source modules, target modules).
        expected: what it would be without anything between just these two modules, float64 (source modules, target modules);
            where there are several kinds of controls, the largest mean of one.
        spread: standard deviation of `value` over controls, the largest of any kind, float64 (source modules, target modules).
        pvalue: of as much or more, float64 (source modules, target modules). adjusted: by Benjamini & Hochberg over all pairs.
        controls: number of controls that were drawn. seed: of these.
        source_sizes, target_sizes: int64, neurons of each module.
        folded: parameters of the norm that are folded into the keys, for weights.
    """

    source: str
    target: str
    kind: str
    value: Floats
    expected: Floats
    spread: Floats
    pvalue: Floats
    adjusted: Floats
    controls: int
    seed: int
    source_sizes: NDArray[np.int64]
    target_sizes: NDArray[np.int64]
    folded: tuple[str, ...] = ()

    @property
    def z(self) -> Floats:
        """Standard deviations above what is expected: float64 (source modules, target modules)."""
        return np.divide(self.value - self.expected, self.spread, out=np.zeros_like(self.value), where=self.spread > 0)

    def significant(self, level: float = 0.05) -> NDArray[np.bool_]:
        """Whether two modules have more to do with each other than by chance: bool (source modules, target modules)."""
        return self.adjusted <= level

    def to_frame(self) -> Any:
        """One row for each pair: source, source module, target, target module, value, expected, z, pvalue, adjusted."""
        import pandas as pd

        a, b = self.value.shape
        return pd.DataFrame({
            "source": self.source, "source module": np.repeat(np.arange(a), b), "target": self.target, "target module": np.tile(np.arange(b), a),
            self.kind: self.value.ravel(), "expected": self.expected.ravel(), "z": self.z.ravel(), "pvalue": self.pvalue.ravel(),
            "adjusted": self.adjusted.ravel(),
        })

    def plot(self) -> Any:
        """Standard deviations above what is expected, for all pairs, as a plotly Figure."""
        import importlib

        return importlib.import_module("circuitlab.plots").matrix(
            self.z, [f"{m}" for m in range(len(self.value))], [f"{m}" for m in range(self.value.shape[1])],
            title=f"{self.kind} of modules, standard deviations above chance", row_title=f"modules of {self.source}",
            column_title=f"modules of {self.target}", diverging=True,
        )

    def __repr__(self) -> str:
        a, b = self.value.shape
        return (f"Coupling({self.kind} of {a} modules of {self.source} and {b} of {self.target}: {int(self.significant().sum())} of "
                f"{a * b} pairs above chance, adjusted p ≤ 0.05, {self.controls} controls)")


def coupling(
    circuit: Circuit,
    model: torch.nn.Module,
    partitions: Mapping[Any, Any],
    *,
    controls: int = 49,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Coupling, ...]:
    """Couple the modules of feed-forward blocks by their weights, each block with the next of those given.

    Args:
        circuit: of the model, which tells what reads the stream that a block writes to.
        model: whose weights are taken; it is not run.
        partitions: wire or its name -> `Partition`, or one module number for each neuron.
        controls: number of rotations of the stream.
        seed: of these.
        device: where couplings are computed. A pair of blocks costs (controls + 1) · neurons · neurons · width multiplications.
        progress: show a progress bar.

    Returns:
        one `Coupling` for each pair of successive blocks where the second reads what the first writes. Pairs where it does not
        are left out with a warning.

    Raises:
        InputError: fewer than two wires, a wire that is no feed-forward block's, a partition of another wire, or no pair that
            shares a stream.
    """
    chosen = chain(circuit, partitions)
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found: list[Coupling] = []
    apart: list[str] = []
    for (a, labels_a), (b, labels_b) in pairwise(chosen):
        why = _apart(circuit, a, b)
        if why:
            apart.append(why)
            continue
        value, key, folded = _vectors(circuit, named, a, b)
        found.append(_coupled((a.wire, value, labels_a), (b.wire, key, labels_b), folded, controls, seed, torch.device(device), progress))
    if not found:
        raise InputError("none of these wires writes to a stream that the next reads: " + "; ".join(apart))
    for why in apart:
        warnings.warn(f"left out: {why}")
    return tuple(found)


def chain(circuit: Circuit, partitions: Mapping[Any, Any]) -> list[tuple[FeedForward, Members]]:
    """Blocks in the order of the run, with the module of each neuron.

    Raises:
        InputError: fewer than two wires, a wire that is no feed-forward block's, or a partition of another wire.
    """
    if not isinstance(partitions, Mapping) or len(partitions) < 2:
        raise InputError("partitions must be {wire name: partition} of at least two wires")
    chosen: list[tuple[FeedForward, Members]] = []
    for wire, partition in partitions.items():
        (block,) = _chosen(circuit, [wire]).values()
        chosen.append((block, members(partition, size=block.size, wire=block.wire)))
    if len({block.wire for block, _ in chosen}) < len(chosen):
        raise InputError(f"partitions names a wire twice: {', '.join(block.wire for block, _ in chosen)}")
    return sorted(chosen, key=lambda item: item[0].values[0].order)


# the stream -------------------------------------------------------------------------------------------


def _stream(circuit: Circuit, weight: Weight) -> tuple[tuple[str, ...], ...]:
    """Wires of a map's other dimensions."""
    dims = circuit.tensor(weight.parameter).dims
    return tuple(wires for dim, wires in enumerate(dims) if dim != weight.dim and wires)


def _apart(circuit: Circuit, a: FeedForward, b: FeedForward) -> str:
    """Why nothing that one block writes is read by another as it is, "" if it is."""
    written, read = _stream(circuit, a.values[0]), _stream(circuit, b.first[0])
    if written != read or not written:
        tell = " × ".join(".".join(wires) for wires in written), " × ".join(".".join(wires) for wires in read)
        return f"{a.wire} writes to {tell[0] or 'a single number'}, and {b.wire} reads {tell[1] or 'a single number'}"
    wires = {wire for dim in written for wire in dim}
    reader = circuit.op(b.first[0].op)
    goal, seen = reader.inputs[b.first[0].operand], set[str]()
    waiting = list(circuit.op(a.values[0].op).outputs)
    while waiting:
        name = waiting.pop()
        if name == goal:
            return ""
        if name in seen:
            continue
        seen.add(name)
        for user in circuit.consumers.get(name, ()):
            op = circuit.op(user)
            along = [axis for axis in op.axes if axis.wire in wires]
            if along and op.kind not in ("linear", "conv", "contract", "opaque") and all(x.passes or x.role == "normalised" for x in along):
                waiting += op.outputs
    return f"what {a.wire} writes reaches {b.wire} only through other maps"


def _vectors(
    circuit: Circuit, named: Mapping[str, torch.Tensor], a: FeedForward, b: FeedForward
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Values of one block and keys of the next (neurons, width), with the norm between folded in, and its parameters."""
    for block, weight in ((a, a.values[0]), (b, b.first[0])):
        tensor = named.get(weight.parameter)
        if tensor is None or tuple(tensor.shape) != circuit.tensor(weight.parameter).shape:
            raise InputError(f"this model has no {weight.parameter} of shape {circuit.tensor(weight.parameter).shape}, of {block.wire}; "
                             "the circuit was traced from another")
    value = a.values[0].of(named[a.values[0].parameter].detach()).double()
    key = b.first[0].of(named[b.first[0].parameter].detach()).double()
    gains, centred = _norm(circuit, b)
    for gain in gains:
        key = key * named[gain].detach().double().flatten().to(key.device)
    if centred:
        key, value = key - key.mean(1, keepdim=True), value - value.mean(1, keepdim=True)
    return value, key, tuple(gains)


def _norm(circuit: Circuit, block: FeedForward) -> tuple[list[str], bool]:
    """Parameters that scale what a block reads, back to the first norm; and whether that takes the mean out."""
    stream = _stream(circuit, block.first[0])
    gains: list[str] = []
    tensor = circuit.tensor(circuit.op(block.first[0].op).inputs[block.first[0].operand])
    while tensor.op:
        op = circuit.op(tensor.op)
        inputs = [circuit.tensor(name) for name in op.inputs]
        carriers = [t for t in inputs if t.kind == "value" and all(wires in t.dims for wires in stream)]
        if op.kind == "norm" and any(x.role == "normalised" and (x.wire,) in stream for x in op.axes):
            found = re.search(r"weight=\$(\d+)", op.call)
            gain = inputs[int(found[1])] if found else None
            return [*gains, *([gain.name] if gain and gain.kind == "parameter" else [])], op.fn == "layer_norm"
        if len(carriers) != 1 or not (op.kind == "reindex" or op.fn in _SCALES):
            return gains, False
        gains += [t.name for t in inputs if t.kind == "parameter" and _is_scale(t, stream) and op.fn.startswith("mul")]
        tensor = carriers[0]
    return gains, False


def _is_scale(tensor: Tensor, stream: tuple[tuple[str, ...], ...]) -> bool:
    return tuple(wires for wires in tensor.dims if wires) == stream


# numbers ----------------------------------------------------------------------------------------------


def _coupled(
    source: tuple[str, torch.Tensor, Members], target: tuple[str, torch.Tensor, Members], folded: tuple[str, ...], controls: int,
    seed: int, device: torch.device, progress: bool,
) -> Coupling:
    from scipy import special
    from tqdm.auto import tqdm

    (name, value, labels_a), (other, key, labels_b) = source, target
    sums = _Sums(_unit(key).float().to(device), labels_a, labels_b, device)
    plain = _unit(value).float()
    mean, beyond, shuffled = sums(plain.to(device))
    rng = np.random.default_rng(seed)
    turns = tqdm(range(controls), desc=f"coupling {name}", disable=not progress, delay=1, leave=False)
    drawn = np.stack([sums(torch.from_numpy(turned(plain.cpu().numpy(), rng)).to(device))[1] for _ in turns])
    z = np.divide(beyond, shuffled, out=np.full(beyond.shape, -np.inf), where=shuffled > 1e-12)
    p = np.maximum(special.ndtr(-z), pooled(beyond, drawn))
    spread = np.maximum(shuffled, drawn.std(0, ddof=1))
    sizes = np.bincount(labels_a), np.bincount(labels_b)
    return Coupling(name, other, "weights", mean, mean - beyond, spread, p, adjust(p), controls, seed, *sizes, folded)


class _Sums:
    """Mean |cos| between modules."""

    def __init__(self, keys: torch.Tensor, a: Members, b: Members, device: torch.device) -> None:
        self.keys, self.plain_b = keys, indicators(b)
        self.a, self.b = (torch.from_numpy(indicators(labels)).float().to(device) for labels in (a, b))
        self.size_a, self.size_b = (np.maximum(np.bincount(labels), 1).astype(np.float64) for labels in (a, b))
        self.share_a, self.share_b = np.bincount(a) / len(a), np.bincount(b) / len(b)

    def __call__(self, values: torch.Tensor) -> tuple[Floats, Floats, Floats]:
        """Means, what they are beyond those of their modules, and the standard deviation of that over shuffled neurons."""
        from_module = torch.zeros(self.a.shape[1], len(self.keys), device=values.device)
        to_module: list[torch.Tensor] = []
        for at in range(0, len(values), ROWS):
            part = (values[at : at + ROWS] @ self.keys.T).abs_()
            from_module += self.a[at : at + ROWS].T @ part
            to_module.append(part @ self.b)
        left = from_module.double().cpu().numpy() / self.size_a[:, None]  # (source modules, target neurons)
        right = torch.cat(to_module).double().cpu().numpy() / self.size_b  # (source neurons, target modules)
        mean = left @ self.plain_b / self.size_b
        row, column = right @ self.share_b, self.share_a @ left
        left = left - column - (left.mean(1) - column.mean())[:, None]
        right = right - row[:, None] - (right.mean(0) - row.mean())
        beyond = left @ self.plain_b / self.size_b
        spread = np.maximum((right**2).sum(0) * _drawn(self.size_a, len(right))[:, None],
                            (left**2).sum(1)[:, None] * _drawn(self.size_b, left.shape[1]))
        spread[self.share_a == 0] = spread[:, self.share_b == 0] = 0
        return mean, beyond, np.sqrt(spread)


def _drawn(size: Floats, n: int) -> Floats:
    """Variance of the mean of a random set, as a share of the sum of squares of what it is drawn from (its mean is 0)."""
    return (n - size) / (size * max(n * (n - 1), 1))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > 0, rows / length.clamp(min=1e-30), 0.0)


def turned(rows: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows after a random orthogonal map: random signs and cosine transforms in turn, as good as a dense one and quicker."""
    from scipy import fft

    for _ in range(3):
        signs = rng.choice(np.array([-1, 1], dtype=np.float32), rows.shape[1])
        rows = np.asarray(fft.dct((rows * signs)[:, rng.permutation(rows.shape[1])], norm="ortho"), dtype=np.float32)
    return rows


def pooled(observed: Floats, drawn: Floats) -> Floats:
    """p-values of observed values among controls (draws, ...): each is standardised by its own controls, and ranked among all.

    Controls are standardised each by the others, so that they and what is observed are on the same footing. A value whose
    controls do not vary, or that is no number, has p = 1.
    """
    n = len(drawn)
    if n < 3:
        raise InputError(f"controls={n} must be at least 3")
    mean, spread = drawn.mean(0), drawn.std(0, ddof=1)
    good = np.isfinite(observed) & np.isfinite(spread) & (spread > 1e-12 * np.maximum(1e-12, np.abs(mean)))
    if not good.any():
        return np.ones(observed.shape)
    observed, drawn, mean, spread = observed[good], drawn[:, good], mean[good], spread[good]
    gap = drawn - mean
    others = np.sqrt(np.maximum((n - 1) * spread**2 - gap**2 * n / (n - 1), 1e-30) / (n - 2))
    null = np.sort((gap * n / (n - 1) / (others * np.sqrt(1 + 1 / (n - 1)))).ravel())
    z = (observed - mean) / (spread * np.sqrt(1 + 1 / n))
    found = np.ones(good.shape)
    found[good] = (1 + len(null) - np.searchsorted(null, z, side="left")) / (1 + len(null))
    return found
