"""Functional neurons: neurons whose activation tells that a position has a label, and the modules that they gather in.

A neuron is taken as a detector of a label. How good it is, is the average precision (AP) of its activation over positions:
the area under precision against recall. By chance it is the label's share of positions. (Zhang et al., *Emergent Modularity
in Pre-trained Transformers*, 2023; Xiao et al., *Configurable Foundation Models*, 2024.)

AP comes from the histograms that `observe` counts: values that share a bin (a quarter of an octave of the value, 19 %, or of its
distance to 1, where tanh and sigmoid saturate) are tied, and ties count as in scikit-learn's ``average_precision_score``. Only
positions with a label count.

Some neurons are always the best of all, whatever the labels. So each AP comes with a p-value, of the rank sum (Mann &
Whitney) of the neuron's activations at the label's positions. It takes positions for independent, which those of one text or
image are not; where one label holds for many positions, give ``null``: statistics with the labels dealt out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from circuitlab.analysis.membership import indicators, members
from circuitlab.analysis.results import Result
from circuitlab.errors import InputError

if TYPE_CHECKING:
    from circuitlab.analysis.neurons import NeuronStats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Functional(Result):
    """How well each neuron of a wire detects each label.

    Attributes:
        wire: name of the hidden wire.
        label_names: names of the labels. label_n: int64 (labels,), positions of each.
        precision: average precision, float64 (labels, neurons).
        pvalue: of an activation that is larger where the label is, float64 (labels, neurons).
        adjusted: the same, adjusted for the number of labels and neurons (Benjamini & Hochberg), float64 (labels, neurons).
        live: bool (neurons,), whether a neuron ever fires.
        by: what detects: "value" (h) or "magnitude" (|h|).
        share: share of the wire's neurons that make up a label's set. level: a set takes neurons of adjusted p up to this.
        null: number of draws of shuffled labels behind the p-values, 0 if they are those of independent positions.
    """

    wire: str
    label_names: tuple[str, ...]
    label_n: Ints
    precision: Floats
    pvalue: Floats
    adjusted: Floats
    live: NDArray[np.bool_]
    by: str
    share: float
    level: float
    null: int = 0

    @property
    def chance(self) -> Floats:
        """AP of a neuron that knows nothing of the label, which is the label's share of positions: float64 (labels,)."""
        return self.label_n / self.label_n.sum()

    @property
    def sets(self) -> dict[str, Ints]:
        """Label -> its functional neurons, best first: the best `share` of all neurons, as far as they are significant."""
        return {
            name: np.array([j for j in self.top(name, max(1, round(self.share * len(self.live)))) if self.adjusted[row, j] <= self.level], dtype=np.int64)
            for row, name in enumerate(self.label_names)
        }

    def top(self, label: Any, count: int = 10) -> Ints:
        """The neurons of highest AP for a label, best first, significant or not; dead neurons never.

        Raises:
            InputError: an unknown label.
        """
        row = self._row(label)
        order = np.lexsort((np.arange(len(self.live)), -np.nan_to_num(self.precision[row], nan=-1.0)))
        return order[self.live[order]][:count]

    def overlaps(self) -> Overlaps:
        """How much the labels' sets of neurons have in common."""
        hot = np.zeros((len(self.label_names), len(self.live)))
        for row, chosen in enumerate(self.sets.values()):
            hot[row, chosen] = 1
        return Overlaps(self.wire, self.label_names, (hot @ hot.T).astype(np.int64), int(self.live.sum()))

    def enrichment(self, partition: Any, *, level: float = 0.05) -> Enrichment:
        """Which modules hold more of a label's functional neurons than a random choice of neurons would.

        The hypergeometric test among the neurons that ever fire, for each label and module.

        Args:
            partition: a `Partition` of this wire, or a module number for each neuron.
            level: modules of adjusted p up to this specialise.

        Raises:
            InputError: a partition of another wire, or of another number of neurons.
        """
        from scipy import stats

        labels = members(partition, size=len(self.live), wire=self.wire)
        inside = indicators(labels) * self.live[:, None]
        overlap = np.stack([inside[chosen].sum(0) for chosen in self.sets.values()]).astype(np.int64)
        chosen, module = overlap.sum(1), inside.sum(0).astype(np.int64)
        p = stats.hypergeom.sf(overlap - 1, int(self.live.sum()), module[None, :], chosen[:, None])
        return Enrichment(self.wire, self.label_names, overlap, chosen, module, p, adjust(p), level)

    def to_frame(self) -> Any:
        """One row for each label and neuron: label, neuron, precision, chance, lift, pvalue, adjusted, functional."""
        import pandas as pd

        labels, neurons = self.precision.shape
        chosen = np.zeros((labels, neurons), dtype=bool)
        for row, best in enumerate(self.sets.values()):
            chosen[row, best] = True
        chance = np.repeat(self.chance, neurons)
        return pd.DataFrame({
            "label": np.repeat(np.array(self.label_names, dtype=object), neurons), "neuron": np.tile(np.arange(neurons), labels),
            "precision": self.precision.ravel(), "chance": chance, "lift": self.precision.ravel() / np.where(chance > 0, chance, np.nan),
            "pvalue": self.pvalue.ravel(), "adjusted": self.adjusted.ravel(), "functional": chosen.ravel(),
        })

    def plot(self, count: int = 10) -> Any:
        """AP of each label's best neurons for all labels, as a plotly Figure."""
        import importlib

        best = np.concatenate([self.top(name, count) for name in self.label_names])
        return importlib.import_module("circuitlab.plots").matrix(
            self.precision[:, best], self.label_names, [f"{at // count + 1}.{at % count + 1} {j}" for at, j in enumerate(best)],
            title=f"{self.wire}: average precision of the {count} best neurons of each label", row_title="label", column_title="neuron",
        )

    def _row(self, label: Any) -> int:
        if str(label) not in self.label_names:
            raise InputError(f"{label!r} is no label of {self.wire}; its labels are {', '.join(self.label_names)}")
        return self.label_names.index(str(label))

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {len(chosen)}" for name, chosen in self.sets.items())
        return (f"Functional({self.wire}: of {int(self.live.sum())} neurons that fire, the best {self.share:.1%} by average precision "
                f"and significant (adjusted p ≤ {self.level:g}) are {counts})")


@dataclass(frozen=True, eq=False)
class Overlaps(Result):
    """How many functional neurons labels have in common.

    Attributes:
        wire: name of the hidden wire. label_names: names of the labels.
        shared: int64 (labels, labels), neurons in both sets; the diagonal is the sets' sizes.
        population: number of neurons that the sets are chosen from.
    """

    wire: str
    label_names: tuple[str, ...]
    shared: Ints
    population: int

    @property
    def jaccard(self) -> Floats:
        """Neurons in both sets as a share of those in either, NaN for two empty sets: float64 (labels, labels)."""
        sizes = np.diagonal(self.shared)
        either = sizes[:, None] + sizes - self.shared
        return np.divide(self.shared, either, out=np.full(self.shared.shape, np.nan), where=either > 0)

    @property
    def expected(self) -> Floats:
        """Neurons that random sets of these sizes share, on average: float64 (labels, labels)."""
        sizes = np.diagonal(self.shared)
        return sizes[:, None] * sizes / max(self.population, 1)

    def to_frame(self) -> Any:
        """One row for each pair of labels: label, other, size, other size, shared, expected, jaccard, pvalue (of as many or more)."""
        import pandas as pd
        from scipy import stats

        rows = [
            {"label": self.label_names[a], "other": self.label_names[b], "size": self.shared[a, a], "other size": self.shared[b, b],
             "shared": self.shared[a, b], "expected": self.expected[a, b], "jaccard": self.jaccard[a, b],
             "pvalue": float(stats.hypergeom.sf(self.shared[a, b] - 1, self.population, self.shared[a, a], self.shared[b, b]))}
            for a in range(len(self.label_names)) for b in range(a + 1, len(self.label_names))
        ]
        return pd.DataFrame(rows, columns=["label", "other", "size", "other size", "shared", "expected", "jaccard", "pvalue"])

    def plot(self) -> Any:
        """Jaccard of all pairs as a plotly Figure."""
        import importlib

        return importlib.import_module("circuitlab.plots").matrix(
            self.jaccard, self.label_names, self.label_names, title=f"{self.wire}: functional neurons in common (Jaccard)", row_title="label", column_title="label",
        )


@dataclass(frozen=True, eq=False)
class Enrichment(Result):
    """Which modules specialise in which labels.

    Attributes:
        wire: name of the hidden wire. label_names: names of the labels.
        overlap: int64 (labels, modules), functional neurons of a label in a module.
        chosen: int64 (labels,), functional neurons of each label. module: int64 (modules,), neurons of each that ever fire.
        pvalue: hypergeometric, of as many or more, float64 (labels, modules). adjusted: by Benjamini & Hochberg over all.
        level: modules of adjusted p up to this specialise.
    """

    wire: str
    label_names: tuple[str, ...]
    overlap: Ints
    chosen: Ints
    module: Ints
    pvalue: Floats
    adjusted: Floats
    level: float

    @property
    def expected(self) -> Floats:
        """What random choices of neurons would have in a module, on average: float64 (labels, modules)."""
        return self.chosen[:, None] * self.module / max(int(self.module.sum()), 1)

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Whether a module specialises in a label: bool (labels, modules)."""
        return self.adjusted <= self.level

    @property
    def specialists(self) -> dict[str, Ints]:
        """Label -> modules that specialise in it, most significant first."""
        return {
            name: np.array([m for m in np.argsort(self.adjusted[row], kind="stable") if self.significant[row, m]], dtype=np.int64)
            for row, name in enumerate(self.label_names)
        }

    def to_frame(self) -> Any:
        """One row for each label and module: label, module, size, overlap, expected, fold, pvalue, adjusted, significant."""
        import pandas as pd

        labels, modules = self.overlap.shape
        expected = self.expected.ravel()
        return pd.DataFrame({
            "label": np.repeat(np.array(self.label_names, dtype=object), modules), "module": np.tile(np.arange(modules), labels),
            "size": np.tile(self.module, labels), "overlap": self.overlap.ravel(), "expected": expected,
            "fold": np.divide(self.overlap.ravel(), expected, out=np.full(len(expected), np.nan), where=expected > 0),
            "pvalue": self.pvalue.ravel(), "adjusted": self.adjusted.ravel(), "significant": self.significant.ravel(),
        })

    def plot(self) -> Any:
        """Functional neurons in each module, as multiples of what is expected, as a plotly Figure."""
        import importlib

        fold = np.divide(self.overlap, self.expected, out=np.full(self.overlap.shape, np.nan), where=self.expected > 0)
        return importlib.import_module("circuitlab.plots").matrix(
            fold, self.label_names, [f"{m}" for m in range(len(self.module))], title=f"{self.wire}: functional neurons in modules, against chance",
            row_title="label", column_title="module",
        )

    def __repr__(self) -> str:
        told = ", ".join(f"{name}: {', '.join(map(str, found)) or 'none'}" for name, found in self.specialists.items())
        return f"Enrichment({self.wire}: modules that specialise (adjusted p ≤ {self.level:g}) in {told})"


def functional(
    stats: NeuronStats,
    *,
    by: str | None = None,
    share: float = 0.01,
    level: float = 0.05,
    null: NeuronStats | Sequence[NeuronStats] = (),
) -> Functional:
    """How well each neuron of a wire detects each label.

    Args:
        stats: what `observe` gave for the wire, with labels.
        by: "value": a neuron detects by h; "magnitude": by |h|. By default the magnitude for gated blocks, whose values go
            both ways, and the value for others.
        share: share of the wire's neurons that make up a label's set.
        level: a set takes neurons of adjusted p up to this.
        null: statistics of the same wire with labels in another order, as many as you like:
            ``observe(model, batches, wires, labels=labels[torch.randperm(len(labels))])``. p-values then are ranks among
            all neurons of these, which holds however alike the positions of an example are.

    Raises:
        InputError: statistics without labels or with one only, or null of another wire or other labels.
    """
    by = by or ("magnitude" if stats.ffn.gated else "value")
    if by not in ("value", "magnitude"):
        raise InputError(f"by={by!r} is not known; give 'value' (h) or 'magnitude' (|h|)")
    if not 0 < share <= 1 or not 0 < level < 1:
        raise InputError(f"share={share} must be above 0 and at most 1, and level={level} between 0 and 1")
    counts = _histogram(stats, by)
    draws = [null] if hasattr(null, "histogram") else list(null)  # pyright: ignore[reportArgumentType]
    totals, live = counts.sum(0), stats.firing.numpy() > 0
    precision = np.stack([average_precision(row, totals) for row in counts])
    z = np.stack([_rank_sum(row, totals) for row in counts])
    z[:, ~live] = -np.inf
    p = _tail(z, draws, stats, by)
    adjusted = np.ones_like(p)
    adjusted[:, live] = adjust(p[:, live])
    names, n = stats.label_names, counts[:, 0].sum(1)
    return Functional(stats.wire, names, n, precision, p, adjusted, live, by, share, level, len(draws))


def average_precision(positive: Ints, total: Ints) -> Floats:
    """Average precision from counts in bins of rising activation: (..., bins) -> (...), NaN where nothing is positive."""
    hits: Floats = np.cumsum(positive[..., ::-1], -1, dtype=np.float64)
    seen: Floats = np.cumsum(total[..., ::-1], -1, dtype=np.float64)
    area = (positive[..., ::-1] * np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)).sum(-1)
    found = positive.sum(-1)
    return np.divide(area, found, out=np.full(area.shape, np.nan), where=found > 0)


def adjust(pvalues: Floats) -> Floats:
    """p-values adjusted for their number by Benjamini & Hochberg (1995), in the same shape."""
    from scipy import stats

    return stats.false_discovery_control(pvalues.ravel()).reshape(pvalues.shape) if pvalues.size else pvalues


def _histogram(stats: NeuronStats, by: str) -> Ints:
    """Counts (labels, neurons, bins) in bins of rising activation."""
    if stats.histogram is None or not stats.label_names:
        raise InputError(f"these statistics of {stats.wire} know no labels: give them to observe(model, batches, wires, labels=...)")
    if len(stats.label_names) < 2:
        raise InputError(f"{stats.wire} was observed with the label {', '.join(stats.label_names)!r} alone, so nothing can be told from it; "
                         "give a label to the other positions as well")
    counts = stats.histogram.numpy().astype(np.int64)
    if by == "value":
        return counts
    middle = counts.shape[2] // 2
    folded = counts[..., middle:].copy()
    folded[..., 1:] += counts[..., :middle][..., ::-1]
    return folded


def _rank_sum(positive: Ints, total: Ints) -> Floats:
    """Standardised rank sum of a label's positions, ties at their mean rank: (neurons, bins) -> (neurons,)."""
    tied = total.astype(np.float64)
    n, inside = tied.sum(1), positive.astype(np.float64).sum(1)
    ranks = np.cumsum(tied, 1) - (tied - 1) / 2
    spread = inside * (n - inside) / 12 * ((n + 1) - (tied**3 - tied).sum(1) / np.maximum(n * (n - 1), 1))
    excess = (positive * ranks).sum(1) - inside * (n + 1) / 2
    return np.divide(excess, np.sqrt(np.maximum(spread, 0)), out=np.zeros_like(excess), where=spread > 1e-9 * n)


def _tail(z: Floats, draws: list[Any], stats: NeuronStats, by: str) -> Floats:
    """p-values of standardised rank sums: of independent positions, or among those of draws."""
    if not draws:
        from scipy import special

        return special.ndtr(-z)
    for draw in draws:
        if draw.wire != stats.wire or draw.n != stats.n or draw.label_names != stats.label_names:
            raise InputError(f"null must be statistics of {stats.wire} over the same positions with the same labels in another order; "
                             f"this is of {draw.wire}, with labels {', '.join(draw.label_names) or 'none'}, over {draw.n} positions")
    live, found = np.isfinite(z[0]), np.empty_like(z)
    counted = [_histogram(draw, by) for draw in draws]
    for row in range(len(z)):
        drawn = np.sort(np.concatenate([_rank_sum(counts[row], counts.sum(0))[live] for counts in counted]))
        found[row] = (1 + len(drawn) - np.searchsorted(drawn, z[row], side="left")) / (1 + len(drawn))
    return found
