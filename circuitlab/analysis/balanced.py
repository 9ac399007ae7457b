"""Groups of exactly equal size: balanced assignment, balanced k-means, balanced parts of a graph.

The assignment of n points to k groups of n/k each at least cost is a transport problem. It is solved exactly in two stages:
entropic prices (Cuturi, 2013) bring the groups near their sizes, and since choosing the cheapest group at *any*
prices is optimal for the sizes that come out, shortest augmenting paths over the k groups then settle the rest without
losing optimality (Ahuja, Magnanti & Orlin, *Network Flows*, 1993, section 9.7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from circuitlab.errors import InputError

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


def divisors(n: int) -> list[int]:
    """The divisors of n, rising."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def default_count(n: int) -> int:
    """The divisor of n nearest to its square root (in ratio; the larger on a tie): as many groups as members of each.

    Raises:
        InputError: no divisor within a factor of 4 of the root, as for a prime.
    """
    root = math.sqrt(n)
    best = min(divisors(n), key=lambda d: (round(abs(math.log(d / root)), 9), -d))
    if not root / 4 <= best <= root * 4:
        raise InputError(f"{n} neurons have no count of equal modules near √{n}: their divisors are {divisors(n)}; give k=, one of these")
    return best


def check_divides(n: int, k: int) -> None:
    """Refuse a number of equal groups that does not divide n, naming the nearest that do."""
    if n % k:
        near = sorted(sorted(divisors(n), key=lambda d: abs(d - k))[:3])
        raise InputError(f"k={k} does not divide {n}: equal modules need a divisor; the nearest are {', '.join(map(str, near))}")


# assignment -------------------------------------------------------------------------------------------


def assign(cost: Floats, prices: Floats | None = None) -> tuple[Labels, Floats]:
    """Assign n points to k groups of n/k members each at the least total cost.

    Args:
        cost: (n, k), cost of each point in each group; k divides n.
        prices: (k,), those of an earlier, similar problem, which make this one quicker.

    Returns:
        The group of each point (n,), and the prices (k,).
    """
    n, k = cost.shape
    capacity = n // k
    part = np.partition(cost, 1, axis=1) if k > 1 else cost
    scale = float(np.mean(part[:, 1] - part[:, 0])) if k > 1 else 0.0
    spread = float(np.ptp(cost.mean(axis=0))) if k > 1 else 0.0
    prices = np.zeros(k) if prices is None else np.asarray(prices, dtype=np.float64)
    if max(scale, spread) > 0:
        prices = _entropic(cost, prices, capacity, max(scale, spread * 0.05))
    exact = cost.astype(np.float64)  # differences of single precision add up to gains around circles that are none
    labels = np.asarray(np.argmin(exact + prices, axis=1), dtype=np.int64)
    return _settle(exact, labels, capacity, 1e-7 * max(scale, 1e-30)), prices


def _entropic(cost: Floats, prices: Floats, capacity: int, scale: float) -> Floats:
    """Prices at which soft choices fill each group to its capacity, for falling temperatures: steps of Newton's method
    on the dual, which is convex, none longer than soft choices can tell (a few temperatures)."""
    above = torch.from_numpy(np.ascontiguousarray(cost, dtype=np.float32))
    above = above - above.amin(dim=1, keepdim=True)
    found, soft = torch.from_numpy(prices), torch.empty_like(above)
    for temperature, near in ((scale / 4, 0.05), (scale / 16, 0.05), (scale / 64, 0.05), (scale / 256, 0.005)):
        for _ in range(20):
            torch.add(above, found.float(), out=soft)
            soft -= soft.amin(dim=1, keepdim=True)
            soft.clamp_(max=40 * temperature).mul_(-1 / temperature).exp_()  # numbers below 1e-17 are slow, and nothing
            soft /= soft.sum(dim=1, keepdim=True)
            filled = soft.sum(dim=0).double()
            excess = filled - capacity
            if float(excess.abs().max()) < near * capacity:
                break
            curvature = torch.diag(filled + 1e-3 * capacity) - (soft.T @ soft).double()  # none along equal prices
            step = temperature * torch.linalg.solve(curvature, excess)
            found = found + step * min(1.0, 4 * temperature / max(float(step.abs().max()), 1e-300))
    return (found - found.mean()).numpy()


def _settle(cost: Floats, labels: Labels, capacity: int, tolerance: float) -> Labels:
    """Move points along the cheapest chains of groups, from those over capacity to those under, until all are full."""
    k = cost.shape[1]
    counts = np.bincount(labels, minlength=k)
    if (counts == capacity).all():
        return labels
    labels = labels.copy()
    members = [np.flatnonzero(labels == a) for a in range(k)]
    move = np.full((k, k), np.inf)  # move[a, b]: what it costs that the cheapest member of a goes to b

    def refresh(a: int) -> None:
        if len(members[a]):
            move[a] = (cost[members[a]] - cost[members[a], a][:, None]).min(axis=0)
        else:
            move[a] = np.inf
        move[a, a] = np.inf

    for a in range(k):
        refresh(a)
    while (counts > capacity).any():
        path = _cheapest(move, counts > capacity, counts < capacity)
        amount = min(counts[path[0]] - capacity, capacity - counts[path[-1]])
        movers: list[NDArray[np.int64]] = []
        for a, b in pairwise(path):
            extra = cost[members[a], b] - cost[members[a], a]
            movers.append(members[a][np.flatnonzero(extra <= move[a, b] + tolerance)])
        amount = max(1, min(amount, *(len(m) for m in movers)))  # points that are alike go together
        for b, who in zip(path[1:], movers, strict=True):
            labels[who[:amount]] = b
            members[b] = np.concatenate([members[b], who[:amount]])
        for a in path:
            members[a] = members[a][labels[members[a]] == a]
            counts[a] = len(members[a])
        for a in path:
            refresh(a)
    return labels


def _cheapest(move: Floats, source: NDArray[np.bool_], sink: NDArray[np.bool_]) -> list[int]:
    """The cheapest chain of groups from a source to a sink (Bellman & Ford: gains are possible on the way)."""
    k = len(move)
    distance = np.where(source, 0.0, np.inf)
    before = np.full(k, -1)
    for _ in range(k):
        through = distance[:, None] + move
        best = through.argmin(axis=0)
        reached = through[best, np.arange(k)]
        better = reached < distance - 1e-9 * np.abs(np.where(np.isfinite(distance), distance, 0)) - 1e-12
        if not better.any():
            break
        distance = np.where(better, reached, distance)
        before = np.where(better, best, before)
    at = int(np.argmin(np.where(sink, distance, np.inf)))
    path = [at]
    while before[at] >= 0 and len(path) <= k:
        at = int(before[at])
        path.append(at)
    if len(set(path)) == len(path) > 1 and source[path[-1]]:
        return path[::-1]
    direct = np.where(source[:, None] & sink, move, np.inf)  # a circle, by rounding: one step always leads on
    return [int(n) for n in np.unravel_index(int(direct.argmin()), direct.shape)]


# k-means ----------------------------------------------------------------------------------------------


def inertia(points: Floats, labels: Labels) -> float:
    """Sum of squared distances of points (n, d) to the means of their groups."""
    k = int(labels.max()) + 1
    counts = np.maximum(np.bincount(labels, minlength=k), 1)
    means = _sums(points, labels, k) / counts[:, None]
    return sum(float(((points[rows] - means[labels[rows]]).astype(np.float64) ** 2).sum()) for rows in blocks(len(points)))


def blocks(n: int, size: int = 1024) -> list[slice]:
    """0..n in slices of at most that size."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def distances(points: Floats, means: Floats) -> Floats:
    """Squared distances of points (n, d) to means (k, d), less the points' own squares: float32 (n, k).

    By torch, whose products do not depend on how the memory lies: NumPy's may take three times as long.
    """
    found = torch.from_numpy(points) @ torch.from_numpy(np.ascontiguousarray(-2 * means.T))
    return found.numpy() + (means**2).sum(axis=1)


def _sums(points: Floats, labels: Labels, k: int) -> Floats:
    """Sum of the points of each group: (k, d)."""
    n = len(points)
    chosen = sparse.csr_array((np.ones(n, dtype=points.dtype), (labels, np.arange(n))), shape=(k, n))
    return np.asarray(chosen @ points)


def seeds(points: Floats, k: int, rng: np.random.Generator) -> Floats:
    """k starting means, spread out (k-means++ with the best of some candidates; Arthur & Vassilvitskii, 2007)."""
    n = len(points)
    square = np.einsum("nd,nd->n", points, points)
    chosen = [int(rng.integers(n))]
    nearest = np.maximum(square + square[chosen[0]] - 2 * points @ points[chosen[0]], 0).astype(np.float64)
    candidates = 2 + int(math.log(k))
    for _ in range(k - 1):
        total = nearest.sum()
        if total > 0:
            picks = np.minimum(np.searchsorted(np.cumsum(nearest), rng.random(candidates) * total), n - 1)
        else:
            picks = rng.integers(n, size=candidates)
        distance = np.maximum(square[:, None] + square[picks] - 2 * points @ points[picks].T, 0)
        distance = np.minimum(distance, nearest[:, None])
        best = int(distance.sum(axis=0).argmin())
        chosen.append(int(picks[best]))
        nearest = distance[:, best].astype(np.float64)
    return points[chosen]


def kmeans(points: Floats, k: int, rng: np.random.Generator, iterations: int = 50, start: Floats | None = None) -> Labels:
    """Balanced k-means: k groups of n/k points each, at a small sum of squared distances to their means.

    Lloyd's two steps, with the exact balanced `assign` in place of the nearest mean, then exchanges of two points between
    groups while they help.

    Args:
        points: (n, d).
        k: number of groups, a divisor of n.
        rng: for the start.
        iterations: at most so many.
        start: (k, d), means to start from.

    Returns:
        The group of each point, (n,).
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    n = len(points)
    if k in (1, n):
        return np.arange(n, dtype=np.int64) % k
    means = seeds(points, k, rng) if start is None else start.astype(np.float32)
    labels, prices = np.full(n, -1, dtype=np.int64), None
    best = math.inf
    for _ in range(iterations):
        cost = distances(points, means)
        new, prices = assign(cost, prices)
        means = (_sums(points, new, k) * (k / n)).astype(np.float32)
        value = -float((means.astype(np.float64) ** 2).sum())
        if value > best - 1e-7 * abs(best):
            labels = new if value < best else labels
            break
        labels, best = new, value
    own = np.einsum("nd,nd->n", points, points)
    return exchange(lambda one: _sums(points, one, k) @ points.T, labels, lambda i, j: points[i] @ points[j].T, own)


# graphs -----------------------------------------------------------------------------------------------


def exchange(
    towards: Callable[[Labels], Floats],
    labels: Labels,
    between: Callable[[Any, Any], Floats],
    own: Floats | None = None,
    sweeps: int = 10,
) -> Labels:
    """Exchange members of equal groups while the affinity within groups rises (Kernighan & Lin, 1970).

    Args:
        towards: labels -> (k, n), the summed affinity of each group to each member.
        labels: (n,), groups of equal size.
        between: a member and an index array (a,) -> (a,) affinities.
        own: (n,), the affinity of each member with itself, where `towards` counts it.
        sweeps: at most so many rounds; in each, every member is exchanged at most once.

    Returns:
        The group of each member, (n,).
    """
    labels = labels.copy()
    n = len(labels)
    sums = towards(labels)
    for _ in range(sweeps):
        gain = sums - sums[labels, np.arange(n)] + (0 if own is None else own)  # of going to another group, by itself
        moved = _pairs(gain, labels, between)
        if not moved:
            break
        value, before = _within(sums, labels), labels.copy()
        for i, j in moved:
            labels[i], labels[j] = labels[j], labels[i]
        sums = towards(labels)
        if _within(sums, labels) <= value * (1 + 1e-9):
            i, j = moved[0]  # many at once got into each other's way: the best alone is sure to help
            labels = before
            labels[i], labels[j] = labels[j], labels[i]
            sums = towards(labels)
    return labels


def _within(sums: Floats, labels: Labels) -> float:
    return float(sums[labels, np.arange(len(labels))].sum())


def _pairs(gain: Floats, labels: Labels, between: Callable[[Any, Any], Floats]) -> list[tuple[int, int]]:
    """Exchanges that help, best first, no member in two of them."""
    wish = gain.copy()
    wish[labels, np.arange(len(labels))] = -np.inf
    found: list[tuple[float, int, int]] = []
    for i in np.argsort(-wish.max(axis=0), kind="stable")[: max(64, len(labels) // 8)]:
        b = int(wish[:, i].argmax())
        partners = np.flatnonzero(labels == b)
        both = gain[b, i] + gain[labels[i], partners] - 2 * between(i, partners)
        best = int(both.argmax())
        if both[best] > 1e-6 * abs(float(gain[b, i])) + 1e-12:
            found.append((-float(both[best]), int(i), int(partners[best])))
    used: set[int] = set()
    chosen: list[tuple[int, int]] = []
    for _, i, j in sorted(found):
        if i not in used and j not in used:
            chosen.append((i, j))
            used |= {i, j}
    return chosen


def parts(weights: Any, k: int, embedding: Floats, rng: np.random.Generator, sweeps: int = 20) -> Labels:
    """Balanced parts of a graph: k groups of n/k nodes with much weight within.

    Starts from balanced k-means of a spectral embedding, then reassigns all nodes at once by their summed weight to each
    group while that helps (balanced kernel k-means; Dhillon, Guan & Kulis, 2007), then exchanges pairs.

    Args:
        weights: (n, n) array or scipy sparse array, symmetric, zero on the diagonal.
        k: number of groups, a divisor of n.
        embedding: (n, dims), coordinates that bring connected nodes together.
        rng: for the start.
        sweeps: at most so many reassignments.
    """
    n = len(embedding)
    if k in (1, n):
        return np.arange(n, dtype=np.int64) % k

    def towards(labels: Labels) -> Floats:
        chosen = np.zeros((n, k), dtype=np.float32)
        chosen[np.arange(n), labels] = 1
        return np.asarray(weights @ chosen).T

    def between(i: Any, j: Any) -> Floats:
        row = weights[[i]].toarray()[0] if sparse.issparse(weights) else weights[i]
        return cast("Floats", row[j])

    labels = kmeans(embedding, k, rng, iterations=20)
    sums, prices = towards(labels), None
    for _ in range(sweeps):
        new, prices = assign(-sums.T, prices)
        new_sums = towards(new)
        if _within(new_sums, new) <= _within(sums, labels) * (1 + 1e-6):
            break
        labels, sums = new, new_sums
    return exchange(towards, labels, between)
