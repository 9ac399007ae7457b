"""Partitions of a wire's neurons into modules, each with its score, its controls and a verdict."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitlab.analysis import affinity, balanced, communities, hierarchy, spectral
from circuitlab.analysis.communities import Labels, numbered
from circuitlab.analysis.features import features
from circuitlab.analysis.null import Cofiring, Evidence, Given, Keys, Networks, Weights, graph
from circuitlab.analysis.results import Result
from circuitlab.analysis.spectral import Bipartite
from circuitlab.errors import InputError
from circuitlab.trace.guard import random_state

METHODS = ("coactivation", "keys", "hierarchy", "spectral", "interaction", "random")
LEVEL = 0.05
"""A score is significant where p is not above this."""
_TESTED = 4096
_DELAY = 1


@dataclass(frozen=True, eq=False, repr=False)
class Partition(Result):
    """Neurons of one wire in modules.

    Attributes:
        labels: (n,) int64, the module of each neuron: 0 is the largest; equal sizes go by their smallest member.
        k: number of modules.
        method: one of `METHODS`.
        seed: that it was made with.
        score: how modular the partition is, in units of `score_name`.
        score_name: "modularity Q", "variance explained" (both 0 to 1, more is better) or "n-cut / (k - 1)" (less is better).
        null: scores of the controls, of the kind that was hardest to beat; empty with controls=0.
        tested: the score that stands against `null`: `score` itself, or that of the positions whose inputs are known (co-firing),
            and of a sample of 4,096 neurons where there are more.
        control: what the controls are: "random keys on the same inputs", "rotated" ... (see `circuitlab.analysis.null`).
        pvalue: (r + 1) / (len(null) + 1), where r controls score as well or better; nan without controls.
        wire: name of the wire, "" for a bare affinity.
        ffn: the feed-forward block it belongs to, or None.
        silent: indices of neurons that nothing is known about: they never fire, always fire or have no affinity.
        dendrogram: hierarchy only: scipy linkage (k-1, 4) over the modules.
        levels: hierarchy only: the numbers of groups at which the dendrogram has a level, rising; () if not significant.
    """

    labels: Labels
    k: int
    method: str
    seed: int
    score: float
    score_name: str
    null: NDArray[np.float64]
    tested: float
    control: str
    pvalue: float
    wire: str = ""
    ffn: Any = None
    silent: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    dendrogram: NDArray[np.float64] | None = None
    levels: tuple[int, ...] = ()

    @property
    def significant(self) -> bool:
        """Whether the controls score this well in at most one case of twenty."""
        return bool(self.pvalue <= LEVEL)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Neurons in each module, (k,)."""
        return np.bincount(self.labels, minlength=self.k)

    @property
    def modules(self) -> list[NDArray[np.int64]]:
        """The neurons of each module, rising."""
        return [np.flatnonzero(self.labels == module) for module in range(self.k)]

    @property
    def verdict(self) -> str:
        """Whether to believe the modules, in words."""
        if not len(self.null):
            return "not tested against controls"
        word = "significant" if self.significant else "not significant"
        return f"{word} (p = {self.pvalue:.3g} against {len(self.null)} controls, {self.control}: {self.null.mean():.3f} ± {self.null.std():.3f})"

    def cut(self, k: int) -> Labels:
        """The group of each neuron (n,) with the dendrogram cut at k groups; they are numbered like modules.

        Raises:
            InputError: no dendrogram, or k out of range.
        """
        if self.dendrogram is None:
            raise InputError(f"a partition by {self.method!r} has no dendrogram to cut; use method=\"hierarchy\"")
        return numbered(hierarchy.cut(self.dendrogram, k)[self.labels])

    def to_frame(self) -> Any:
        """One row for each neuron as a pandas DataFrame: wire, neuron, module, size (of the module), silent."""
        import pandas as pd

        neurons = np.arange(len(self.labels))
        return pd.DataFrame({
            "wire": self.wire, "neuron": neurons, "module": self.labels, "size": self.sizes[self.labels],
            "silent": np.isin(neurons, self.silent),
        })

    def plot(self, affinity: Any = None, **options: Any) -> Any:
        """The modules, or an affinity matrix sorted by them, as a plotly Figure. See `circuitlab.plots.partition`."""
        return importlib.import_module("circuitlab.plots").partition(self, affinity, **options)

    def __repr__(self) -> str:
        sizes = self.sizes
        span = f"of {sizes[0]}" if sizes[0] == sizes[-1] else f"of {sizes[-1]} to {sizes[0]}"
        name = f" of {self.wire}" if self.wire else ""
        more = f"; levels at {', '.join(map(str, self.levels))} groups" if self.levels else ""
        quiet = f"; {len(self.silent)} silent" if len(self.silent) else ""
        return (
            f"Partition{name}: {len(self.labels)} neurons in {self.k} modules {span} by {self.method}{quiet}; "
            f"{self.score_name} {self.score:.3f}, {self.verdict}{more}"
        )


@dataclass(frozen=True)
class _Method:
    """How a method finds modules in weights and scores them."""

    find: Callable[[Any, int], Labels]
    score: Callable[[Any, Labels], float]
    name: str
    less: bool = False


def partition(
    stats: Any,
    method: str = "coactivation",
    k: int | None = None,
    seed: int = 0,
    *,
    weight: str = "phi",
    neighbours: int | None = None,
    controls: int | None = None,
    nodes: str = "neurons",
    progress: bool = True,
) -> Partition:
    """Divide the neurons of a wire into modules, and say whether to believe them.

    | method | what it does | k=None |
    |---|---|---|
    | "coactivation" | neurons that fire together: Leiden communities of phi, or with k balanced parts (MoEfication, Zhang et al., 2022) | found |
    | "keys" | balanced k-means of unit keys (MoEfication; EMoE, Qiu et al., 2024) | divisor nearest √n |
    | "hierarchy" | communities within communities, with a dendrogram (Dreveton et al., 2026) | found |
    | "spectral" | small n-cut of the graph of absolute weights, or of an affinity (Filan et al., 2021) | largest eigengap |
    | "interaction" | communities of an `InteractionBasis`, or of an affinity that tells how neurons interact | found |
    | "random" | equal parts at random: the baseline | divisor nearest √n |

    Args:
        stats: what `cl.observe` measured on a wire, an `InteractionBasis` of one (for "interaction"), or a symmetric affinity (n, n):
            array, tensor or scipy sparse. An affinity may be signed, as correlations are: negative entries hold nothing together,
            but make better controls.
        method: one of the above.
        k: number of modules. Those of "keys", "random" and, where k is given, "coactivation" and "interaction" are of equal
            size, so k has to divide n.
        seed: the same seed gives the same partition, score and p. No global random state is touched but networkit's own.
        weight: of co-firing: "phi", the correlation of firing, or "ppmi" (see `circuitlab.analysis.affinity`).
        neighbours: each neuron keeps its so many heaviest edges; None for all up to 2,048 neurons, and 64 beyond.
        controls: how often the method is run again on controls of each kind; None for 39, or 19 from 512 neurons on; 0 for no
            test. More than 4,096 neurons are tested on a random sample of 4,096, those of a dense affinity on one of 512. An
            interaction basis has its controls with it.
        nodes: of an interaction basis, what is divided: "neurons" of the wire, "directions", or "both" wires' directions (see
            `circuitlab.analysis.interaction.interaction_affinity`).
        progress: show a bar where it takes over a second.

    Raises:
        InputError: an unknown method, an impossible k, statistics without firing, an affinity that is not symmetric or finite.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1, 0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"there is no partition method {method!r}{hint} The methods are {', '.join(METHODS)}")
    if weight not in affinity.WEIGHTS:
        raise InputError(f"co-firing is weighted by one of {', '.join(affinity.WEIGHTS)}, not {weight!r}")
    if hasattr(stats, "C_pinv"):
        evidence, silent = _interacting(stats, method, nodes, neighbours, controls)
        controls = len(evidence.others)
    else:
        evidence, silent = _evidence(stats, method, weight, neighbours, seed)
    weights = evidence.weights
    n = int(weights.shape[0])
    _check_k(method, k, n)
    k = balanced.default_count(n) if k is None and method in ("keys", "random") else k
    draws = (39 if n < 512 else 19) if controls is None else controls
    how = _method(method, k)
    with random_state(), _Bar(progress, method) as bar:
        if method == "hierarchy" and k is None:
            labels = hierarchy.bottom(evidence, seed, report=bar.step)
            first = communities.leiden(weights, seed)
            score = how.score(weights, first)
        else:
            labels = numbered(how.find(weights, seed))
            score = how.score(weights, labels)
        bar.step()
        null, tested, control, pvalue = _test(evidence, how, method, score, n, seed, draws, bar)
    tree: NDArray[np.float64] | None = None
    found: tuple[int, ...] = ()
    if method == "hierarchy":
        tree = hierarchy.linkage(weights, labels).astype(np.float64)
        shared = 1 / evidence.n if isinstance(evidence, Cofiring) else 0.0
        found = hierarchy.levels(weights, labels, tree, shared) if pvalue <= LEVEL else ()
    return Partition(
        labels, int(labels.max()) + 1, method, seed, score, how.name, null, tested, control, pvalue,
        "" if hasattr(stats, "C_pinv") and nodes != "neurons" else str(getattr(stats, "wire", "")), getattr(stats, "ffn", None), silent, tree, found,
    )


def _check_k(method: str, k: int | None, n: int) -> None:
    if k is None:
        return
    if isinstance(k, bool) or int(k) != k or not 1 <= k <= n:
        raise InputError(f"k={k!r} modules of {n} neurons: give a whole number from 1 to {n}")
    if method in ("keys", "random", "coactivation", "interaction"):
        balanced.check_divides(n, int(k))


def _evidence(stats: Any, method: str, weight: str, neighbours: int | None, seed: int) -> tuple[Evidence, Labels]:
    """What a method works on, and the neurons that it knows nothing about."""
    measured = hasattr(stats, "firing") or hasattr(stats, "keys") and hasattr(stats, "wire")
    nothing = np.zeros(0, dtype=np.int64)
    if method == "interaction" and measured:
        raise InputError(
            "method=\"interaction\" takes an interaction basis: cl.partition(interaction_basis(model, batches, wire, controls=19), "
            "method=\"interaction\"), or an affinity; for statistics of a wire use \"coactivation\""
        )
    if method == "keys":
        if not measured:
            raise InputError(f"method=\"keys\" clusters key vectors, and takes the statistics of a wire; a {type(stats).__name__} has none")
        return Keys(_finite(stats.keys, "keys")), nothing
    if method == "spectral" and measured:
        edges = np.concatenate([np.abs(_finite(stats.keys, "keys")), np.abs(_finite(stats.values, "values"))], axis=1)
        return Weights(Bipartite(np.ascontiguousarray(edges, dtype=np.float32))), np.flatnonzero(~edges.any(axis=1))
    if not measured:
        matrix = affinity.given(stats)
        return Given(matrix, neighbours, seed), np.flatnonzero(spectral.strengths(abs(matrix)) == 0)
    together, firing, n = affinity.counts(stats)
    correlation = affinity.phi(together, firing, n)

    def drawn(correlation: NDArray[Any], firing: NDArray[Any], n: int) -> Any:
        return graph(affinity.weigh(correlation, firing, n, weight), neighbours)

    evidence = Cofiring(correlation, firing, n, weight, neighbours, features(stats, drawn))
    return evidence, np.flatnonzero((firing == 0) | (firing == n))


def _interacting(basis: Any, method: str, nodes: str, neighbours: int | None, controls: int | None) -> tuple[Networks, Labels]:
    """The affinity of an interaction basis, with those of its controls."""
    from circuitlab.analysis.interaction import interaction_affinity

    if method not in ("interaction", "coactivation", "random"):
        raise InputError(f"an interaction basis is divided by method=\"interaction\", not {method!r}")
    drawn = basis.controls if controls is None else basis.controls[:controls]
    if controls != 0 and len(drawn) < (controls or 1):
        raise InputError(
            f"this interaction basis has {len(basis.controls)} controls, and edges dealt out anew would be none, since the basis makes "
            f"those of any network sparse: give interaction_basis(..., controls={controls or 19}), or controls=0 here for no test"
        )
    matrices = [interaction_affinity(one, nodes).numpy().astype(np.float32) for one in (basis, *drawn)]  # pyright: ignore[reportArgumentType]
    return Networks(affinity.given(matrices[0]), tuple(matrices[1:]), neighbours), np.flatnonzero(~matrices[0].any(axis=1))


def _finite(value: Any, name: str) -> NDArray[Any]:
    """Rows of weights, checked."""
    rows = affinity.array(value)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise InputError(f"the {name} are of shape {tuple(rows.shape)}, {int((~np.isfinite(rows)).sum())} entries not finite; they should be (neurons, dims)")
    return rows


def _method(method: str, k: int | None) -> _Method:
    def parts(weights: Any, seed: int) -> Labels:
        assert k is not None
        _, vectors = spectral.embed(weights, min(k, weights.shape[0]), seed)
        return balanced.parts(weights, k, vectors, np.random.default_rng(seed))

    def chance(weights: Any, seed: int) -> Labels:
        return np.random.default_rng(seed).permutation(weights.shape[0]) % (k or 1)

    def keys(rows: Any, seed: int) -> Labels:
        assert k is not None
        return balanced.kmeans(rows, k, np.random.default_rng(seed))

    def explained(rows: Any, labels: Labels) -> float:
        total = balanced.inertia(rows, np.zeros(len(rows), dtype=np.int64))
        return 1 - balanced.inertia(rows, labels) / total if total > 0 else 0.0

    q, cut = "modularity Q", "n-cut / (k - 1)"
    match method:
        case "keys":
            return _Method(keys, explained, "variance explained")
        case "spectral":
            return _Method(lambda w, seed: spectral.cluster(w, k, seed), spectral.normalised_cut, cut, less=True)
        case "random":
            return _Method(chance, communities.modularity, q)
        case "hierarchy" if k is not None:
            return _Method(lambda w, seed: spectral.cluster(w, k, seed), communities.modularity, q)
        case _:
            return _Method(parts if k is not None else communities.leiden, communities.modularity, q)


def _test(
    evidence: Evidence, how: _Method, method: str, score: float, n: int, seed: int, draws: int, bar: _Bar
) -> tuple[NDArray[np.float64], float, str, float]:
    """Scores of the controls that are hardest to beat, the score they stand against, their name, and p."""
    if draws < 1:
        return np.zeros(0), score, "", float("nan")
    tested = score
    trial = evidence if method == "random" else evidence.trial
    if n > _TESTED and method != "random":
        trial = trial.part(np.sort(np.random.default_rng([seed, n]).choice(n, _TESTED, replace=False)))
    weights = trial.weights
    if trial is not evidence:
        tested = how.score(weights, how.find(weights, seed))
    kinds = {"relabelled": lambda rng: weights} if method == "random" else trial.controls
    bar.total(1 + draws * len(kinds))
    worst: tuple[NDArray[np.float64], float, str, float] | None = None
    for number, (name, draw) in enumerate(kinds.items()):
        null = np.zeros(draws)
        for i in range(draws):
            rng = np.random.default_rng([seed, number, i])
            control = draw(rng)
            null[i] = how.score(control, how.find(control, int(rng.integers(2**31))))
            bar.step()
        beaten = (null <= tested if how.less else null >= tested).sum()
        pvalue = (int(beaten) + 1) / (draws + 1)
        if worst is None or (pvalue, -null.mean() if how.less else null.mean()) > (worst[3], -worst[0].mean() if how.less else worst[0].mean()):
            worst = null, tested, name, pvalue
        if pvalue > LEVEL:
            break
    assert worst is not None
    return worst


class _Bar:
    """A progress bar that appears after a second."""

    def __init__(self, shown: bool, what: str) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(desc=f"partition by {what}, and controls", delay=_DELAY, leave=False, disable=not shown)

    def total(self, steps: int) -> None:
        self._bar.total = self._bar.n + steps - 1
        self._bar.refresh() if self._bar.n > 1 and not self._bar.disable else None

    def step(self) -> None:
        self._bar.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:  # controls may end early: the bar of a notebook would be left there, in red
            self._bar.total = self._bar.n
        self._bar.close()
