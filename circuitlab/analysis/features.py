"""What the co-firing of random features of a block's own inputs looks like: the control that knows the inputs.

Inputs that fall into groups make *any* features of them fire in groups. So what is modular about neurons is what they show
beyond random neurons that read the same inputs. Of a sample of positions it is known what the block read and which neurons
fired. A control has keys (and gates) of random directions about the mean direction of the real ones, with the lengths and
biases that these have, and the same activation. Its neurons fire at the same rates: it is dealt the real rates in the order of
its own, and each neuron fires at so many of its strongest positions. The score of the real neurons and those of the controls
are of the same positions, so that neurons of an untrained network are one more draw.

The directions are isotropic, as those of an initialised network are. The spread of the real keys is not kept: that training
turned them towards directions in which inputs differ is a part of what is asked for. What all of them have in common is
kept: it makes no modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitlab.analysis import affinity
from circuitlab.analysis.balanced import blocks

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
_AGREE = 0.995
"""Part of (position, neuron) pairs whose firing the keys have to explain."""
_FEWEST = 64
"""Positions."""
_PAIRS = 200_000
_GRID = 4096


@dataclass(frozen=True, eq=False)
class Features:
    """Neurons on a sample of their inputs: evidence, as in `circuitlab.analysis.null`.

    Attributes:
        inputs: (sample, inputs).
        fires: (neurons, sample).
        keys: (neurons, inputs), bias: (neurons,); the same of the other map of a gated block, or None.
        threshold: a neuron fires where ``|h|`` is above it.
        response: how the activation answers.
        graph: signed phi, firing counts, positions -> what methods work on.
    """

    inputs: Floats
    fires: Bools
    keys: Floats
    bias: Floats
    ups: Floats | None
    up_bias: Floats | None
    threshold: float
    response: Response
    graph: Callable[[Floats, Floats, int], Any]

    def _weights(self, fires: Bools) -> Any:
        hot = fires.astype(np.float32)
        together = hot @ hot.T
        firing = together.diagonal().astype(np.float64)
        return self.graph(affinity.phi(together, firing, fires.shape[1]), firing, fires.shape[1])

    @property
    def weights(self) -> Any:
        return self._weights(self.fires)

    @property
    def trial(self) -> Features:
        return self

    @property
    def controls(self) -> Mapping[str, Callable[[np.random.Generator], Any]]:
        return {"random keys on the same inputs": lambda rng: self._weights(self.drawn(rng))}

    def drawn(self, rng: np.random.Generator) -> Bools:
        """Firing (neurons, sample) of random keys."""
        keys = _random(self.keys, rng)
        ups = None if self.ups is None else _random(self.ups, rng)
        strength = np.empty(self.fires.shape, dtype=np.float32)
        own = np.empty(len(keys))
        for rows in blocks(len(keys)):
            pre = keys[rows] @ self.inputs.T + self.bias[rows, None]
            up = None if ups is None or self.up_bias is None else ups[rows] @ self.inputs.T + self.up_bias[rows, None]
            strength[rows] = self.response.strength(pre, up)
            own[rows] = self.response.fires(strength[rows], self.threshold).sum(axis=1) + 1e-9 * strength[rows].mean(axis=1)
        counts = np.empty(len(keys), dtype=np.int64)
        counts[np.argsort(own, kind="stable")] = np.sort(self.fires.sum(axis=1))
        n = self.fires.shape[1]
        out = np.zeros(self.fires.shape, dtype=np.bool_)
        for rows in blocks(len(keys)):
            ranked = np.sort(strength[rows], axis=1)
            count = counts[rows]
            edge = ranked[np.arange(len(count)), np.minimum(n - count, n - 1)]
            out[rows] = (strength[rows] >= edge[:, None]) & (count > 0)[:, None]
        return out

    def part(self, members: NDArray[np.int64]) -> Features:
        return replace(
            self, fires=self.fires[members], keys=self.keys[members], bias=self.bias[members],
            ups=None if self.ups is None else self.ups[members], up_bias=None if self.up_bias is None else self.up_bias[members],
        )


def features(stats: Any, graph: Callable[[Floats, Floats, int], Any]) -> Features | None:
    """The neurons of a wire on the sample of their inputs.

    Args:
        stats: of a wire.
        graph: as `Features` has it.

    Returns:
        None if there is no sample, or if keys, activation and inputs do not explain which neurons fire: there are
        adapters, scales or several maps between.
    """
    sample = getattr(stats, "sample", None)
    if sample is None or sample.inputs.shape[1] != stats.keys.shape[1] or len(sample.inputs) < _FEWEST:
        return None
    keys = np.asarray(affinity.array(stats.keys), dtype=np.float32)
    inputs, hidden = sample.inputs.numpy(), sample.hidden.numpy()
    fires = np.abs(hidden) > stats.threshold
    ups = None if sample.ups is None else np.asarray(affinity.array(sample.ups), dtype=np.float32)
    bias, up_bias = sample.bias.numpy(), None if sample.up_bias is None else sample.up_bias.numpy()
    rng = np.random.default_rng(0)
    at, neuron = rng.integers(len(inputs), size=_PAIRS), rng.integers(len(keys), size=_PAIRS)
    pre = _product(inputs, keys, bias, at, neuron)
    up = None if ups is None or up_bias is None else _product(inputs, ups, up_bias, at, neuron)
    response = Response.of(pre, up, hidden[at, neuron], stats.threshold)
    if np.mean(response.fires(response.strength(pre, up), stats.threshold) == fires[at, neuron]) < _AGREE:
        return None
    return Features(inputs, fires.T.copy(), keys, bias, ups, up_bias, stats.threshold, response, graph)


def _product(inputs: Floats, keys: Floats, bias: Floats, at: NDArray[np.int64], neuron: NDArray[np.int64]) -> Floats:
    """Pre-activations of pairs (position, neuron)."""
    return np.concatenate([np.einsum("pd,pd->p", inputs[at[p]], keys[neuron[p]]) for p in blocks(len(at), 8192)]) + bias[neuron]


def _random(rows: Floats, rng: np.random.Generator) -> Floats:
    """Rows of the same lengths in random directions about the mean direction of these."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    mean = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0).mean(axis=0)
    new = rng.standard_normal(rows.shape, dtype=np.float32)
    new *= np.sqrt(max(0.0, 1 - float(mean @ mean)) / rows.shape[1])
    new += mean
    return new * (length / np.maximum(np.linalg.norm(new, axis=1, keepdims=True), 1e-12))


@dataclass(frozen=True, eq=False)
class Response:
    """How a neuron answers to its pre-activation, read off pairs of both; nobody names the activation.

    Attributes:
        start, step: of a grid of pre-activations.
        values: (grid,), the activation there; empty where a neuron simply fires above an edge.
        edge: that pre-activation.
    """

    start: float
    step: float
    values: Floats
    edge: float

    @classmethod
    def of(cls, pre: Floats, up: Floats | None, hidden: Floats, threshold: float) -> Response:
        """Of pre-activations (pairs,), products of the other map or None, and values of the wire."""
        if up is None:
            order = np.argsort(pre)
            fires = (np.abs(hidden) > threshold)[order]
            wrong = np.concatenate([[0], np.cumsum(fires)]) + np.concatenate([np.cumsum(~fires[::-1])[::-1], [0]])
            best = int(wrong.argmin())
            if wrong[best] <= (1 - _AGREE) * len(pre):
                at = pre[order[best - 1 : best + 1]] if 0 < best < len(pre) else pre[order[[min(best, len(pre) - 1)]]]
                return cls(0.0, 1.0, np.zeros(0), float(at.mean()))
            answer = hidden
        else:
            strong = np.abs(up) > np.median(np.abs(up))
            pre, answer = pre[strong], hidden[strong] / up[strong]
        order = np.argsort(pre)
        pieces = np.array_split(order, min(_GRID, max(2, len(order) // 8)))
        x, y = (np.array([float(values[piece].mean()) for piece in pieces]) for values in (pre, answer))
        grid = np.linspace(x[0], x[-1], _GRID)
        return cls(float(grid[0]), float(grid[1] - grid[0]) or 1.0, np.interp(grid, x, y).astype(np.float32), 0.0)

    def strength(self, pre: Floats, up: Floats | None) -> Floats:
        """What decides where a neuron fires first, in order; below zero where its value is zero."""
        if not len(self.values):
            return pre
        at = (pre - self.start) / self.step
        low = np.clip(at.astype(np.int64), 0, len(self.values) - 2)
        value = self.values[low] + (at - low) * (self.values[low + 1] - self.values[low])
        size = np.abs(value if up is None else value * up)
        return np.where(size > 0, size, np.minimum(pre - pre.max(), -1e-6)).astype(np.float32)

    def fires(self, strength: Floats, threshold: float) -> Bools:
        """Whether neurons of this strength fire."""
        return strength > (threshold if len(self.values) else self.edge)
