"""A random network with the firing rates, and the directions of activity, of a measured one.

In a random network each neuron reads a random direction of its input. Its neurons are correlated all the same, by geometry:
there are fewer directions than neurons, and some are stronger than others. So independent neurons are too weak a control.
`Surrogate` takes from the measured phi only its spectrum and draws neurons with random directions in a space of that
spectrum (a single Gaussian cloud, as in SigClust: Liu, Hayes, Nobel & Marron, 2008). Firing is a thresholded
Gaussian (Emrich & Piedmonte, 1991; Macke et al., 2009), so each neuron keeps its own rate:

1. phi is turned into latent correlations R by the tetrachoric series phi = sum_k a_k(i) a_k(j) R^k, where
   a_k = He_{k-1}(t) φ(t) / sqrt(p (1-p) k!) at the threshold t of rate p.
2. The eigenvalues of R, weighted by a_1, that stand above the sampling noise 2 sqrt(f/n) are freed of it (Baik, Ben Arous
   & Péché; Benaych-Georges & Nadakuditi, 2011). The diagonal, which is not known, is the share that the directions explain.
3. Each draw gives every neuron a random direction with these variances; the mean direction is kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from circuitlab.analysis.balanced import blocks

Floats = NDArray[np.floating[Any]]
_TERMS = 12


def series(rate: Floats, terms: int = _TERMS) -> Floats:
    """The factors a_k of the tetrachoric series, (terms, f), for firing rates strictly between 0 and 1."""
    t = -ndtri(rate)
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi * rate * (1 - rate))
    polynomials = [np.ones_like(t), t]
    for k in range(2, terms):
        polynomials.append(t * polynomials[-1] - (k - 1) * polynomials[-2])
    return np.stack([polynomials[k - 1] * density / math.sqrt(math.factorial(k)) for k in range(1, terms + 1)])


def indicator(latent: Floats, left: Floats, right: Floats) -> Floats:
    """phi of two thresholded Gaussians, by the series: latent (a, b), left (terms, a), right (terms, b)."""
    out = np.zeros_like(latent)
    for k in range(len(left) - 1, -1, -1):  # Horner
        out += left[k][:, None] * right[k]
        out *= latent
    return out


def latent(correlation: Floats, factors: Floats, rounds: int = 6) -> Floats:
    """Latent correlations (f, f) from phi, Newton's method on the series; zero on the diagonal."""
    out = np.empty(correlation.shape)
    slope = factors[1:] * np.sqrt(np.arange(2, len(factors) + 1))[:, None]
    for rows in blocks(len(correlation), 256):
        target = correlation[rows].astype(np.float64)
        first = factors[0][rows, None] * factors[0]
        value = np.clip(target / first, -0.95, 0.95)
        for _ in range(rounds):
            off = indicator(value, factors[:, rows], factors) - target
            steep = first + indicator(value, slope[:, rows], slope)
            value = np.clip(value - off / np.maximum(steep, 0.3 * first), -0.98, 0.98)
        out[rows] = value
    np.fill_diagonal(out, 0)
    return out


def spread_before(variances: Floats) -> Floats:
    """Variances of a Gaussian cloud which, after each point is brought to equal length, has the given ones."""
    if len(variances) < 2:
        return variances
    squares = np.random.default_rng(0).standard_normal((2000, len(variances)), dtype=np.float32) ** 2
    wanted, guess = variances / variances.sum(), variances.astype(np.float64)
    for _ in range(30):
        parts = squares * guess.astype(np.float32)
        parts /= parts.sum(axis=1, keepdims=True)
        guess = guess * np.clip(wanted / np.maximum(parts.mean(axis=0), 1e-12), 0.5, 2)
    return guess * (variances.sum() / guess.sum())


class Directions:
    """Draws random directions for f neurons with the spectrum of a weighted correlation matrix.

    Args:
        matrix: (f, f), a_i a_j R_ij off the diagonal; the diagonal is not read.
        strength: (f,), the a_i.
        noise: variance of the entries' sampling noise.
        share: what part of each neuron's variance the directions explain; None where that is to be found.
    """

    def __init__(self, matrix: Floats, strength: Floats, noise: float, share: float | None = None) -> None:
        n, total = len(strength), float((strength**2).sum())
        off = matrix.copy()
        np.fill_diagonal(off, 0)
        energy = max(0.0, float((off**2).sum()) - n * (n - 1) * noise)
        values, vectors = np.linalg.eigh(off)
        edge = 2 * math.sqrt(n * noise)
        kept, variances = np.zeros(n, dtype=bool), np.zeros(0)
        found = 0.0 if share is None else share
        for _ in range(100):
            raised = values + found * total / n
            kept = raised > max(edge * 1.05, 1e-9)
            raised = raised[kept]
            variances = (raised + np.sqrt(np.maximum(raised**2 - 4 * n * noise, 0))) / 2
            new = min(1.0, float(variances.sum()) / total)
            if share is not None or abs(new - found) < 1e-4:
                break
            found = new
        missing = max(0.0, energy - (float((variances**2).sum()) - float(variances.sum()) ** 2 / n))
        hidden = 0  # directions too weak to be seen one by one, as strong as that allows
        if edge > 0:
            hidden = int(min(missing / (edge / 2) ** 2, n // 2, max(0.0, total - float(variances.sum())) / (edge / 2)))
        widths = spread_before(np.concatenate([variances, np.full(hidden, edge / 2)]))
        mean = strength / math.sqrt(total)
        along = mean @ vectors[:, kept]
        across = vectors[:, kept] - np.outer(mean, along)
        square, turn = np.linalg.eigh(across.T @ across)
        root = (turn * np.sqrt(np.maximum(square, 0))) @ turn.T
        seen = np.sqrt(widths[: len(along)])
        self.mean = mean
        self.offset = np.concatenate([along * seen, np.zeros(hidden)]) / math.sqrt(total)
        self.shape = math.sqrt(n / total) * np.sqrt(np.concatenate([seen**2, widths[len(along) :]]))
        self.root = root
        self.share = min(1.0, float(widths.sum()) / total)

    def __call__(self, rng: np.random.Generator) -> Floats:
        """Loadings (f, directions) whose rows have squared length `share`."""
        n, dims, seen = len(self.mean), len(self.offset), len(self.root)
        if not dims:
            return np.zeros((n, 0), dtype=np.float32)
        random = rng.standard_normal((n, dims))
        random -= np.outer(self.mean, self.mean @ random)
        random = np.linalg.qr(random)[0] if dims < n else random / math.sqrt(n)
        random[:, :seen] = random[:, :seen] @ self.root
        rows = self.offset + random * self.shape
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows * (math.sqrt(self.share) / np.maximum(length, 1e-12))).astype(np.float32)


class Surrogate:
    """Draws signed phi (f, f) of random networks. All neurons must fire at times and rest at times.

    Args:
        correlation: (f, f), signed phi as measured.
        firing: (f,), firing counts.
        n: positions.
    """

    def __init__(self, correlation: Floats, firing: Floats, n: int) -> None:
        self.n, self.firing = n, firing
        self.factors = series(firing / n)
        strength = self.factors[0]
        weighted = latent(correlation, self.factors)
        weighted *= strength[:, None]
        weighted *= strength
        self.directions = Directions(weighted, strength, 1 / n)

    def __call__(self, rng: np.random.Generator) -> Floats:
        rows = self.directions(rng)
        if self.n <= max(4096, 4 * len(rows)):
            return simulated(rows, self.firing, self.n, rng)
        out = np.empty((len(rows), len(rows)), dtype=np.float32)
        factors = self.factors.astype(np.float32)
        for part in blocks(len(rows)):
            out[part] = indicator(rows[part] @ rows.T, factors[:, part], factors)
            out[part] += rng.standard_normal((part.stop - part.start, len(rows)), dtype=np.float32) / math.sqrt(self.n)
        return mirrored(out)


def mirrored(matrix: Floats) -> Floats:
    """The upper triangle, mirrored in place; zero on the diagonal."""
    for rows in blocks(len(matrix)):
        inner = matrix[rows, rows]
        matrix[rows, rows] = np.triu(inner, 1) + np.triu(inner, 1).T
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T
    return matrix


def simulated(rows: Floats, firing: Floats, n: int, rng: np.random.Generator) -> Floats:
    """phi (f, f) of neurons with these loadings (f, dims) over n positions, each firing exactly as often as it did."""
    from circuitlab.analysis.affinity import phi

    f = len(rows)
    rest = np.sqrt(np.maximum(1 - (rows**2).sum(axis=1), 0)).astype(np.float32)
    fires = np.empty((f, n), dtype=np.float32)
    drive = rng.standard_normal((rows.shape[1], n), dtype=np.float32)
    for part in blocks(f, 256):
        level = rows[part] @ drive
        level += rng.standard_normal(level.shape, dtype=np.float32) * rest[part, None]
        ranks = level.argsort(axis=1)
        block = np.zeros(level.shape, dtype=np.float32)
        for i, count in enumerate(firing[part].astype(np.int64)):
            block[i, ranks[i, n - count :]] = 1
        fires[part] = block
    return phi(fires @ fires.T, firing, n)
