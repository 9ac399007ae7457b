"""Hubs and bridges: what place each neuron has in the graph of neurons that belong together.

The graph is an affinity of neurons (co-firing as phi, key similarity, interaction ...). Two things are told apart:

- Sums over the whole affinity: **strength**, and with modules the **participation** coefficient 1 - sum_m (s_im / s_i)²,
  0 where all of a neuron's weight stays in one module and 1 - 1/k where it is spread over k evenly, and **within**, the
  z-score of a neuron's strength inside its own module among the members (Guimerà & Amaral, *Functional cartography of
  complex metabolic networks*, 2005).
- Paths and triangles, on the graph of heaviest edges: **degree**, **betweenness** (Freeman, 1977; the share of shortest
  paths that pass, an edge of weight w being 1/w long) and the weighted **clustering** coefficient (Onnela et al., 2005).

In any graph some neuron is strongest. So strength and betweenness come with controls: the same weights dealt out at
random over the pairs of neurons, in which no neuron is special, so that all of them are one sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from circuitlab.analysis.communities import one_thread
from circuitlab.errors import InputError

Floats = NDArray[np.float64]
EXACT = 2**25
"""Edges times nodes up to which betweenness is exact."""


def places(
    affinity: Any, labels: Any = None, *, neighbours: int | None = 32, pivots: int | None = None, controls: int = 39, seed: int = 0,
) -> Any:
    """Strength, degree, betweenness, clustering and participation of each node of a weighted graph.

    Args:
        affinity: (n, n) array, tensor or scipy sparse array, symmetric; the diagonal is left out, and what is negative
            counts as no edge.
        labels: (n,) the module of each node, or a partition that has them as ``labels``; None leaves out what needs them.
        neighbours: for paths and triangles each node keeps so many of its heaviest edges (an edge stays if either end
            keeps it); None keeps all.
        pivots: betweenness is estimated from the shortest paths of so many nodes (Geisberger, Sanders & Schultes, 2008);
            None is exact up to 2^25 edges times nodes, and takes 256 above.
        controls: how many times weights are dealt out anew; 0 for none, and no p-values. Fewer than 20 cannot
            make a single node significant.
        seed: of all that is random; the same seed gives the same numbers.

    Returns:
        A pandas DataFrame, a row for each node, with columns
        strength, degree, betweenness (0 to 1), clustering (0 to 1);
        strength_p, betweenness_p: one-sided, (r + 1) / (controls n + 1), where r nodes of the controls have as much;
        hub, bridge: whether these are significant at a false discovery rate of .05;
        and with labels module, participation, within.

    Raises:
        InputError: no such matrix, no positive entry, or labels of another length.
    """
    import pandas as pd
    from scipy.stats import false_discovery_control

    if (neighbours is not None and neighbours < 1) or (pivots is not None and pivots < 1) or controls < 0:
        raise InputError(f"neighbours={neighbours}, pivots={pivots} must be at least 1 or None, and controls={controls} at least 0")
    edges = _edges(affinity)
    n = edges.shape[0]
    rng = np.random.default_rng(seed)
    strength = _strength(edges)
    near = _nearest(edges, neighbours)
    frame: dict[str, Any] = {
        "strength": strength,
        "degree": np.diff(near.indptr),
        "betweenness": _betweenness(near, pivots, seed),
        "clustering": _clustering(near),
    }
    if controls:
        drawn = [_dealt(edges, rng) for _ in range(controls)]
        null = {
            "strength": [_strength(control) for control in drawn],
            "betweenness": [_betweenness(_nearest(control, neighbours), pivots, seed + 1 + i) for i, control in enumerate(drawn)],
        }
        for score, mark in (("strength", "hub"), ("betweenness", "bridge")):
            others = np.sort(np.concatenate(null[score]))
            as_much = len(others) - np.searchsorted(others, frame[score] * (1 - 1e-9), side="left")
            frame[f"{score}_p"] = (as_much + 1) / (len(others) + 1)
            frame[mark] = false_discovery_control(frame[f"{score}_p"]) < 0.05
    if labels is not None:
        modules = _modules(labels, n)
        frame |= {"module": modules, **_cartography(edges, strength, modules)}
    return pd.DataFrame(frame)


# numbers of nodes -------------------------------------------------------------------------------------


def _strength(edges: Any) -> Floats:
    n = edges.shape[0]
    return np.asarray(np.bincount(edges.row, edges.data, n) + np.bincount(edges.col, edges.data, n), dtype=np.float64)


def _clustering(graph: Any) -> Floats:
    """Mean over pairs of neighbours of the geometric mean of the triangle's weights, the heaviest edge being 1."""
    scaled = graph.copy()
    scaled.data = np.cbrt(scaled.data / scaled.data.max())
    triangles = np.asarray((scaled @ scaled).multiply(scaled).sum(axis=1)).ravel()
    degree = np.diff(graph.indptr)
    most = degree * (degree - 1.0)
    return np.divide(triangles, most, out=np.zeros_like(triangles), where=most > 0)


def _betweenness(graph: Any, pivots: int | None, seed: int) -> Floats:
    import networkit

    n = graph.shape[0]
    if n < 3:
        return np.zeros(n)
    upper = sparse.triu(graph, 1).tocoo()
    lengths = upper.data.max() / upper.data
    net = networkit.GraphFromCoo((lengths, (upper.row.astype(np.intp), upper.col.astype(np.intp))), n=n, weighted=True, directed=False)
    if pivots is None and len(lengths) * n > EXACT:
        pivots = 256
    with one_thread(seed):
        if pivots is None or pivots >= n:
            found = networkit.centrality.Betweenness(net, normalized=True)
        else:
            found = networkit.centrality.EstimateBetweenness(net, pivots, normalized=True, parallel=False)
        found.run()
        return np.array(found.scores(), dtype=np.float64)


def _cartography(edges: Any, strength: Floats, modules: NDArray[np.int64]) -> dict[str, Any]:
    """Participation coefficient and within-module z-score."""
    n, k = len(modules), int(modules.max()) + 1
    both: Any = sparse.csr_array(edges + edges.T)
    member: Any = sparse.csr_array((np.ones(n), (np.arange(n), modules)), shape=(n, k))
    toward = np.asarray((both @ member).toarray())
    share = np.divide(toward, strength[:, None], out=np.zeros_like(toward), where=strength[:, None] > 0)
    participation = np.where(strength > 0, 1 - (share**2).sum(axis=1), 0.0)
    inside = toward[np.arange(n), modules]
    size = np.bincount(modules, minlength=k)
    mean = (np.bincount(modules, inside, k) / np.maximum(size, 1))[modules]
    away = inside - mean
    spread = np.sqrt(np.bincount(modules, away**2, k) / np.maximum(size, 1))[modules]
    within = np.divide(away, spread, out=np.zeros(n), where=spread > 1e-12 * np.maximum(mean, 1e-300))
    return {"participation": participation, "within": within}


# the graph --------------------------------------------------------------------------------------------


def _nearest(edges: Any, neighbours: int | None) -> Any:
    """The heaviest edges of each node, as CSR, symmetric; ties go to the neighbour with the lower number."""
    both = sparse.csr_array(edges + edges.T)
    both.sort_indices()
    degree = np.diff(both.indptr)
    if neighbours is None or neighbours >= degree.max(initial=0):
        return both
    row = np.repeat(np.arange(len(degree)), degree)
    order = np.lexsort((both.indices, -np.asarray(both.data, dtype=np.float64), row))
    rank = np.arange(len(row)) - np.repeat(np.asarray(both.indptr)[:-1], degree)
    kept = order[rank < neighbours]
    one_way = sparse.csr_array((both.data[kept], (row[kept], both.indices[kept])), shape=both.shape)
    return sparse.csr_array(one_way.maximum(one_way.T))


def _dealt(edges: Any, rng: np.random.Generator) -> Any:
    """The same weights on other pairs, drawn at random."""
    n, count = edges.shape[0], len(edges.data)
    pairs = n * (n - 1) // 2
    drawn = np.arange(pairs) if count == pairs else rng.choice(pairs, count, replace=False, shuffle=False)
    ends = np.cumsum(np.arange(n - 1, 0, -1))  # pairs (0, 1), (0, 2) ... (1, 2) ...
    row = np.searchsorted(ends, drawn, side="right")
    column = drawn - np.concatenate([[0], ends])[row] + row + 1
    return sparse.coo_array((rng.permutation(edges.data), (row, column)), shape=edges.shape)


def _edges(affinity: Any) -> Any:
    """The positive entries above the diagonal, as COO, float64."""
    if hasattr(affinity, "detach"):
        affinity = affinity.detach().cpu()
        affinity = (affinity.to_dense() if affinity.is_sparse else affinity).double().numpy()
    is_sparse = sparse.issparse(affinity)
    matrix: Any = sparse.csr_array(affinity) if is_sparse else np.asarray(affinity)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "biuf":
        raise InputError(f"an affinity is a symmetric matrix of numbers; this has shape {tuple(matrix.shape)} and dtype {matrix.dtype}")
    entries = matrix.data if is_sparse else matrix
    if not np.isfinite(entries).all():
        raise InputError(f"this affinity has {int((~np.isfinite(entries)).sum())} entries that are not finite; dead neurons may be given as zeros")
    gap = abs(matrix - matrix.T).max() if matrix.shape[0] else 0
    if gap > 1e-5 * max(float(abs(matrix).max()) if matrix.shape[0] else 0, 1e-300):
        raise InputError(f"this affinity is not symmetric: entries differ from their mirror by up to {gap:.3g}; give (A + A.T) / 2")
    upper = sparse.triu(matrix, 1).tocoo() if is_sparse else None
    if upper is not None:
        row, column, data = upper.row, upper.col, upper.data
    else:
        row, column = np.nonzero(np.triu(matrix, 1) > 0)
        data = matrix[row, column]
    positive = data > 0
    if not positive.any():
        raise InputError("this affinity has no positive entry off the diagonal, so there is no graph")
    row, column = row[positive].astype(np.int64), column[positive].astype(np.int64)
    return sparse.coo_array((data[positive].astype(np.float64), (row, column)), shape=matrix.shape)


def _modules(labels: Any, n: int) -> NDArray[np.int64]:
    given = getattr(labels, "labels", labels)
    given = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    if given.shape != (n,):
        raise InputError(f"labels has shape {given.shape}, and the graph {n} nodes: give the module of each")
    if given.dtype.kind not in "iu" or given.min() < 0:
        raise InputError("labels must be modules numbered from 0")
    return given.astype(np.int64)
