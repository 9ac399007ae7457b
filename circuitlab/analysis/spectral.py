"""Spectral clustering under the normalised cut, as Filan et al. (2021, *Clusterability in Neural Networks*) measure it.

The n-cut of groups is the sum over groups of (weight that leaves the group) / (weight that touches it); Shi & Malik (2000),
von Luxburg (2007). It is found from the largest eigenvectors of D^-½ W D^-½, rows normalised (Ng, Jordan & Weiss, 2001).
Random groups have an n-cut near k - 1; the score is n-cut / (k - 1), which can be compared between numbers of groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from circuitlab.analysis.communities import Labels, sums

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Bipartite:
    """Neurons joined through the dimensions that they read and write: W = B C⁻¹ Bᵀ, C the column sums of B (Dhillon, 2001).

    One step of a walk from a neuron over |weight| to a dimension and back over |weight|. W is never formed.

    Attributes:
        edges: (f, dims), absolute weights.
    """

    edges: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.edges), len(self.edges))

    def __matmul__(self, other: Floats) -> Floats:
        column = self.edges.sum(axis=0)
        back = self.edges.T @ other
        inverse = np.divide(1, column, out=np.zeros_like(column), where=column > 0)
        return self.edges @ (back * (inverse if back.ndim == 1 else inverse[:, None]))


def strengths(weights: Any) -> Floats:
    """Summed weight of each node, (n,) float64."""
    if isinstance(weights, Bipartite):
        return weights.edges.sum(axis=1, dtype=np.float64)
    return np.asarray(weights.sum(axis=1, dtype=np.float64)).ravel()


def embed(weights: Any, dims: int, seed: int) -> tuple[Floats, Floats]:
    """The largest eigenvalues (dims,) of D^-½ W D^-½, falling, and their vectors (n, dims)."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = weights.shape[0]
    strength = strengths(weights)
    scale = np.divide(1, np.sqrt(strength), out=np.zeros_like(strength), where=strength > 0)

    def multiply(v: Floats) -> Floats:
        v = v.ravel()
        return scale * np.asarray(weights @ (scale * v).astype(np.float32 if not sparse.issparse(weights) else np.float64))

    if dims >= n - 1 or n <= 64:
        full = np.stack([multiply(e) for e in np.eye(n)])
        values, vectors = np.linalg.eigh((full + full.T) / 2)
        return values[::-1][:dims], vectors[:, ::-1][:, :dims]
    operator: Any = LinearOperator((n, n), matvec=multiply, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    start = np.random.default_rng(seed).standard_normal(n)
    values, vectors = eigsh(operator, k=dims, which="LA", v0=start, tol=cast("Any", 1e-4))
    order = np.argsort(-values)
    return values[order], vectors[:, order]


def normalised_cut(weights: Any, labels: Labels) -> float:
    """n-cut / (k - 1) of groups: 0 where no weight leaves its group, near 1 for random groups. 1 for a single group."""
    if isinstance(weights, Bipartite):
        chosen = np.zeros((len(labels), int(labels.max()) + 1), dtype=np.float32)
        chosen[np.arange(len(labels)), labels] = 1
        between = chosen.T @ np.asarray(weights @ chosen, dtype=np.float64)
    else:
        between = sums(weights, labels)
    touching = between.sum(axis=1)
    held = touching > 0
    if held.sum() < 2:
        return 1.0
    leaving = 1 - np.diagonal(between)[held] / touching[held]
    return float(leaving.sum() / (held.sum() - 1))


def eigengap(values: Floats) -> int:
    """The number of groups, at least 2, after which falling eigenvalues drop the most (von Luxburg, 2007, section 8.3)."""
    drops = values[1:-1] - values[2:]
    return int(drops.argmax()) + 2 if len(drops) else 2


def cluster(weights: Any, k: int | None, seed: int, most: int = 32) -> Labels:
    """Groups by spectral clustering; k=None takes the largest eigengap of up to `most` groups. Isolated nodes: one group."""
    from sklearn.cluster import KMeans

    n = weights.shape[0]
    linked = strengths(weights) > 0
    lone = int(not linked.all())
    most = max(2, min(most, int(linked.sum()) // 2))
    values, vectors = embed(weights, (most + 1 if k is None else k) , seed)
    k = eigengap(values) if k is None else k
    rows = vectors[linked, : k - lone if k - lone > 0 else 1]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    labels = np.full(n, k, dtype=np.int64)
    groups = max(1, k - lone)
    labels[linked] = KMeans(groups, n_init=cast("Any", 4), random_state=seed).fit_predict(rows) if groups > 1 else 0
    return labels
