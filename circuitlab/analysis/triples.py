"""Three neurons that fire together more, or less, often than their pairs say.

Pairs may tell everything about a group of neurons, or not: if one fires exactly where one of two others does alone (XOR),
no pair shows anything. Against the data stands the distribution of greatest entropy that has the same firing and
co-firing rates (Schneidman, Still, Berry & Bialek, *Network information and connected correlations*, 2003). For three
neurons it is the one 2 x 2 x 2 table with the observed pair margins and no third-order log-linear term,

    p111 p100 p010 p001 = p110 p101 p011 p000        (Bartlett, 1935)

which has one unknown, p111, and is solved exactly. What is tested is d = observed - expected number of joint firings.
Its spread is *not* taken from the number of positions: positions of one document depend on each other, and pretending
otherwise makes everything significant. Examples are dealt at random into blocks, each block gives its own d (by the
efficient score, to first order), and d over its standard error across blocks is Student's t. The p-values are then
corrected for the number of triples (Benjamini & Hochberg, 1995). The test is independent of what the pairs show, so
choosing candidates by their pairs does not bias it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis.results import Result
from circuitlab.errors import InputError

MOST = 256
"""Candidates: 2.8 million triples."""
FEWEST_BLOCKS = 8
_SIGNS = np.array([1, -1, -1, -1, 1, 1, 1, -1])  # of the cells 111, 110, 101, 011, 100, 010, 001, 000


@dataclass(frozen=True, eq=False)
class Triples(Result):
    """Triples of neurons, the most surprising first.

    Attributes:
        neurons: (t, 3), rising within a triple.
        count: (t,) at how many positions all three fired.
        expected: (t,) the same by the pairs alone.
        interaction: (t,) third-order log-linear term in nats (a log ratio of odds ratios), with 1/2 added to each cell.
        bits: (t,) information per position that the pairs miss, D(observed || expected) in bits.
        statistic: (t,) Student's t of count - expected; nan where a cell of the table is too rare to test.
        pvalue: (t,) two-sided; nan where not tested.
        qvalue: (t,) the same after Benjamini and Hochberg's correction for all triples tested.
        candidates: (m,) the neurons of which all triples were counted.
        n: positions.
        examples: independent examples that the positions come from.
        blocks: into which the examples were dealt.
    """

    neurons: NDArray[np.int64]
    count: NDArray[np.int64]
    expected: NDArray[np.float64]
    interaction: NDArray[np.float64]
    bits: NDArray[np.float64]
    statistic: NDArray[np.float64]
    pvalue: NDArray[np.float64]
    qvalue: NDArray[np.float64]
    candidates: NDArray[np.int64]
    n: int
    examples: int
    blocks: int

    @property
    def tested(self) -> int:
        """Number of triples tested."""
        return int(np.isfinite(self.pvalue).sum())

    def __repr__(self) -> str:
        found = self.qvalue < 0.05
        more = int((found & (self.statistic > 0)).sum())
        verdict = f"{more} fire together more often than their pairs say, {int(found.sum()) - more} less" if found.any() else "pairs explain all"
        return (
            f"Triples: {len(self.candidates)} neurons, {self.tested:,} of {len(self.count):,} triples tested over {self.n:,} positions "
            f"of {self.examples:,} examples; at a false discovery rate of .05 {verdict}"
        )

    def plot(self, **options: Any) -> Any:
        """Counts against what pairs predict as a plotly Figure. See `circuitlab.plots.triples`."""
        return importlib.import_module("circuitlab.plots").triples(self, **options)

    def to_frame(self) -> Any:
        """A pandas DataFrame, a row for each triple: a, b, c, count, expected, interaction, bits, t, p, q."""
        import pandas as pd

        a, b, c = self.neurons.T
        return pd.DataFrame({
            "a": a, "b": b, "c": c, "count": self.count, "expected": self.expected, "interaction": self.interaction,
            "bits": self.bits, "t": self.statistic, "p": self.pvalue, "q": self.qvalue,
        })


def triples(
    firing: Any, candidates: int | Sequence[int] | NDArray[Any] | torch.Tensor = 48, *, blocks: int = 64, rarest: float = 5, seed: int = 0,
) -> Triples:
    """Test all triples of some neurons for what their pairs do not explain. Counts are exact.

    Args:
        firing: whether each neuron fires: a matrix (examples, neurons) whose rows are independent of each other, an array
            (examples, positions, neurons) of which only the first axis is so, or an iterable of either, batch by batch.
            Give documents as the latter: their positions are no independent examples.
        candidates: the neurons; or how many at most, and those with the strongest pairs are taken (the sum of |phi|), in a
            pass of its own. What shows in no pair, such as XOR, such a choice can miss.
        blocks: number of groups that examples are dealt into to measure spread; no more than there are examples are used.
        rarest: a triple is tested if each cell of its table is expected at least that often. This looks at the pairs alone.
        seed: of the dealing.

    Returns:
        The result. Cost: m³/2 multiplications a position, and 4 blocks m³/6 bytes, for m candidates.

    Raises:
        InputError: other than true and false (or 0 and 1), fewer than three candidates or more than 256, neurons that
            are not there, fewer than 8 examples, or batches that can be walked only once where they have to be twice.
    """
    if blocks < FEWEST_BLOCKS:
        raise InputError(f"blocks={blocks} is too few to measure spread by: at least {FEWEST_BLOCKS}")
    chosen = _candidates(firing, candidates)
    m = len(chosen)
    pairs = np.array(list(combinations(range(m), 2)))
    which = np.array(list(combinations(range(m), 3)))
    place = np.zeros((m, m), dtype=np.int64)
    place[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    sides = np.stack([place[which[:, i], which[:, j]] for i, j in ((0, 1), (0, 2), (1, 2))], axis=1)  # the pairs of a triple
    flat = torch.from_numpy(sides[:, 0] * m + which[:, 2])
    total = np.zeros(blocks, dtype=np.int64)
    ones = np.zeros((blocks, m), dtype=np.int64)
    twos = np.zeros((blocks, len(pairs)), dtype=np.int64)
    threes = np.zeros((blocks, len(which)), dtype=np.int32)
    first, second = (torch.from_numpy(pairs[:, side].copy()) for side in (0, 1))
    rng = np.random.default_rng(seed)
    examples = 0
    for batch in _batches(firing):
        columns = batch[..., torch.from_numpy(chosen).to(batch.device)]
        dealt = (rng.permutation(len(batch)) + examples) % blocks
        examples += len(batch)
        for block in np.unique(dealt):
            members = columns[torch.from_numpy(np.flatnonzero(dealt == block)).to(batch.device)].reshape(-1, m)
            total[block] += len(members)
            for rows in members.split(max(1, 2**26 // len(pairs))):  # exact in float32: far below 2^24 rows
                fired = rows.float()
                both = fired[:, first] * fired[:, second]
                ones[block] += fired.sum(0).long().cpu().numpy()
                twos[block] += both.sum(0).long().cpu().numpy()
                threes[block] += (both.T @ fired).flatten().cpu()[flat].int().numpy()
    used = total > 0
    if used.sum() < FEWEST_BLOCKS:
        raise InputError(
            f"{examples} independent examples are too few to test by: at least {FEWEST_BLOCKS}; an array of three axes has "
            "examples, positions and neurons, and a matrix has examples and neurons"
        )
    counted = _Counts(total[used], ones[used], twos[used], threes[used])
    parts = [counted.test(which[part], sides[part], part, rarest) for part in _parts(len(which), int(used.sum()))]
    count, expected, interaction, bits, statistic, pvalue = (np.concatenate(column) for column in zip(*parts, strict=True))
    qvalue = np.full(len(which), np.nan)
    tested = np.isfinite(pvalue)
    if tested.any():
        from scipy.stats import false_discovery_control

        qvalue[tested] = false_discovery_control(pvalue[tested])
    order = np.lexsort((np.arange(len(which)), -np.abs(statistic), pvalue))  # nan last
    return Triples(
        chosen[which[order]], count[order], expected[order], interaction[order], bits[order], statistic[order], pvalue[order],
        qvalue[order], chosen, int(total.sum()), examples, int(used.sum()),
    )


def _parts(count: int, blocks: int) -> Iterator[slice]:
    step = max(1, 2**22 // blocks)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@dataclass(frozen=True, eq=False)
class _Counts:
    """Counts by block: positions (b,), firings (b, m), pairs (b, m(m-1)/2), triples (b, t)."""

    total: NDArray[np.int64]
    ones: NDArray[np.int64]
    twos: NDArray[np.int64]
    threes: NDArray[np.int32]

    def test(self, which: NDArray[np.int64], sides: NDArray[np.int64], part: slice, rarest: float) -> tuple[NDArray[Any], ...]:
        """Count, expected, interaction, bits, t and p of some triples."""
        from scipy.stats import t as student

        each = self.ones[:, which.T].transpose(1, 0, 2)  # (3, b, t): of i, j, k
        two = self.twos[:, sides.T].transpose(1, 0, 2)  # of ij, ik, jk
        three = self.threes[:, part].astype(np.int64)
        cells = _cells(three, two, each, self.total[:, None])  # (8, b, t)
        whole = cells.sum(axis=1)
        low, high = _range(two.sum(axis=1), each.sum(axis=1), int(self.total.sum()))
        joint = _solve(low, high, two.sum(axis=1), each.sum(axis=1), int(self.total.sum()))
        fitted = _cells(joint, two.sum(axis=1), each.sum(axis=1), int(self.total.sum()))
        able = (fitted.min(axis=0) >= rarest) & (high > low)
        safe = np.where(able, fitted, 1.0)
        score = _SIGNS[:, None] / safe / (1 / safe).sum(axis=0)
        blockwise = np.einsum("cbt,ct->bt", cells.astype(np.float64), score)  # sums to count - expected over blocks
        error = np.sqrt(len(self.total) * blockwise.var(axis=0, ddof=1))
        difference = whole[0] - joint
        able &= error > 0
        statistic = np.divide(difference, error, out=np.full(len(joint), np.nan), where=able)
        pvalue = 2 * student.sf(np.abs(statistic), len(self.total) - 1)
        interaction = (_SIGNS[:, None] * np.log(whole + 0.5)).sum(axis=0)
        ratio = np.divide(whole, fitted, out=np.ones_like(fitted), where=(whole > 0) & (fitted > 0))
        bits = (whole * np.log2(ratio)).sum(axis=0) / self.total.sum()
        return whole[0], joint, interaction, np.maximum(bits, 0), statistic, pvalue


def _cells(three: Any, two: Any, one: Any, total: Any) -> NDArray[Any]:
    """The 2 x 2 x 2 table, cells first: 111, 110, 101, 011, 100, 010, 001, 000."""
    ij, ik, jk = two
    i, j, k = one
    return np.stack([
        three, ij - three, ik - three, jk - three, i - ij - ik + three, j - ij - jk + three, k - ik - jk + three,
        total - i - j - k + ij + ik + jk - three,
    ])


def _range(two: Any, one: Any, total: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Between which numbers of joint firings no cell is negative."""
    ij, ik, jk = two
    i, j, k = one
    low = np.maximum.reduce([np.zeros_like(i), ij + ik - i, ij + jk - j, ik + jk - k])
    high = np.minimum.reduce([ij, ik, jk, total - i - j - k + ij + ik + jk])
    return low.astype(np.float64), high.astype(np.float64)


def _solve(low: Any, high: Any, two: Any, one: Any, total: int) -> NDArray[np.float64]:
    """The number of joint firings at which the third-order term is zero: it rises with that number, so halve the range."""
    low, high = low.copy(), high.copy()
    for _ in range(60):
        middle = (low + high) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            above = (_SIGNS[:, None] * np.log(_cells(middle, two, one, total))).sum(axis=0) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


# what is given ----------------------------------------------------------------------------------------


def _batches(firing: Any) -> Iterator[torch.Tensor]:
    """Boolean tensors, (examples, positions, neurons) or (examples, neurons), all of as many neurons."""
    size = None
    for number, batch in enumerate([firing] if hasattr(firing, "ndim") else firing):
        tensor = batch.detach() if isinstance(batch, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(batch))
        if tensor.ndim not in (2, 3):
            raise InputError(
                f"firing has shape {tuple(tensor.shape)} in batch {number}: it must be (examples, neurons), or (examples, positions, neurons)"
            )
        if tensor.dtype != torch.bool:
            if not ((tensor == 0) | (tensor == 1)).all():
                raise InputError(f"firing must be true or false, and batch {number} holds other numbers: give h > threshold")
            tensor = tensor.bool()
        size = tensor.shape[-1] if size is None else size
        if tensor.shape[-1] != size:
            raise InputError(f"firing has {tensor.shape[-1]} neurons in batch {number}, and {size} before")
        yield tensor
    if size is None:
        raise InputError("firing is empty: there is nothing to count")


def _candidates(firing: Any, candidates: Any) -> NDArray[np.int64]:
    """The neurons to count triples of, rising."""
    if not hasattr(firing, "ndim") and not isinstance(firing, Iterable):
        raise InputError(f"firing must be an array, or something that yields arrays, and is a {type(firing).__name__}")
    if isinstance(candidates, (int, np.integer)):
        if isinstance(firing, Iterator):
            raise InputError(
                f"candidates={candidates} are chosen in a pass of its own, and firing is a {type(firing).__name__}, which can be walked only "
                "once: give a list of batches, or the neurons themselves as candidates"
            )
        return _strongest(firing, int(candidates))
    chosen = np.asarray(candidates.cpu() if isinstance(candidates, torch.Tensor) else candidates)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or len(np.unique(chosen)) != len(chosen):
        raise InputError("candidates must be a number, or a list of neurons, each once")
    _within(len(chosen))
    if not isinstance(firing, Iterator):
        size = next(_batches(firing)).shape[-1]
        if chosen.min() < 0 or chosen.max() >= size:
            raise InputError(f"candidates go from {chosen.min()} to {chosen.max()}, and there are {size} neurons, counted from 0")
    return np.sort(chosen).astype(np.int64)


def _within(count: int) -> None:
    if not 3 <= count <= MOST:
        raise InputError(f"{count} candidates: triples need at least 3, and more than {MOST} are {math.comb(max(count, 3), 3):,} triples")


def _strongest(firing: Any, count: int) -> NDArray[np.int64]:
    """The neurons with the largest sum of |phi| with all others, rising."""
    _within(count)
    together: Any = 0
    n = 0
    for batch in _batches(firing):
        for rows in batch.flatten(0, -2).split(2**16):
            fired = rows.float()
            together = together + (fired.T @ fired).double().cpu()
            n += len(rows)
    rate = np.asarray(together.diagonal()) / n
    _within(min(count, len(rate)))
    spread = np.sqrt(rate * (1 - rate))
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    phi = np.abs((together.numpy() / n - np.outer(rate, rate)) * np.outer(scale, scale))
    np.fill_diagonal(phi, 0)
    strength = cast("NDArray[np.float64]", phi.sum(axis=0)).round(12)
    return np.sort(np.lexsort((np.arange(len(rate)), -strength))[:count])
