"""Communities of a weighted graph, their number not given: Leiden (Traag, Waltman & van Eck, 2019), and modularity.

Modularity (Newman & Girvan, 2004; weighted, Newman, 2004): Q = sum over communities of (w_in / W - (s / 2W)²) with w_in
the weight within, s the summed strength of the members, W the weight of all edges.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Labels = NDArray[np.int64]
_LOCK = threading.Lock()


def numbered(labels: NDArray[Any]) -> Labels:
    """The same groups, numbered 0, 1 ... by falling size, and by their smallest member where sizes are equal."""
    _, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[inverse.ravel()]


def sums(weights: Any, labels: Labels) -> NDArray[np.float64]:
    """Summed weight between groups: (k, k), each edge within a group counted twice, float64."""
    n, k = len(labels), int(labels.max()) + 1
    chosen = sparse.csr_array((np.ones(n), (labels, np.arange(n))), shape=(k, n))
    if sparse.issparse(weights):
        return np.asarray((chosen @ weights @ chosen.T).toarray(), dtype=np.float64)
    rows = np.zeros((k, n))
    for group in range(k):
        rows[group] = weights[labels == group].sum(axis=0, dtype=np.float64)
    return np.asarray((chosen @ rows.T).T, dtype=np.float64)


def modularity(weights: Any, labels: Labels) -> float:
    """Newman's modularity Q of groups in a graph of non-negative symmetric weights, zero on the diagonal."""
    between = sums(weights, labels)
    total = between.sum()
    if total <= 0:
        return 0.0
    return float(np.trace(between) / total - ((between.sum(axis=1) / total) ** 2).sum())


def leiden(weights: Any, seed: int, iterations: int | None = None, resolution: float = 1.0) -> Labels:
    """Communities of high modularity, by networkit on one thread: the same seed gives the same communities.

    Args:
        weights: (n, n) array or scipy sparse array, symmetric, non-negative.
        seed: of networkit's own generator; no other is touched.
        iterations: rounds of Leiden, each starting from the communities of the last; None for 10, or 3 from 500,000 edges on.
        resolution: over 1 for smaller communities (Reichardt & Bornholdt, 2006).

    Returns:
        The community of each node (n,), as `numbered`; nodes without an edge are one community together.
    """
    import networkit

    edges = upper(weights)
    n = weights.shape[0]
    row, column = edges.row.astype(np.intp), edges.col.astype(np.intp)
    labels = np.full(n, n, dtype=np.int64)
    iterations = (10 if len(row) < 500_000 else 3) if iterations is None else iterations
    linked = np.zeros(n, dtype=bool)
    linked[row] = linked[column] = True
    if linked.any():
        graph = networkit.GraphFromCoo((edges.data.astype(np.float64), (row, column)), n=n, weighted=True, directed=False)
        with one_thread(seed):
            found = networkit.community.ParallelLeiden(graph, iterations, True, resolution)
            found.run()
            partition = found.getPartition()  # hands the partition over: a second call would get an empty one
            labels[linked] = np.asarray(partition.getVector(), dtype=np.int64)[linked]
    return numbered(labels)


@contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """Run networkit, whose threads and generator are global, so that the same seed gives the same numbers."""
    import networkit

    with _LOCK:
        threads = networkit.getMaxNumberOfThreads()
        networkit.setNumberOfThreads(1)
        try:
            networkit.setSeed(seed, False)
            yield
        finally:
            networkit.setNumberOfThreads(threads)


def upper(weights: Any) -> Any:
    """The positive edges, each once, as COO array."""
    if sparse.issparse(weights):
        edges = sparse.triu(weights, 1).tocoo()
        kept = edges.data > 0
        return sparse.coo_array((edges.data[kept], (edges.row[kept], edges.col[kept])), shape=edges.shape)
    row, column = np.nonzero(np.triu(weights, 1) > 0)
    return sparse.coo_array((weights[row, column], (row, column)), shape=weights.shape)
