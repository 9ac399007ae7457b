"""Controls: what a score is worth where there are no modules.

An optimiser finds communities in anything: a sparse random graph easily has Q = 0.3 with a dozen "modules". So each method
is run again on controls, and its score counts only by its rank among theirs, p = (r + 1) / (n + 1), where r of n controls
score as well or better. Each kind of evidence has the control that keeps what is not modular about it:

- **random keys on the same inputs** (co-firing): random directions that read what the block read; see `features`.
- **random network**, where the inputs are not known: random directions in a space with the spectrum of the measured activity,
  and each neuron's own firing rate; see `surrogate`. **independent**: neurons at their rates with nothing in common.
- **rotated** (keys): neurons are replaced by random mixtures of all neurons, R X with a random orthogonal R. It keeps the
  covariance and the mean, but no neuron is privileged; random keys have the same distribution after as before.
- **same entries and spectrum** (dense affinities): rotated as well, R C Rᵀ, and brought to the entries and to the spectrum of the
  affinity in turn, until it has both. Each alone is beaten by what is not modular: random entries of a skewed distribution,
  such as correlations clipped at 0, by their entries, random directions in a small space by their spectrum.
- **networks of the same weights** (interaction bases): the bases of networks whose weights are dealt out anew.
- **rewired** (sparse affinities): edges are switched, every degree kept, weights dealt out anew (the configuration model;
  Maslov & Sneppen, 2002).
- **shuffled** (keys, weights): the entries of each column dealt out anew over the neurons (Filan et al., 2021, shuffle layers).
- **relabelled** (random partitions): other random partitions of the same sizes.

Where two kinds apply, a score has to beat both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import fft, sparse

from circuitlab.analysis import affinity
from circuitlab.analysis.balanced import blocks
from circuitlab.analysis.communities import one_thread, upper
from circuitlab.analysis.features import Features
from circuitlab.analysis.spectral import Bipartite
from circuitlab.analysis.surrogate import Surrogate, mirrored, simulated

Floats = NDArray[np.floating[Any]]
Draw = Callable[[np.random.Generator], Any]
_DECOMPOSED = 512
"""Nodes of a dense affinity that is compared with others of its spectrum."""


class Evidence(Protocol):
    """What a partition is found from.

    Attributes:
        weights: what methods work on.
        controls: name -> a function that draws `weights` without modules.
        trial: the evidence that is tested against its controls: itself, or another about the same neurons.
    """

    @property
    def weights(self) -> Any: ...

    @property
    def controls(self) -> Mapping[str, Draw]: ...

    @property
    def trial(self) -> Evidence: ...

    def part(self, members: NDArray[np.int64]) -> Evidence:
        """The same evidence about some of the neurons alone, those of a community."""
        ...


# mixing neurons ---------------------------------------------------------------------------------------


def rotated_rows(rows: Floats, rng: np.random.Generator) -> Floats:
    """R X for rows X (n, d): random mixtures of the rows, with their mean and covariance.

    R is orthogonal and keeps the constant vector: cosine transforms, random signs and permutations in turn (as in Ailon &
    Chazelle, 2009), n log n operations for each column. One turn is not enough for the mixtures to be as random as those of a dense R.
    """
    n = len(rows)
    if n < 3:
        return np.asarray(rows, dtype=np.float32)[rng.permutation(n)]
    first, last = rng.permutation(n), rng.permutation(n)
    turns = [(rng.permutation(n - 1), rng.choice(np.array([-1, 1], dtype=np.float32), n - 1)) for _ in range(3)]
    out = np.empty((n, rows.shape[1]), dtype=np.float32)
    for columns in blocks(rows.shape[1]):
        spectrum = np.asarray(fft.dct(np.ascontiguousarray(rows[first, columns].T, dtype=np.float32), norm="ortho"))
        for order, signs in turns:
            spectrum[:, 1:] = fft.dct(spectrum[:, 1:][:, order] * signs, norm="ortho")
        out[:, columns] = np.asarray(fft.idct(spectrum, norm="ortho"))[:, last].T
    return out


class Alike:
    """Draws matrices with the entries and the spectrum of a symmetric one with zero diagonal, and random eigenvectors.

    A rotated matrix is brought to the one and to the other in turn, as Schreiber & Schmitz (1996) do for time series. Rows that are
    zero stay so. The strengths of the others are not kept: controls of equal strengths are too easy to beat.
    """

    def __init__(self, matrix: Floats) -> None:
        self.live = np.flatnonzero([bool(row.any()) for row in matrix])
        self.n, self.core = len(matrix), matrix[np.ix_(self.live, self.live)].astype(np.float64)
        self.pairs = np.triu_indices(len(self.core), 1)
        self.entries, self.spectrum = np.sort(self.core[self.pairs]), np.linalg.eigvalsh(self.core)

    def __call__(self, rng: np.random.Generator, turns: int = 10) -> Floats:
        seed = int(rng.integers(2**31))
        drawn = rotated_rows(rotated_rows(self.core, np.random.default_rng(seed)).T, np.random.default_rng(seed)).astype(np.float64)
        drawn = self._dealt(drawn)
        for _ in range(turns):
            vectors = np.linalg.eigh(drawn)[1]
            before, drawn = drawn, self._dealt((vectors * self.spectrum) @ vectors.T)
            if np.array_equal(before, drawn):
                break
        whole = np.zeros((self.n, self.n), dtype=np.float32)
        whole[np.ix_(self.live, self.live)] = drawn
        return whole

    def _dealt(self, matrix: Floats) -> Floats:
        """The entries in the order of those of a matrix."""
        values = np.empty(len(self.entries))
        values[np.argsort(matrix[self.pairs], kind="stable")] = self.entries
        out = np.zeros_like(matrix)
        out[self.pairs] = values
        return out + out.T


# evidence ---------------------------------------------------------------------------------------------


def graph(weights: Floats, neighbours: int | None) -> Any:
    """The graph of dense weights: all of them up to 2,048 nodes, else the heaviest 64 of each; or as many as are given."""
    n = len(weights)
    if neighbours is None:
        neighbours = 64 if n > 2048 else n
    return weights if neighbours >= n - 1 else affinity.nearest(weights, neighbours)


@dataclass(frozen=True, eq=False)
class Cofiring:
    """Signed phi (f, f) with the rates that it came from, and the neurons on a sample of their inputs if that is known."""

    correlation: Floats
    firing: Floats
    n: int
    weight: str = "phi"
    neighbours: int | None = None
    features: Features | None = None

    def _graph(self, correlation: Floats) -> Any:
        return graph(affinity.weigh(correlation, self.firing, self.n, self.weight), self.neighbours)

    @property
    def weights(self) -> Any:
        return self._graph(self.correlation)

    @property
    def controls(self) -> Mapping[str, Draw]:
        live = np.flatnonzero((self.firing > 0) & (self.firing < self.n))
        fitted: list[Surrogate] = []

        def whole(drawn: Floats) -> Any:
            if len(live) < len(self.firing):
                out = np.zeros_like(self.correlation)
                out[np.ix_(live, live)] = drawn
                drawn = out
            return self._graph(drawn)

        def network(rng: np.random.Generator) -> Any:
            if not fitted:
                fitted.append(Surrogate(self.correlation[np.ix_(live, live)], self.firing[live], self.n))
            return whole(fitted[0](rng))

        def independent(rng: np.random.Generator) -> Any:
            alone = np.zeros((len(live), 0), dtype=np.float32)
            if self.n <= max(4096, 4 * len(live)):
                return whole(simulated(alone, self.firing[live], self.n, rng))
            noise = rng.standard_normal((len(live), len(live)), dtype=np.float32)
            return whole(mirrored(noise / np.float32(self.n**0.5)))

        return {"random network, inputs not known": network, "independent": independent}

    @property
    def trial(self) -> Evidence:
        return self.features or self

    def part(self, members: NDArray[np.int64]) -> Cofiring:
        inner = self.correlation[np.ix_(members, members)]
        features = None if self.features is None else self.features.part(members)
        return Cofiring(inner, self.firing[members], self.n, self.weight, self.neighbours, features)


@dataclass(frozen=True, eq=False)
class Given:
    """An affinity as the user gave it: dense, possibly signed, or sparse."""

    matrix: Any
    neighbours: int | None = None
    seed: int = 0
    edges: bool | None = None

    @cached_property
    def is_graph(self) -> bool:
        """Whether it is a graph, whose edges can be rewired: sparse, less than a tenth filled, or all edges alike."""
        if self.edges is not None or sparse.issparse(self.matrix):
            return self.edges is not False
        filled = np.count_nonzero(self.matrix) / max(self.matrix.size - len(self.matrix), 1)
        return filled < 0.1 or np.isin(self.matrix, (0, self.matrix.max())).all().item()

    @property
    def weights(self) -> Any:
        if sparse.issparse(self.matrix):
            edges = upper(self.matrix)
            return sparse.csr_array(edges + edges.T)
        return graph(np.maximum(self.matrix, 0), self.neighbours)

    @property
    def controls(self) -> Mapping[str, Draw]:
        if self.is_graph:
            dense = not sparse.issparse(self.matrix)
            edges = upper(self.matrix)
            return {"rewired": lambda rng: rewired(edges, rng).toarray().astype(np.float32) if dense else rewired(edges, rng)}
        known: list[Alike] = []

        def alike(rng: np.random.Generator) -> Any:
            if not known:
                known.append(Alike(self.matrix))
            return graph(np.maximum(known[0](rng), 0), self.neighbours)

        return {"same entries and spectrum": alike}

    @property
    def trial(self) -> Given:
        """Its own; some of the nodes where there are too many to decompose."""
        if self.is_graph or len(self.matrix) <= _DECOMPOSED:
            return self
        return self.part(np.sort(np.random.default_rng([self.seed, len(self.matrix)]).choice(len(self.matrix), _DECOMPOSED, replace=False)))

    def part(self, members: NDArray[np.int64]) -> Given:
        inner = self.matrix[members][:, members]
        return Given(inner, self.neighbours, self.seed, self.is_graph)


@dataclass(frozen=True, eq=False)
class Networks:
    """An affinity, and those of control networks, which are drawn in turn."""

    matrix: Floats
    others: tuple[Floats, ...]
    neighbours: int | None = None

    @property
    def weights(self) -> Any:
        return graph(np.maximum(self.matrix, 0), self.neighbours)

    @property
    def controls(self) -> Mapping[str, Draw]:
        waiting = iter(self.others)
        return {"networks of the same weights": lambda rng: graph(np.maximum(next(waiting), 0), self.neighbours)}

    @property
    def trial(self) -> Networks:
        return self

    def part(self, members: NDArray[np.int64]) -> Given:
        return Given(self.matrix[members][:, members], self.neighbours)


def rewired(edges: Any, rng: np.random.Generator) -> Any:
    """A graph with the degrees of another (COO, each edge once), its weights dealt out over the edges: CSR, symmetric."""
    import networkit

    n = edges.shape[0]
    row, column = edges.row.astype(np.intp), edges.col.astype(np.intp)
    plain = networkit.GraphFromCoo((np.ones(len(row)), (row, column)), n=n, weighted=False, directed=False)
    with one_thread(int(rng.integers(2**31))):
        switching = networkit.randomization.EdgeSwitching(plain, 10.0, True)
        switching.run()
        switched = switching.getGraph()
        pairs = np.array(list(switched.iterEdges()), dtype=np.int64).reshape(-1, 2)
    one_way = sparse.coo_array((rng.permutation(edges.data), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return sparse.csr_array(one_way + one_way.T)


@dataclass(frozen=True, eq=False)
class Keys:
    """Key rows (f, d), as they are; methods work on them at unit length."""

    rows: Floats

    @property
    def weights(self) -> Floats:
        return unit(self.rows)

    @property
    def controls(self) -> Mapping[str, Draw]:
        return {
            "rotated": lambda rng: unit(rotated_rows(self.rows, rng)),
            "shuffled": lambda rng: unit(rng.permuted(self.rows, axis=0)),
        }

    @property
    def trial(self) -> Keys:
        return self

    def part(self, members: NDArray[np.int64]) -> Keys:
        return Keys(self.rows[members])


def unit(rows: Floats) -> Floats:
    """Rows of length 1, float32; zero rows stay zero."""
    rows = np.asarray(rows, dtype=np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


@dataclass(frozen=True, eq=False)
class Weights:
    """Absolute weights of neurons (f, dims): what they read and what they write."""

    weights: Bipartite

    @property
    def controls(self) -> Mapping[str, Draw]:
        return {"shuffled": lambda rng: Bipartite(rng.permuted(self.weights.edges, axis=0))}

    @property
    def trial(self) -> Weights:
        return self

    def part(self, members: NDArray[np.int64]) -> Weights:
        return Weights(Bipartite(self.weights.edges[members]))
