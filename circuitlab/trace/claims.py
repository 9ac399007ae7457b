"""The claims of one op, tested on the numbers that went through it.

For a broadcast or diagonal axis, running the op on any re-indexed operands (entries dropped and doubled) gives the
re-indexed result; for a contracted, reduced or normalised axis the same holds for permutations. The same goes for each
part of a sum that the op puts together or takes apart. And what is said to be one axis has to be one: re-indexing it at
some of its places alone must not do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from circuitlab.circuit import PASSING_ROLES, Axis, Circuit, Op
from circuitlab.trace.events import mapped, tensors_in
from circuitlab.trace.permutable import Part, inside, part_products

_SYMMETRIC = PASSING_ROLES | {"contracted", "reduced", "normalised", "created"}
_ALIKE = _SYMMETRIC | {"joined"}
_EIGHT_BITS = 0.1
"""The error that rounding to eight bits may make."""
_MOVING = frozenset({"reindex", "slice", "cat"})
"""Kinds of op that move numbers whatever they are: the next op with the same claim on the same shapes is as the first."""
_LARGE = 1 << 22
"""Calls on more numbers than this are not run again for each way to take an axis apart."""
_ENOUGH = 1 << 16
"""A call on more numbers than this is tested on some of the entries of its other axes,"""
_FEW = 4
"""at least so many of each."""
_SPLITS = 64
"""An axis that stands at more places than this is taken apart in so many ways, drawn at random."""

Spot = tuple[int, int, int, Part]
"""Operand or result number, dimension, factor within the dimension or its part, part."""

@dataclass(frozen=True)
class Claim:
    """One thing that a circuit says.

    Attributes:
        kind: "broadcast", "diagonal", "contracted", "reduced", "normalised", "created" (of an op's axis),
            "shape" (of an op), "permutable" (of a wire) or "compiled" (of the whole circuit).
        subject: name of the op or wire. wire: name of the wire. source: the author's line.
        error: largest difference found, relative to the largest number; None if it was not tested.
        why: where it failed or could not be tested, the reason.
    """

    kind: str
    subject: str
    wire: str = ""
    source: str = ""
    error: float | None = None
    why: str = ""


@dataclass
class Results:
    held: list[Claim] = field(default_factory=list[Claim])
    failed: list[Claim] = field(default_factory=list[Claim])
    untestable: list[Claim] = field(default_factory=list[Claim])
    tolerance: float = 1e-8
    apart: dict[Any, str] = field(default_factory=dict[Any, str])
    moved: dict[Any, tuple[float | None, str, bool]] = field(default_factory=dict[Any, tuple[float | None, str, bool]])

    def add(self, claim: Claim, tolerance: float) -> None:
        """Sort a tested claim by its error."""
        bad = claim.error is None or not claim.error <= tolerance
        (self.failed if bad else self.held).append(claim)


def test_op(
    circuit: Circuit, op: Op, func: Any, call: Any, results: list[torch.Tensor], found: Results,
    generator: torch.Generator,
) -> None:
    """Test what a circuit says of an op that has just run.

    Args:
        circuit, op: what is claimed.
        func, call: the function and its (args, kwargs).
        results: what it gave.
        found: gets the claims.
        generator: draws the permutations.
    """
    if op.kind in ("random", "create"):
        if op.kind == "random":
            found.untestable.append(Claim("shape", op.name, source=op.source, why="it is random"))
        return
    if op.kind == "opaque" and not any(axis.role in _SYMMETRIC for axis in op.axes):
        found.untestable.append(Claim("shape", op.name, source=op.source, why="it has no rule"))
        return
    run = _Runs(circuit, op, func, call, results)
    found.tolerance = max(found.tolerance, run.tolerance)
    for axis in op.axes:
        if axis.role in _SYMMETRIC and axis.ins and circuit.wires[axis.wire].size:
            if axis.role == "reduced" and len(results) > 1:
                # where the largest was: read by nobody, else the role were "ordered"
                run.read = 1
            _test_axis(run, axis, *_spots(axis), found, generator)
            run.read = None
    # what nobody reads was not claimed: the last states of a recurrent net
    run.read = 1 + max((n for n, name in enumerate(op.outputs) if name in circuit.consumers or name in circuit.outputs), default=-1)
    for wire, ins, outs in _parts(circuit, op):
        _test_axis(run, Axis(wire, "joined"), ins, outs, found, generator)


def _test_axis(
    run: _Runs, axis: Axis, ins: list[Spot], outs: list[Spot], found: Results, generator: torch.Generator
) -> None:
    moving = run.op.kind in _MOVING
    key = (run.signature, axis.role, run.read, run.places(ins, False), run.places(outs, True)) if moving else None
    known = found.moved.get(key)
    if known is None:
        whole = run.case
        run.case = whole if axis.role == "joined" else run.small(axis, generator)
        known = _tried(run, axis, ins, outs, found, generator)
        run.case = whole
        if moving:
            found.moved[key] = known
    error, why, runs = known
    claim = Claim(axis.role, run.op.name, axis.wire, run.op.source, error, why.format(wire=axis.wire))
    if runs:
        found.add(claim, run.rounding)
    else:
        found.untestable.append(claim)


def _tried(
    run: _Runs, axis: Axis, ins: list[Spot], outs: list[Spot], found: Results, generator: torch.Generator
) -> tuple[float | None, str, bool]:
    """The error of a claim, what is wrong with it, and whether it could be tested."""
    index, *more = _indices(run.circuit.wires[axis.wire].size, axis.role in PASSING_ROLES, generator)
    if any(spot[0] >= len(run.case.operands) for spot in ins):
        return None, "the weight is packed, and cannot be re-indexed", False
    try:
        error = max(run.error(each, ins, outs) for each in (index, *more))
    except _FAILURES as failure:
        return None, f"it does not run re-indexed: {failure}".replace("{", "{{").replace("}", "}}"), False
    if not error <= run.rounding:
        return error, f"re-indexing {{wire}} ({axis.role}) changes the result by {error:.2g}", True
    if axis.role == "joined":
        return error, "", True
    key = (run.signature, tuple(ins), tuple(outs))
    if key not in found.apart:  # the next layer's op, of the same shapes, need not be taken apart again
        found.apart[key] = _taken_apart(run, generator, len(index), ins, outs)
    return (None, found.apart[key], True) if found.apart[key] else (error, "", True)


_FAILURES = (RuntimeError, IndexError, ValueError, TypeError)


def _spots(axis: Axis) -> tuple[list[Spot], list[Spot]]:
    return [(*place, None) for place in axis.ins], [(*place, None) for place in axis.outs]


class _Case:
    """A call, what it gave, and how large its numbers are.

    sizes: (whether of a result, its number, dimension, factor) -> how many entries are left there of an axis.
    """

    def __init__(self, call: Any, results: list[torch.Tensor]) -> None:
        self.call, self.results = call, results
        self.operands = [tensor for _, tensor in tensors_in(call, torch.Tensor)]
        self.sizes: dict[tuple[bool, int, int, int], int] = {}

    @property
    def volume(self) -> int:
        """Numbers in its operands and results."""
        return sum(tensor.numel() for tensor in (*self.operands, *self.results))

    @functools.cached_property
    def floor(self) -> float:
        """Results much smaller than the operands are rounding: the mean of what was normalised is 1e-17, not a number."""
        sizes = [t.detach().nan_to_num(0, 0, 0).abs().max() for t in self.operands if t.is_floating_point() and t.numel()]
        return 1e-4 * max((float(size) for size in sizes), default=0.0)


class _Runs:
    """An op that can be run again, on changed operands."""

    def __init__(self, circuit: Circuit, op: Op, func: Any, call: Any, results: list[torch.Tensor]) -> None:
        self.op, self.func, self.circuit = op, func, circuit
        self.case, self.whole = _Case(call, results), call
        self.tolerance = max((tolerance_of(t.dtype) for t in (*results, *self.case.operands)), default=1e-8)
        self.rounding = _EIGHT_BITS if op.attrs.get("dynamic") else self.tolerance
        self.read: int | None = None
        self.smaller: dict[tuple[int, ...], _Case] = {}  # numbers of axes -> the call on some entries of those
        self.held: dict[tuple[int, ...], bool] = {}

    def small(self, axis: Axis, generator: torch.Generator) -> _Case:
        """The call on a few entries of its other axes, to test an axis of a large one; the call itself if that is none.

        Where the circuit says that an axis is broadcast, some entries of it must give just these entries of the
        results. That is tested here too: where it does not hold, the whole call is what the axis is tested on.
        """
        small, key = self.case, tuple[int, ...]()
        for number, other in self.narrowed:
            size, volume = self.circuit.wires[other.wire].size, small.volume
            keep = max(_FEW, size * _ENOUGH // max(volume, 1))
            if other is axis or volume <= _ENOUGH or keep >= size:
                continue
            key = (*key, number)
            small = self.smaller.get(key) or self._narrow(small, other, keep, generator)
            self.smaller[key] = small
        if key and key not in self.held:
            try:
                got = self.again(lambda _, tensor: tensor.clone(), small)
                pairs = zip(got, small.results, strict=True)
                self.held[key] = all(difference(a, b, small.floor) <= self.tolerance for a, b in [*pairs][: self.read])
            except _FAILURES:
                self.held[key] = False
        return small if key and self.held[key] else self.case

    def _narrow(self, case: _Case, axis: Axis, keep: int, generator: torch.Generator) -> _Case:
        """Some entries of one axis, in operands and results."""
        index = torch.randperm(self.circuit.wires[axis.wire].size, generator=generator, device="cpu")[:keep].sort()[0]
        ins, outs = _spots(axis)
        operands = iter(self.reindexed(case.operands, index, ins, False, case))
        made = _Case(mapped(case.call, lambda _: next(operands)), self.reindexed(case.results, index, outs, True, case))
        sides = ((False, ins), (True, outs))
        made.sizes = case.sizes | {(out, *spot[:3]): keep for out, spots in sides for spot in spots}
        return made

    @functools.cached_property
    def narrowed(self) -> list[tuple[int, Axis]]:
        """The axes of which some entries give just these entries of the results, largest first."""
        found = [
            (number, axis) for number, axis in enumerate(self.op.axes)
            if axis.ins and (axis.role in PASSING_ROLES or (axis.role == "created" and self.op.kind == "linear"))
        ]
        return sorted(found, key=lambda pair: -self.circuit.wires[pair[1].wire].size)

    @functools.cached_property
    def signature(self) -> str:
        """Equal for calls of one function on the same shapes, with the same numbers."""
        return str((self.op.fn, mapped(self.whole, lambda tensor: (tuple(tensor.shape), tensor.dtype))))

    def again(self, change: Callable[[int, torch.Tensor], torch.Tensor], case: _Case) -> list[torch.Tensor]:
        """Results with each operand, given by its number, changed: to a tensor that may be written to."""
        numbers = iter(range(len(case.operands)))
        arguments, keywords = mapped(case.call, lambda tensor: change(next(numbers), tensor))
        result = self.func(*arguments, **keywords)
        if result is None and self.op.fn == "setitem":
            result = arguments[0]
        return [tensor for _, tensor in tensors_in(result, torch.Tensor)]

    def reindexed(
        self, tensors: Sequence[torch.Tensor], index: torch.Tensor, spots: list[Spot], out: bool, case: _Case
    ) -> list[torch.Tensor]:
        """Operands or results with entries of an axis at these spots chosen by the index."""
        names = self.op.outputs if out else self.op.inputs
        made = list(tensors)
        for number, dim, factor, part in spots:
            wires = product_of(self.circuit, names[number], dim, part)
            product = [self.circuit.wires[name].size for name in wires]
            if part is None and case.sizes:
                product = [case.sizes.get((out, number, dim, f), size) for f, size in enumerate(product)]
            made[number] = reindexed(made[number], dim, product, factor, part, index)
        return made

    def places(self, spots: list[Spot], out: bool) -> tuple[Any, ...]:
        """Where in the numbers an axis is, by these spots: equal for ops of other names and the same shapes."""
        names = self.op.outputs if out else self.op.inputs
        products = [product_of(self.circuit, names[number], dim, part) for number, dim, _, part in spots]
        sizes = [tuple(self.circuit.wires[name].size for name in product) for product in products]
        return tuple(zip(spots, sizes, strict=True))

    def error(self, index: torch.Tensor, ins: list[Spot], outs: list[Spot], case: _Case | None = None) -> float:
        """How far re-indexed operands are from giving re-indexed results."""
        case = case or self.case
        operands = self.reindexed(case.operands, index, ins, False, case)
        got = self.again(lambda number, _: operands[number].clone(), case)
        expected = self.reindexed(case.results, index, outs, True, case)
        pairs = list(zip(got, expected, strict=True))[: self.read]
        return max((difference(a, b, case.floor) for a, b in pairs), default=0.0)

    def moves(self, index: torch.Tensor, ins: list[Spot], outs: list[Spot], case: _Case) -> bool:
        """Whether re-indexing changes any number at these spots."""
        pairs = [*zip(self.reindexed(case.operands, index, ins, False, case), case.operands, strict=True)]
        pairs += [*zip(self.reindexed(case.results, index, outs, True, case), case.results, strict=True)]
        return any(a is not b and difference(a, b) > 10 * self.tolerance for a, b in pairs)


def _taken_apart(run: _Runs, generator: torch.Generator, size: int, ins: list[Spot], outs: list[Spot]) -> str:
    """Why places are not of one axis: some of them alone can be re-indexed, and the others alone; "" if they are.

    Numbers at hand may hide that they belong together (a mask that is all ones), so whatever is found has to hold for
    random numbers too, several times.
    """
    if len(ins) + len(outs) < 2 or run.case.volume > _LARGE or run.read is not None:
        return ""
    cases: list[_Case | None] = []
    for some, rest in _halves([(True, spot) for spot in ins] + [(False, spot) for spot in outs], generator):
        try:
            if not _independent(run, draw_index(size, False, generator), some, rest, run.case):
                continue
            cases = cases or [_drawn(run, seed) for seed in range(4)]
            if all(case is not None and _independent(run, draw_index(size, False, generator), some, rest, case)
                   for case in cases):
                return f"its places are not one axis: {len(some)} of {len(some) + len(rest)} can be re-indexed alone"
        except _FAILURES:
            continue
    return ""


def _halves(
    places: list[tuple[bool, Spot]], generator: torch.Generator
) -> Iterator[tuple[list[tuple[bool, Spot]], list[tuple[bool, Spot]]]]:
    """Ways to take places apart in two: all; of more than 8 places, those that split off one; of very many, some of those."""
    count = len(places)
    masks: Iterable[int] = range(1, 1 << (count - 1))
    if count > 8:
        masks = [1 << n for n in sorted(torch.randperm(count, generator=generator, device="cpu")[:_SPLITS].tolist())]
    for mask in masks:
        some = [place for n, place in enumerate(places) if mask >> n & 1]
        rest = [place for n, place in enumerate(places) if not mask >> n & 1]
        made, others = ({spot[0] for read, spot in half if not read} for half in (some, rest))
        if not made or not others or made & others:  # results side by side, each of operands of its own, may be apart
            yield some, rest


def _independent(
    run: _Runs, index: torch.Tensor, some: list[tuple[bool, Spot]], rest: list[tuple[bool, Spot]], case: _Case
) -> bool:
    """Whether each half can be re-indexed without the other, and that says something."""
    for half in (some, rest):
        ins, outs = [spot for read, spot in half if read], [spot for read, spot in half if not read]
        if run.error(index, ins, outs, case) > run.tolerance or not run.moves(index, ins, outs, case):
            return False
    return True


def _drawn(run: _Runs, seed: int) -> _Case | None:
    """The call on random numbers, and its results; None where an operand does not matter at all."""
    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool:
            return torch.rand(tensor.shape, device=tensor.device) < 0.5
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.randn_like(tensor)
        # whole numbers may say where to read: these are valid ones
        return tensor.flatten()[torch.randperm(tensor.numel(), device=tensor.device)].view(tensor.shape)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = _Case(mapped(run.case.call, draw), [])
        case.sizes = run.case.sizes
        case.results = run.again(lambda _, tensor: tensor.clone(), case)
        for number, operand in enumerate(case.operands):
            if operand.numel() < 2:
                continue
            other = run.again(lambda n, t, number=number: draw(t) if n == number else t.clone(), case)
            if all(difference(a, b) <= run.tolerance for a, b in zip(other, case.results, strict=True)):
                return None
    return case


# parts of sums -------------------------------------------------------------------------------------------


def _parts(circuit: Circuit, op: Op) -> Iterator[tuple[str, list[Spot], list[Spot]]]:
    """Wires within the sums that an op puts together or takes apart, with all their spots in its operands and results.

    A wire that the op also treats by its positions is left out.
    """
    if not any(axis.role == "joined" for axis in op.axes):
        return
    found: dict[str, tuple[list[Spot], list[Spot]]] = {}
    for side, names in enumerate((op.inputs, op.outputs)):
        for number, name in enumerate(names):
            tensor = circuit.tensor(name)
            for dim, wires in enumerate(tensor.dims):
                for wire, factor, part in inside(circuit.wires, wires):
                    found.setdefault(wire, ([], []))[side].append((number, dim, factor, part))
    joined = {axis.wire for axis in op.axes if axis.role == "joined"}
    held = {wire: {name for name, *_ in inside(circuit.wires, (wire,))} for wire in joined}
    for axis in op.axes:
        if axis.role == "joined" and not (axis.ins and axis.outs) and not circuit.wires[axis.wire].parts:
            if not any(axis.wire in held[other] for other in joined - {axis.wire}):
                return  # it numbers whole arrays (stack, unbind), or is a part that cannot be told
    pinned = {name for axis in op.axes if axis.role not in _ALIKE for name, *_ in inside(circuit.wires, (axis.wire,))}
    within = set[str]().union(*held.values())
    for wire, (ins, outs) in found.items():
        if wire not in within or wire in pinned or circuit.wires[wire].parts or not ins or not outs:
            continue
        yield wire, ins, outs


def product_of(circuit: Circuit, tensor: str, dim: int, part: Part) -> tuple[str, ...]:
    """The wires that a dimension, or a part of it, is the product of."""
    names = circuit.tensor(tensor).dims[dim]
    if part is None:
        return names
    return next(product for at, product, _ in part_products(circuit.wires, names) if at == part)


# numbers -------------------------------------------------------------------------------------------------


def reindexed(
    tensor: torch.Tensor, dim: int, product: list[int], factor: int, part: Part, index: torch.Tensor
) -> torch.Tensor:
    """A tensor with entries of one factor of a dimension, or of a part of it, chosen by an index, few or many."""
    if part is not None:
        start, stop = part
        made = tensor.clone()
        made.narrow(dim, start, stop - start).copy_(
            reindexed(tensor.narrow(dim, start, stop - start), dim, product, factor, None, index))
        return made
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    wide = tensor.reshape(*before, *product, *after).index_select(dim + factor, index.to(tensor.device))
    return wide.reshape(*before, math.prod(wide.shape[dim : dim + len(product)]), *after)


def cloned(value: Any) -> Any:
    return mapped(value, lambda tensor: tensor.detach().clone())


def tolerance_of(dtype: torch.dtype) -> float:
    """The error that rounding may make, with room: a module may compute in less than float64 inside."""
    return 1e-8 if not (dtype.is_floating_point or dtype.is_complex) else max(1e-8, 500 * torch.finfo(dtype).eps)


def _indices(size: int, any_map: bool, generator: torch.Generator) -> list[torch.Tensor]:
    """Re-indexings to try. Of few entries, one may do by chance; a swap and a cycle stand for all permutations."""
    if size > 6:
        return [draw_index(size, any_map, generator)]
    order = torch.randperm(size, generator=generator, device="cpu")
    swap, cycle = torch.arange(size, device="cpu"), torch.empty(size, dtype=torch.long, device="cpu")
    swap[order[:2]] = order[:2].flip(0)
    cycle[order] = order.roll(1)
    found = [swap] if torch.equal(swap, cycle) else [swap, cycle]
    return [*found, draw_index(size, True, generator)] if any_map else found


def draw_index(size: int, any_map: bool, generator: torch.Generator) -> torch.Tensor:
    """A random permutation, or for broadcast axes any map: some entries twice, some dropped."""
    index = torch.randperm(size, generator=generator, device="cpu")
    if any_map:
        index[-1:] = index[:1]
        return index
    return index if not torch.equal(index, torch.arange(size, device="cpu")) else index.flip(0)


def difference(got: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference relative to the largest number; infinite where shapes or not-a-numbers disagree."""
    if got.shape != expected.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    if not (got.is_floating_point() or got.is_complex()):
        return 0.0 if torch.equal(got, expected) else float("inf")
    if got.dtype == expected.dtype and torch.equal(got, expected):
        return 0.0
    same = (got == expected) | (got.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, torch.zeros_like(got), got - expected).abs()
    scale = torch.where(expected.isfinite(), expected, torch.zeros_like(expected)).abs().max()
    value = float(gap.max() / scale.clamp_min(max(floor, 1e-30)))
    return float("inf") if math.isnan(value) else value
