"""Hierarchical communities, bottom up.

After Dreveton, Kuroda, Grossglauser & Thiran (2026), *When Does Bottom-up Beat Top-down in Hierarchical Community Detection?*
The bottom communities come first, here by Leiden within communities as long as each split beats its controls, then each node
moves where the likelihood of a degree-corrected block model is larger (Karrer & Newman, 2011): recovery down to the
threshold needs such a step after any good start (Abbe, 2018, section 4). Then the two communities a, b of the largest edge
density p(a, b) = w(a, b) / (|a| |b|) merge, again and again; the density of the union with c is the mean of both, weighted by
**size**, so it is the density of edges between the unions and the heights never turn back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from circuitlab.analysis.communities import Labels, leiden, modularity, numbered, sums
from circuitlab.analysis.null import Evidence
from circuitlab.errors import InputError

Floats = NDArray[np.floating[Any]]


def bottom(evidence: Evidence, seed: int, draws: int = 19, smallest: int = 12, deepest: int = 6, report: Callable[[], Any] = lambda: None) -> Labels:
    """The bottom communities (n,): Leiden, and Leiden again within each community while the split is significant.

    A split within is kept if its modularity is above that of all controls, by as many of their standard deviations as one
    test in twenty would allow for all the communities tested at that depth (Bonferroni).
    """
    weights = evidence.weights
    labels = leiden(weights, seed)
    pending = [np.flatnonzero(labels == c) for c in range(int(labels.max()) + 1)]
    split = False
    for depth in range(deepest):
        large = [m for m in pending if len(m) >= smallest]
        needed = float(norm.isf(0.05 / max(1, len(large))))
        pending = []
        for members in large:
            report()
            inner = _split(evidence.part(members), seed + depth + 1, draws, needed)
            if inner is None:
                continue
            split = True
            for c in range(1, int(inner.max()) + 1):
                labels[members[inner == c]] = labels.max() + 1
            pending += [members[inner == c] for c in range(int(inner.max()) + 1)]
    labels = numbered(labels)
    return _polish(weights, labels) if split else labels


def _split(evidence: Evidence, seed: int, draws: int, needed: float) -> Labels | None:
    """The communities within some neurons, or None where these are no better than in every kind of control."""
    weights = evidence.weights
    if not weights.sum() > 0:
        return None
    labels = leiden(weights, seed)
    if labels.max() == 0:
        return None
    for one in (evidence,) if evidence.trial is evidence else (evidence, evidence.trial):
        value = modularity(weights, labels) if one is evidence else modularity(one.weights, leiden(one.weights, seed))
        for name, draw in one.controls.items():
            scores: list[float] = []
            for i in range(draws):
                control = draw(np.random.default_rng([seed, i, len(name)]))
                scores.append(modularity(control, leiden(control, seed + i)))
                if scores[-1] >= value:
                    return None
            if value < np.mean(scores) + needed * np.std(scores, ddof=1):
                return None
    return labels


def _polish(weights: Any, labels: Labels, sweeps: int = 10) -> Labels:
    """Move nodes where the likelihood of the degree-corrected block model rises, all at once, while it rises."""
    strength = np.asarray(weights.sum(axis=1, dtype=np.float64)).ravel()
    linked = strength > 0
    best = -np.inf
    result = labels
    for _ in range(sweeps):
        between = sums(weights, labels)
        k = len(between)
        total = between.sum(axis=1)
        rate = (between + 1e-9 * between.sum() / k**2) / np.maximum(np.outer(total, total), 1e-300)
        value = float((between * np.log(rate)).sum())
        if value <= best + 1e-9 * abs(value):
            break
        best, result = value, labels
        chosen = np.zeros((len(labels), k), dtype=np.float32)
        chosen[np.arange(len(labels)), labels] = 1
        towards = np.asarray(weights @ chosen, dtype=np.float64)
        gain = towards @ np.log(rate).T - strength[:, None] * (rate @ total)
        labels = np.where(linked, gain.argmax(axis=1), labels)
        _, labels = np.unique(labels, return_inverse=True)
    return numbered(result)


def densities(weights: Any, labels: Labels) -> Floats:
    """Edge density between groups (k, k): mean weight over pairs of members; within a group over its pairs of two."""
    sizes = np.bincount(labels).astype(np.float64)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    return sums(weights, labels) / np.maximum(pairs, 1)


def linkage(weights: Any, labels: Labels) -> NDArray[np.float64]:
    """The tree over groups as a scipy linkage (k-1, 4): the two that merge, the height, the groups in the union.

    The height is 1 - p(a, b) / p₀ with p₀ the largest density within a group: 0 for groups as dense between as within, 1
    where no edge is between. Heights never fall.
    """
    k = int(labels.max()) + 1
    density = densities(weights, labels)
    top = max(float(np.diagonal(density).max()), float(density.max()), 1e-300)
    size = np.concatenate([np.bincount(labels, minlength=k).astype(np.float64), np.zeros(k - 1)])
    p = np.full((2 * k - 1, 2 * k - 1), -np.inf)
    p[:k, :k] = density
    np.fill_diagonal(p, -np.inf)
    leaves = np.concatenate([np.ones(k), np.zeros(k - 1)])
    tree = np.zeros((k - 1, 4))
    height = 0.0
    for step in range(k - 1):
        a, b = divmod(int(p.argmax()), 2 * k - 1)
        a, b = min(a, b), max(a, b)
        new = k + step
        height = max(height, 1 - float(p[a, b]) / top)  # equal but for rounding
        size[new], leaves[new] = size[a] + size[b], leaves[a] + leaves[b]
        tree[step] = a, b, height, leaves[new]
        union = (size[a] * p[a] + size[b] * p[b]) / size[new]
        p[new], p[:, new] = union, union
        p[[a, b, new], [a, b, new]] = -np.inf
        p[[a, b]] = -np.inf
        p[:, [a, b]] = -np.inf
    return tree


def cut(tree: Floats, k: int) -> Labels:
    """The group, of k, of each leaf of a linkage, (leaves,)."""
    leaves = len(tree) + 1
    if not 1 <= k <= leaves:
        raise InputError(f"this dendrogram has {leaves} bottom communities: it can be cut into 1 to {leaves} groups, not {k}")
    parent = np.arange(2 * leaves - 1)
    for step in range(leaves - k):
        parent[[int(tree[step, 0]), int(tree[step, 1])]] = leaves + step
    root = np.arange(2 * leaves - 1)
    for node in range(2 * leaves - 2, -1, -1):
        root[node] = node if parent[node] == node else root[parent[node]]
    return np.unique(root[:leaves], return_inverse=True)[1]


def levels(weights: Any, labels: Labels, tree: Floats, shared: float = 0.0, doubt: float = 0.001) -> tuple[int, ...]:
    """The numbers of groups at which the dendrogram has a level, rising; the last is the number of bottom communities.

    Between two merges lies a level if their edge densities differ by more than sampling allows; of all dendrograms one in
    1 / doubt has a level by chance. The density of m edges has a standard error of the root of their summed squares over m,
    and, where groups were seen firing over n positions, one of the root of both inner densities over n, which no
    number of neurons averages out (shared = 1/n).
    """
    k = len(tree) + 1
    if k < 2:
        return ()
    squared = weights.multiply(weights) if hasattr(weights, "multiply") else weights.astype(np.float64) ** 2
    weight, power = sums(weights, labels), sums(squared, labels)
    size = np.bincount(labels).astype(np.float64)
    at: list[NDArray[np.bool_]] = [np.arange(k) == i for i in range(k)]
    mean, error = np.zeros(k - 1), np.zeros(k - 1)

    def inner(group: NDArray[np.bool_]) -> float:
        members = float(size[group].sum())
        return float(weight[np.ix_(group, group)].sum()) / max(members * (members - 1), 1)

    for step, (a, b) in enumerate(tree[:, :2].astype(int)):
        one, two = at[a], at[b]
        pairs = size[one].sum() * size[two].sum()
        mean[step] = weight[np.ix_(one, two)].sum() / pairs
        variance = float(power[np.ix_(one, two)].sum()) / pairs**2 + inner(one) * inner(two) * shared
        error[step] = np.sqrt(max(variance, 1e-300))
        at.append(one | two)
    needed = float(norm.isf(doubt / max(1, k - 2)))
    found = [k - 1 - step for step in range(k - 2) if mean[step] - mean[step + 1] > needed * np.hypot(error[step], error[step + 1])]
    return tuple(sorted({*found, k}))
