"""Aligning one set of arrays with another by permuting named axes: coordinate descent over wires.

An `Alignment` maximises Σ ⟨A, B permuted⟩ over pairs of arrays, which minimises the distance between them (Ainsworth et
al., *Git Re-Basin*, 2023, Algorithm 1). One wire at a time is matched while the others stay: a matrix product and a
linear assignment. A wire within others has an assignment for each index of those. A wire that has others within (heads
with their entries) is matched by what the best matching inside each pair of its indices would give, so heads are not
judged by the order that their entries happen to have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Element = dict[str, torch.Tensor]
Scores = NDArray[np.float64]

PAIRS = 2e10
"""Σ n³ of the assignments within all pairs of outer indices, up to which each is solved; beyond, pairs are judged by bounds."""
CELLS = 1 << 24
"""Numbers of a score matrix that are in memory at once, where that can be chosen."""

HOPE = 10
"""A start is given up when it is further below the best than this many times the gain of its last sweep."""


@dataclass
class Term:
    """A pair of arrays: ``a`` stays, ``b`` is as permuted up to now. ``axes`` are wires, and "" for what never moves."""

    a: torch.Tensor
    b: torch.Tensor
    axes: tuple[str, ...]

    def value(self) -> float:
        """The inner product of the two."""
        return _dot(self.a, self.b)


class Alignment:
    """Arrays whose axes are wires, and the permutations of these wires that bring the second ones near to the first.

    Attributes:
        terms: pairs of arrays; ``b`` is replaced as wires are permuted, never written to.
        sizes: wire -> its size, of all wires on axes.
        within: wire -> those that it stands within, outermost first.
        movable: the wires to be matched.
        element: wire -> permutation up to now, as an element of `circuitlab.analysis.symmetry.Symmetry`.
        tolerance: gains up to this share of what a wire could gain at most count as none.
    """

    def __init__(
        self,
        terms: Iterable[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]],
        sizes: Mapping[str, int],
        within: Mapping[str, tuple[str, ...]],
        movable: Iterable[str],
        tolerance: float = 1e-7,
    ) -> None:
        self.terms = gathered(terms)
        self.sizes, self.within, self.tolerance = sizes, within, tolerance
        self.movable = tuple(movable)
        self.start = [term.b for term in self.terms]
        self.inner = {name: tuple(n for n in self.movable if name in within.get(n, ())) for name in self.movable}
        self.places = {
            name: [(term, axis) for term in self.terms for axis, wire in enumerate(term.axes) if wire == name] for name in self.movable
        }
        squares = [[_dot(side, side) for side in (term.a, term.b)] for term in self.terms]
        self.bound = sum(one + two for one, two in squares) / 2
        mine = {name: [pair for pair, term in zip(squares, self.terms, strict=True) if name in term.axes] for name in self.movable}
        self.norms = {name: math.sqrt(sum(one for one, _ in pairs) * sum(two for _, two in pairs)) for name, pairs in mine.items()}
        self.reset()

    # state --------------------------------------------------------------------------------------------

    def reset(self, element: Mapping[str, torch.Tensor] | None = None) -> None:
        """Start again, from an element; without one, from B as it was given."""
        for term, b in zip(self.terms, self.start, strict=True):
            term.b = b
        self.element: Element = {name: torch.arange(self.sizes[name], device="cpu").expand(self.shape(name)).clone() for name in self.movable}
        self.stale = set(self.movable)
        if element is not None:
            for name in self.order():
                self.permute(name, element[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a wire's permutation."""
        return tuple(self.sizes[other] for other in (*self.within.get(name, ()), name))

    def order(self) -> list[str]:
        """The movable wires, outer before inner, else as they were given."""
        return sorted(self.movable, key=lambda name: len(self.within.get(name, ())))

    def objective(self) -> float:
        """Σ ⟨A, B as permuted⟩."""
        return sum(term.value() for term in self.terms)

    def distance(self) -> float:
        """‖A − B as permuted‖ over all arrays."""
        return math.sqrt(sum(float(((term.a - term.b) ** 2).sum(dtype=torch.float64)) for term in self.terms))

    def similarities(self) -> dict[str, float]:
        """Wire -> cosine of all arrays that have it, in A and in B as permuted; NaN where one is zero."""
        values = [(term.axes, term.value()) for term in self.terms]
        together = {name: sum(value for axes, value in values if name in axes) for name in self.movable}
        return {name: together[name] / norm if norm else math.nan for name, norm in self.norms.items()}

    def permute(self, name: str, index: torch.Tensor) -> None:
        """Permute a wire of B, on top of what was done: entry i becomes what is now entry ``index[i]``."""
        if torch.equal(index, torch.arange(self.sizes[name], device="cpu").expand(index.shape)):
            return
        outer = self.within.get(name, ())
        for term, axis in self.places[name]:
            term.b = taken(term.b, term.axes, axis, index, outer)
            self.stale.update(wire for wire in term.axes if wire in self.inner)
        for child in self.inner[name]:
            names = (*self.within[child], child)
            self.element[child] = taken(self.element[child], names, names.index(name), index, outer)
        self.element[name] = self.element[name].gather(-1, index)

    # descent ------------------------------------------------------------------------------------------

    def descend(self, generator: torch.Generator | None = None, sweeps: int = 100) -> Iterator[float]:
        """Match wires in turn until no wire gains; yields the objective after each sweep."""
        for _ in range(sweeps):
            names = self.order()
            if generator is not None:
                names = [names[at] for at in torch.randperm(len(names), generator=generator, device="cpu").tolist()]
            moved = [self.improve(name) for name in names if name in self.stale]
            yield self.objective()
            if not any(moved):
                return

    def improve(self, name: str) -> bool:
        """Match one wire, and what is within it, while all others stay; whether that gained anything."""
        self.stale.discard(name)
        if not self.inner[name]:
            return self._improve_alone(name)
        if not self.within.get(name):
            return self._improve_with_inner(name)
        outer, moved = self.within[name], False
        for at in itertools.product(*(range(self.sizes[other]) for other in outer)):
            part = self.sliced(dict(zip(outer, at, strict=True)), dict(zip(outer, at, strict=True)), (name, *self.inner[name]))
            if part.improve(name):
                moved = True
                for wire in part.order():
                    self._permute_at(wire, dict(zip(outer, at, strict=True)), part.element[wire])
        return moved

    def _improve_alone(self, name: str) -> bool:
        scores = self.scores(name)
        # half of what each entry has now, off its row and its column, changes no best assignment, and is found sooner
        now = scores.diagonal(axis1=-2, axis2=-1) / 2
        index = assigned(scores - now[:, :, None] - now[:, None, :])
        gain = np.take_along_axis(scores, index[..., None], -1).sum() - 2 * now.sum()
        return self._try(((name, torch.from_numpy(index).reshape(self.shape(name))),), float(gain))

    def _improve_with_inner(self, name: str) -> bool:
        pairs, inside = self._pairs(name)
        index = assigned(pairs[None])[0]
        rows = np.arange(len(index))
        chosen = inside(rows, index)
        before = sum(term.value() for term, _ in self.places[name])
        gain = float(sum(value for value, _ in chosen)) - before
        moves = [(name, torch.from_numpy(index))]
        for child in (n for n in self.order() if n in self.inner[name]):
            at = self.within[child].index(name)
            moves.append((child, torch.stack([element[child] for _, element in chosen], at)))
        return self._try(moves, gain)

    def _try(self, moves: Sequence[tuple[str, torch.Tensor]], gain: float) -> bool:
        """Permute, unless that gains nothing. What a wire that a term has twice gains is known only afterwards."""
        first = moves[0][0]
        if gain <= self.tolerance * self.norms[first]:
            return False
        terms = [term for term, _ in self.places[first]]
        if len({id(term) for term in terms}) == len(terms):
            for name, index in moves:
                self.permute(name, index)
            self.stale.discard(first)
            return True
        kept = [term.b for term in self.terms], dict(self.element), set(self.stale)
        touched = {id(term): term for term in terms}.values()
        before = sum(term.value() for term in touched)
        for name, index in moves:
            self.permute(name, index)
        if sum(term.value() for term in touched) - before > self.tolerance * self.norms[first]:
            return True
        for term, b in zip(self.terms, kept[0], strict=True):
            term.b = b
        self.element, self.stale = kept[1], kept[2]
        return False

    def _permute_at(self, name: str, at: Mapping[str, int], index: torch.Tensor) -> None:
        """Permute a wire for one index of wires around it alone."""
        whole = torch.arange(self.sizes[name], device="cpu").expand(self.shape(name)).clone()
        whole[tuple(at.get(other, slice(None)) for other in self.within[name])] = index
        self.permute(name, whole)

    # scores -------------------------------------------------------------------------------------------

    def scores(self, name: str) -> Scores:
        """What each entry of A gains by each of B: (indices of the wires around, entries, entries)."""
        outer, size = self.within.get(name, ()), self.sizes[name]
        groups = math.prod(self.sizes[other] for other in outer)
        total = np.zeros((groups, size, size))
        for term, axis in self.places[name]:
            one, two = (rows(value, term.axes, axis, outer) for value in (term.a, term.b))
            total += products(one, two)
        return total

    def _pairs(self, name: str) -> tuple[Scores, Any]:
        """What each index of A gains by each of B with the best matching within; and that matching, for pairs of them.

        The function gives for arrays of rows and columns a list of (value, permutation of each inner wire).
        """
        alone = np.zeros((self.sizes[name], self.sizes[name]))
        holders = [(term, axis) for term, axis in self.places[name] if any(wire in self.inner[name] for wire in term.axes)]
        for term, axis in self.places[name]:
            if not any(term is other for other, _ in holders):
                alone += products(rows(term.a, term.axes, axis, ()), rows(term.b, term.axes, axis, ()))[0]
        separate = all(self.within[child] == (name,) and not self.inner[child] for child in self.inner[name]) and all(
            sum(wire in self.inner[name] for wire in term.axes) == 1 for term, _ in holders
        )
        solve = self._separately if separate else self._each
        return solve(name, alone, holders)

    def _separately(self, name: str, alone: Scores, holders: list[tuple[Term, int]]) -> tuple[Scores, Any]:
        """Inner wires that share no array: one product gives the scores of all pairs."""
        heads, children = self.sizes[name], self.inner[name]
        work = heads**2 * sum(self.sizes[child] ** 3 for child in children)

        def scores(child: str, row: int, columns: slice | int) -> Scores:
            total: Any = 0.0
            for term, _ in holders:
                if child in term.axes:
                    one, two = (rows(value, term.axes, term.axes.index(child), (name,)) for value in (term.a, term.b))
                    picked = two[columns] if isinstance(columns, slice) else two[columns, None]
                    made = one[row] @ picked.flatten(0, 1).T
                    total = total + made.double().cpu().numpy().reshape(len(made), len(picked), -1).swapaxes(0, 1)
            return total

        pairs = alone.copy()
        found: dict[tuple[int, int, str], NDArray[np.int64]] = {}
        for row in range(heads):
            for child in children:
                size = self.sizes[child]
                step = max(1, CELLS // size**2)
                for start in range(0, heads, step):
                    for at, matrix in enumerate(scores(child, row, slice(start, start + step)), start):
                        if work > PAIRS:  # the mean of what rows and what columns could gain at most
                            pairs[row, at] += (matrix.max(0).sum() + matrix.max(1).sum()) / 2
                            continue
                        found[row, at, child] = index = assigned(matrix[None])[0]
                        pairs[row, at] += matrix[np.arange(size), index].sum()

        def inside(some: NDArray[np.int64], others: NDArray[np.int64]) -> list[tuple[float, Element]]:
            made: list[tuple[float, Element]] = []
            for row, column in zip(some.tolist(), others.tolist(), strict=True):
                value, element = float(alone[row, column]), Element()
                for child in children:
                    matrix = scores(child, row, column)[0]
                    index = found.get((row, column, child))
                    index = assigned(matrix[None])[0] if index is None else index
                    value += float(matrix[np.arange(len(index)), index].sum())
                    element[child] = torch.from_numpy(index)
                made.append((value, element))
            return made

        return pairs, inside

    def _each(self, name: str, alone: Scores, holders: list[tuple[Term, int]]) -> tuple[Scores, Any]:
        """Inner wires that meet in an array, or have others within: an alignment of its own for each pair."""
        pairs, found = alone.copy(), dict[tuple[int, int], tuple[float, Element]]()
        for row in range(self.sizes[name]):
            for column in range(self.sizes[name]):
                part = self.sliced({name: row}, {name: column}, self.inner[name], [term for term, _ in holders])
                value, element = part.best([None] if row != column else [None, {}], None)[:2]
                pairs[row, column] += value
                found[row, column] = float(pairs[row, column]), element

        def inside(some: NDArray[np.int64], others: NDArray[np.int64]) -> list[tuple[float, Element]]:
            return [found[pair] for pair in zip(some.tolist(), others.tolist(), strict=True)]

        return pairs, inside

    def sliced(
        self, of_a: Mapping[str, int], of_b: Mapping[str, int], movable: Iterable[str], terms: list[Term] | None = None
    ) -> Alignment:
        """The alignment of what is at one index of some wires in A with what is at one in B."""
        movable = tuple(movable)
        parts: list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]] = []
        for term in self.terms if terms is None else terms:
            if any(wire in movable for wire in term.axes):
                one, two = (value[tuple(at.get(w, slice(None)) for w in term.axes)] for value, at in ((term.a, of_a), (term.b, of_b)))
                parts.append((one, two, tuple(wire for wire in term.axes if wire not in of_a)))
        within = {name: tuple(other for other in outer if other not in of_a) for name, outer in self.within.items()}
        return Alignment(parts, self.sizes, within, movable, self.tolerance)

    # starts -------------------------------------------------------------------------------------------

    def sort(self) -> None:
        """Match wires one after the other by what does not depend on the order of those not matched yet.

        Along these, the numbers are sorted: that is what each pair of entries would gain at most. (The bound of Gilmore
        1962 and Lawler 1963 for quadratic assignment.) It finds a permuted copy at once, unless entries are alike.
        """
        done = {wire for term in self.terms for wire in term.axes} - set(self.movable)
        pending = list(self.movable)
        while pending:
            name = next(n for n in pending if not any(other in pending for other in self.within.get(n, ())))
            outer = self.within.get(name, ())
            total = np.zeros((math.prod(self.sizes[o] for o in outer), self.sizes[name], self.sizes[name]))
            for term, axis in self.places[name]:
                free = [n for n, wire in enumerate(term.axes) if n != axis and wire not in done]
                one, two = (rows(value, term.axes, axis, outer, free) for value in (term.a, term.b))
                total += products(one, two)
            self.permute(name, torch.from_numpy(assigned(total)).reshape(self.shape(name)))
            pending.remove(name)
            done.add(name)
        self.stale = set(self.movable)

    def best(
        self, starts: Sequence[Mapping[str, torch.Tensor] | None], generator: torch.Generator | None, *, progress: bool = False
    ) -> tuple[float, Element, tuple[tuple[float, ...], ...]]:
        """The best of descents from several starts, where None is the sorted start, and {} the identity.

        Returns:
            its objective, its element, and for each start the objectives at the start and after each sweep.
        """
        from tqdm.auto import tqdm

        found: tuple[float, Element] | None = None
        histories: list[tuple[float, ...]] = []
        for start in tqdm(starts, desc="matching wires", disable=not progress, delay=1, leave=False):
            self.reset(start or None)
            if start is None:
                self.sort()
            history = [self.objective()]
            for value in self.descend(generator):
                history.append(value)
                if found is not None and found[0] - value > HOPE * (value - history[-2]):
                    break  # gains fall from sweep to sweep, so it will not become the best
            histories.append(tuple(history))
            if found is None or history[-1] > found[0]:
                found = history[-1], self.element
            if found[0] >= self.bound * (1 - self.tolerance):
                break  # nothing can be better: B is a permuted copy of A
        assert found is not None
        return (*found, tuple(histories))


# arrays -----------------------------------------------------------------------------------------------


def gathered(terms: Iterable[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]) -> list[Term]:
    """Terms with what never moves as one last axis; those of the same wires are put side by side along it."""
    found: dict[tuple[str, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for a, b, axes in terms:
        wired = [n for n, wire in enumerate(axes) if wire]
        order = sorted(wired, key=lambda n: (axes[n], n)) if len({axes[n] for n in wired}) == len(wired) else wired
        turn = [*order, *(n for n in range(len(axes)) if not axes[n])]
        one, two = (value.permute(turn).reshape(*(value.shape[n] for n in order), -1) for value in (a, b))
        found.setdefault(tuple(axes[n] for n in order), []).append((one, two))
    made: list[Term] = []
    for axes, values in found.items():
        one, two = (torch.cat([pair[side] for pair in values], -1) if len(values) > 1 else values[0][side] for side in (0, 1))
        made.append(Term(one, two, (*axes, "")))
    return made


def _dot(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one * two).sum(dtype=torch.float64))


def taken(values: torch.Tensor, axes: Sequence[str], axis: int, index: torch.Tensor, outer: Sequence[str]) -> torch.Tensor:
    """An array with one axis permuted: in one way, or in one for each index of the wires around."""
    index = index.to(values.device)
    if index.ndim == 1:
        return values.index_select(axis, index)
    at = {axes.index(other): n for n, other in enumerate(outer)} | {axis: len(outer)}
    turned = index.permute([at[where] for where in sorted(at)])
    sizes = iter(turned.shape)
    return torch.take_along_dim(values, turned.reshape([next(sizes) if n in at else 1 for n in range(values.ndim)]), axis)


def rows(
    values: torch.Tensor, axes: Sequence[str], axis: int, outer: Sequence[str], free: Sequence[int] = ()
) -> torch.Tensor:
    """An array as (indices of the wires around, entries of the axis, all else); along ``free`` axes it is sorted."""
    around = [axes.index(other) for other in outer]
    rest = [n for n in range(values.ndim) if n != axis and n not in around and n not in free]
    turned = values.permute([*around, axis, *rest, *free])
    if free:
        turned = turned.flatten(len(around) + 1 + len(rest))
        # NumPy's sort is several times faster than torch's on a CPU
        turned = torch.from_numpy(np.sort(turned.numpy())) if turned.device.type == "cpu" else turned.sort(-1)[0]
    return turned.reshape(math.prod(values.shape[n] for n in around), values.shape[axis], -1)


def products(one: torch.Tensor, two: torch.Tensor) -> Scores:
    """(groups, n, m) and (groups, n, m) -> inner products of all pairs of rows, (groups, n, n)."""
    return (one @ two.transpose(-1, -2)).cpu().numpy()


def assigned(scores: Scores) -> NDArray[np.int64]:
    """For each of some square matrices, the column for each row that makes the sum largest."""
    from scipy.optimize import linear_sum_assignment

    return np.stack([linear_sum_assignment(matrix, maximize=True)[1] for matrix in scores])
