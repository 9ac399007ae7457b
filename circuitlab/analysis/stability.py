"""Neurons and modules over training: what the same wire does at successive checkpoints, and from when on that stays.

Neurons keep their numbers through training, so checkpoints can be compared neuron by neuron: scores by their rank
correlation (Spearman), partitions by the adjusted Rand index (Hubert & Arabie, 1985) and normalised mutual information.
Each similarity comes with what neurons in random order reach: even random partitions into many small modules have a high
mutual information.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis.membership import Members, members
from circuitlab.analysis.results import Result
from circuitlab.errors import InputError

if TYPE_CHECKING:
    from circuitlab.analysis.neurons import NeuronStats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Step = int | float | str


@dataclass(frozen=True, eq=False)
class Stability(Result):
    """How alike a wire's neurons or modules are at different checkpoints.

    Attributes:
        wire: name of the hidden wire, "" if not known.
        steps: of the checkpoints, in order.
        similarity: measure -> float64 (steps, steps). "spearman" of scores; "ari" and "nmi" of partitions.
        chance: measure -> what 95 % of random orders of the neurons stay below, for checkpoints side by side.
        labels: module of each neuron at each step, int64 (neurons,) each; () if scores were compared.
        score: name of the scores that were compared, "" for partitions.
    """

    wire: str
    steps: tuple[Step, ...]
    similarity: dict[str, Floats]
    chance: dict[str, float]
    labels: tuple[Ints, ...] = ()
    score: str = ""

    @property
    def flows(self) -> tuple[Ints, ...]:
        """Neurons that go from each module to each of the next step's: int64 (modules, modules) for each pair of steps."""
        return tuple(_flow(a, b) for a, b in pairwise(self.labels))

    @property
    def tracks(self) -> tuple[Ints, ...]:
        """Number of the track of each module at each step, int64 (modules,) each.

        A module goes on as the one of the next step that shares most neurons with it, one to one (the assignment with most
        neurons in all); one that shares none with what is left ends, and one without a past starts a track.
        """
        from scipy.optimize import linear_sum_assignment

        if not self.labels:
            return ()
        found = [np.arange(int(self.labels[0].max()) + 1)]
        fresh = len(found[0])
        for flow in self.flows:
            now = np.full(flow.shape[1], -1, dtype=np.int64)
            for a, b in zip(*linear_sum_assignment(flow, maximize=True), strict=True):
                if flow[a, b]:
                    now[b] = found[-1][a]
            new = np.flatnonzero(now < 0)
            now[new] = fresh + np.arange(len(new))
            fresh += len(new)
            found.append(now)
        return tuple(found)

    def stable_from(self, level: float = 0.8, measure: str | None = None) -> Step | None:
        """The first step from which on all are at least this similar to the last one; None if only the last is.

        Args:
            level: least similarity.
            measure: one of `similarity`, by default its first.

        Raises:
            InputError: an unknown measure.
        """
        below = np.flatnonzero(~(self.similarity[self._measure(measure)][:, -1] >= level))  # NaN is not similar
        first = int(below[-1]) + 1 if len(below) else 0
        return self.steps[first] if first < len(self.steps) - 1 else None

    def to_frame(self) -> Any:
        """One row for each step: step, then for each measure the similarity to the next and to the last step, and chance."""
        import pandas as pd

        rows = []
        for at, step in enumerate(self.steps):
            row: dict[str, Any] = {"step": step}
            for measure, values in self.similarity.items():
                row[f"{measure} to next"] = values[at, at + 1] if at + 1 < len(self.steps) else np.nan
                row[f"{measure} to last"] = values[at, -1]
                row[f"{measure} by chance"] = self.chance[measure]
            rows.append(row)
        return pd.DataFrame(rows)

    def flows_frame(self) -> Any:
        """One row for each flow that is not empty: step, module, track, next step, next module, next track, neurons, expected."""
        import pandas as pd

        rows, tracks = [], self.tracks
        for at, flow in enumerate(self.flows):
            expected = flow.sum(1)[:, None] * flow.sum(0) / flow.sum()
            rows += [
                {"step": self.steps[at], "module": a, "track": tracks[at][a], "next step": self.steps[at + 1], "next module": b,
                 "next track": tracks[at + 1][b], "neurons": flow[a, b], "expected": expected[a, b]}
                for a, b in np.argwhere(flow)
            ]
        return pd.DataFrame(rows, columns=["step", "module", "track", "next step", "next module", "next track", "neurons", "expected"])

    def plot(self, measure: str | None = None) -> Any:
        """A measure for all pairs of steps as a plotly Figure; without one, flows between modules where these were compared.

        Raises:
            InputError: an unknown measure.
        """
        import importlib

        plots, names = importlib.import_module("circuitlab.plots"), [f"step {step}" for step in self.steps]
        if measure is None and self.labels:
            return plots.flows(self.flows, names, numbers=self.tracks, title=f"{self.wire}: modules over training")
        measure = self._measure(measure)
        return plots.matrix(self.similarity[measure], names, names, title=f"{self.wire}: {measure} of {self.score or 'modules'}",
                            row_title="", column_title="")

    def _measure(self, measure: str | None) -> str:
        measure = measure or next(iter(self.similarity))
        if measure not in self.similarity:
            raise InputError(f"measure={measure!r} is not known here; give one of {', '.join(self.similarity)}")
        return measure

    def __repr__(self) -> str:
        told = []
        for measure, values in self.similarity.items():
            since = self.stable_from(0.8, measure)
            told.append(f"{measure} of first and last {values[0, -1]:.2f} (chance {self.chance[measure]:.2f}), "
                        + (f"at least 0.8 to the last from step {since} on" if since is not None else "not yet at 0.8 to the last"))
        return f"Stability({self.wire or 'a wire'} over {len(self.steps)} checkpoints, {self.steps[0]} to {self.steps[-1]}: {'; '.join(told)})"


def stability(
    checkpoints: Mapping[Step, Any] | Iterable[tuple[Step, Any]],
    *,
    score: str | Callable[[NeuronStats], Any] = "magnitude",
    shuffles: int = 99,
    seed: int = 0,
) -> Stability:
    """Compare the same wire at successive checkpoints.

    Args:
        checkpoints: step -> what is compared, in the order of training: `NeuronStats` or arrays of one number for each neuron,
            whose ranks are compared; or `Partition` or arrays of one module number (an integer) for each neuron.
        score: which numbers of `NeuronStats`: "magnitude", "frequency", "mean_abs" or any other of its attributes with one
            number for each neuron; or a function that gives them, such as
            ``lambda stats: functional(stats).precision[0]``.
        shuffles: number of random orders of neurons behind what is reached by chance.
        seed: of these.

    Raises:
        InputError: fewer than two checkpoints, steps out of order, or checkpoints of different wires or numbers of neurons.
    """
    pairs = list(cast("Mapping[Step, Any]", checkpoints).items()) if isinstance(checkpoints, Mapping) else _pairs(checkpoints)
    steps = tuple(step for step, _ in pairs)
    if len(steps) < 2:
        raise InputError(f"checkpoints holds {len(steps)}, and at least two are needed to be compared")
    numbers = [step for step in steps if not isinstance(step, str)]
    if len(set(steps)) < len(steps) or numbers != sorted(numbers):
        raise InputError(f"steps must rise, and are {', '.join(map(str, steps))}; give checkpoints in the order of training")
    wires = dict.fromkeys(str(item.wire) for _, item in pairs if getattr(item, "wire", ""))
    if len(wires) > 1:
        raise InputError(f"checkpoints are of different wires: {', '.join(wires)}; compare one wire at a time")
    wire, rng = next(iter(wires), ""), np.random.default_rng(seed)
    found = [_values(item, score) for _, item in pairs]
    sizes = {step: len(values) for step, values in zip(steps, found, strict=True)}
    if len(set(sizes.values())) > 1:
        raise InputError(f"checkpoints have different numbers of neurons: {', '.join(f'{step}: {n}' for step, n in sizes.items())}")
    modules = [values.dtype.kind in "iu" for values in found]
    if any(modules) != all(modules):
        raise InputError("checkpoints are partitions at some steps and scores at others; give the same at all")
    if all(modules):
        return _partitions(wire, steps, found, shuffles, rng)
    table, ranks = _spearman(found), _standard_ranks(found)
    drawn = [float(a[rng.permutation(len(a))] @ b / len(a)) for a, b in pairwise(ranks) for _ in range(shuffles)]
    name = score if isinstance(score, str) else getattr(score, "__name__", "score")
    return Stability(wire, steps, {"spearman": table}, {"spearman": _bound(drawn)}, (), name if hasattr(pairs[0][1], "firing") else "score")


def observe_checkpoints(
    model: torch.nn.Module,
    checkpoints: Mapping[Step, Any] | Iterable[tuple[Step, Any]],
    batches: Any,
    wires: Any = None,
    labels: Any = None,
    *,
    each: Callable[[NeuronStats], Any] | None = None,
    **options: Any,
) -> dict[str, dict[Step, Any]]:
    """Observe the same wires at each of several checkpoints of a model.

    Args:
        model: of the checkpoints' architecture. It keeps its own weights: checkpoints are loaded into a copy.
        checkpoints: step -> state dict, module, path of a file with a state dict (as ``torch.save`` writes; nothing in it is run), or
            a function that gives one; or pairs of these, read one at a time.
        batches, wires, labels, options: as `observe` takes them.
        each: what is kept of each `NeuronStats`, such as ``cl.partition``: counts of a wide wire take much memory. By default
            all is kept.

    Returns:
        wire name -> step -> `NeuronStats`, or what ``each`` gives; each wire's is what `stability` takes.

    Raises:
        InputError: a checkpoint that does not fit the model, or what `observe` refuses, with the step.
    """
    from circuitlab.analysis.neurons import observe
    from circuitlab.trace.guard import copy_model

    copied, _, _ = copy_model(model, (), convert=_unshared)
    found: dict[str, dict[Step, Any]] = {}
    pairs = cast("Mapping[Step, Any]", checkpoints).items() if isinstance(checkpoints, Mapping) else checkpoints
    for step, given in pairs:
        _load(copied, step, given)
        try:
            seen = observe(copied, batches, wires, labels, **options)
        except InputError as error:
            raise InputError(f"checkpoint {step}: {error}") from None
        for wire, stats in seen.items():
            found.setdefault(wire, {})[step] = stats if each is None else each(stats)
    if not found:
        raise InputError("checkpoints holds none")
    return found


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    made = tensor.detach().clone()
    return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made


def _load(model: torch.nn.Module, step: Step, given: Any) -> None:
    if isinstance(given, torch.nn.Module):
        given = given.state_dict()
    elif callable(given):
        given = given()
    if isinstance(given, (str, Path)):
        try:
            given = torch.load(given, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"checkpoint {step}: {given} could not be read by torch.load(..., weights_only=True): {error}") from None
    if not isinstance(given, Mapping) or not all(isinstance(value, torch.Tensor) or "_extra_state" in str(key) for key, value in given.items()):
        holds = f", which holds {', '.join(map(str, list(given)[:6]))}" if isinstance(given, Mapping) else ""
        raise InputError(f"checkpoint {step} is a {type(given).__name__}{holds}, and no state dict of tensors; give the part of it that is "
                         "the model's, as model.state_dict() gives it")
    try:
        model.load_state_dict(cast("Mapping[str, Any]", given))
    except RuntimeError as error:
        raise InputError(f"checkpoint {step} does not fit this {type(model).__name__}: {error}") from None


def _pairs(given: Any) -> list[tuple[Step, Any]]:
    found = list(given) if isinstance(given, Iterable) else None
    if found is None or not all(isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], (int, float, str)) for pair in found):
        raise InputError(f"checkpoints must be {{step: statistics or partition}} or pairs of (step, ...), and is a {type(given).__name__}")
    return [(step, item) for step, item in found]


def _values(item: Any, score: Any) -> NDArray[Any]:
    """One number for each neuron: integers for a partition."""
    if hasattr(item, "firing") and hasattr(item, "cofiring"):
        item = score(item) if callable(score) else getattr(item, score, None)
        if item is None:
            raise InputError(f"score={score!r} is no attribute of NeuronStats; give 'magnitude', 'frequency', 'mean_abs' or a function of it")
        item = item.double() if isinstance(item, torch.Tensor) else np.asarray(item, dtype=np.float64)
    if hasattr(item, "labels"):
        return members(item)
    values = item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else np.asarray(item)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or not len(values):
        raise InputError(f"a checkpoint must hold one number for each neuron; this is {type(item).__name__} of shape {values.shape}")
    return members(values) if values.dtype.kind in "iu" else values.astype(np.float64)


# similarity -------------------------------------------------------------------------------------------


def _standard_ranks(values: Sequence[Floats]) -> list[Floats]:
    """Ranks with mean 0 and variance 1, ties at their mean rank; NaN where all are equal or any is not finite."""
    from scipy import stats

    ranks: list[Floats] = []
    for row in values:
        rank = stats.rankdata(row)
        rank -= rank.mean()
        spread = rank.std()
        ranks.append(rank / spread if spread and np.isfinite(row).all() else np.full(len(row), np.nan))
    return ranks


def _spearman(values: Sequence[Floats]) -> Floats:
    ranks = np.stack(_standard_ranks(values))
    return ranks @ ranks.T / ranks.shape[1]


def _partitions(wire: str, steps: tuple[Step, ...], labels: list[Members], shuffles: int, rng: np.random.Generator) -> Stability:
    n = len(steps)
    tables = {"ari": np.eye(n), "nmi": np.eye(n)}
    for a in range(n):
        for b in range(a + 1, n):
            for measure, value in _similar(labels[a], labels[b]).items():
                tables[measure][a, b] = tables[measure][b, a] = value
    drawn = [_similar(a, rng.permutation(b)) for a, b in pairwise(labels) for _ in range(shuffles)]
    chance = {measure: _bound([values[measure] for values in drawn]) for measure in tables}
    return Stability(wire, steps, tables, chance, tuple(labels))


def _similar(a: Members, b: Members) -> dict[str, float]:
    """The adjusted Rand index, and mutual information over the mean of both entropies; 1 where neither tells neurons apart."""
    shared = _flow(a, b).astype(np.float64)
    n, rows, columns = shared.sum(), shared.sum(1), shared.sum(0)

    def pairs(counts: Floats) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    def entropy(counts: Floats) -> float:
        share = counts[counts > 0] / n
        return float(-(share * np.log(share)).sum())

    by_chance, most = pairs(rows) * pairs(columns) / max(n * (n - 1) / 2, 1), (pairs(rows) + pairs(columns)) / 2
    rand = (pairs(shared) - by_chance) / (most - by_chance) if most > by_chance else 1.0
    both = entropy(rows) + entropy(columns)
    return {"ari": rand, "nmi": 2 * max(both - entropy(shared), 0.0) / both if both else 1.0}


def _bound(drawn: Sequence[float]) -> float:
    return float(np.quantile(drawn, 0.95)) if len(drawn) else float("nan")


def _flow(a: Members, b: Members) -> Ints:
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    return np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns)
