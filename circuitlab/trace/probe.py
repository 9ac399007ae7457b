"""What an op without a rule does to its axes, found out by running it again on changed numbers.

An op is a black box here. Re-indexing some dimensions of its operands, and seeing whether its results are re-indexed
just so, tells how it treats them: with entries dropped and doubled, that it does the same for each index separately;
with permutations, that all indices are alike to it. What held for one run may be luck, so it has to hold for the numbers
at hand and for several disturbed ones, and whatever is not seen to hold is not claimed. Such an op stays opaque: its
axes are likely, not known, and it is marked "probed".
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from circuitlab.trace import rules
from circuitlab.trace.claims import cloned, difference, draw_index
from circuitlab.trace.events import Event, mapped, tensors_in
from circuitlab.trace.transforms import Mapped
from circuitlab.trace.watch import Recorder

_LARGE = 1 << 18
"""Calls on more numbers than this are not probed."""
_TRIES = 64
"""Ways to pair up dimensions of the operands that are tried for one dimension of a result."""
_ROUNDS = 3
_SMALL = (torch.bool, torch.int8, torch.uint8)

Call = tuple[tuple[Any, ...], dict[str, Any]]
Dims = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Probed:
    """One axis: its role, and (number, dimension) in operands and results."""

    role: str
    ins: Dims
    outs: Dims


class Prober(Recorder):
    """Records a run, and probes the ops of given names."""

    wanted: frozenset[str]
    functions: frozenset[str]

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        try:
            before = cloned((tuple(args), dict(kwargs))) if name in self.functions else None
        except RuntimeError:  # arrays of a kind that cannot be copied
            before = None
        return before, func(*args, **kwargs)

    def after(self, event: Event, func: Any, before: Any, results: list[torch.Tensor]) -> None:
        if before is not None and event.name in self.wanted:
            event.probed = probe(func, event.fn, before, results)


def probe(func: Any, name: str, call: Call, results: list[torch.Tensor]) -> tuple[Probed, ...]:
    """The axes of a call that numbers speak for.

    Args:
        func, name: the function.
        call: its (args, kwargs).
        results: what it gave.
    """
    operands = [tensor for _, tensor in tensors_in(call, torch.Tensor)]
    # large whole numbers may say where to read, and others than these be invalid
    numbers = all(t.dtype in _SMALL or t.is_floating_point() or t.is_complex() for t in operands)
    if not operands or not numbers or not _harmless(func, name, call):
        return ()
    if sum(t.numel() for t in (*operands, *results)) > _LARGE:
        return ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rounds = [found for number in range(_ROUNDS) if (found := _round(func, call, number)) is not None]
        if len(rounds) < _ROUNDS or [t.shape for t in rounds[0].results] != [t.shape for t in results]:
            return ()
        return tuple(_Search(rounds).axes())


def _harmless(func: Any, name: str, call: Call) -> bool:
    """Whether a function may be called again: by what it declares, it writes to nothing and talks to nobody."""
    func = func.func if isinstance(func, Mapped) else func
    schema = getattr(func, "_schema", None)
    packet = [getattr(func, overload)._schema for overload in func.overloads()] if hasattr(func, "overloads") else []
    if any(each.is_mutable for each in (schema, *packet) if each is not None) or "c10d" in str(func):
        return False
    python = isinstance(func, types.FunctionType) and not func.__module__.startswith("torch")
    return not python and not rules.in_place(name) and call[1].get("out") is None


@dataclass
class _Round:
    """A call on some numbers, and its results."""

    func: Callable[..., Any]
    call: Call
    operands: list[torch.Tensor]
    results: list[torch.Tensor]

    def again(self, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """Results for other operands."""
        numbers = iter(operands)
        args, kwargs = mapped(self.call, lambda _: next(numbers).clone())
        return [tensor for _, tensor in tensors_in(self.func(*args, **kwargs), torch.Tensor)]


def _round(func: Any, call: Call, number: int) -> _Round | None:
    """The call itself, and for numbers above 0 a disturbed one; None where it does not run, or not the same way twice."""
    changed = mapped(call, _disturbed) if number else call
    operands = [tensor for _, tensor in tensors_in(changed, torch.Tensor)]
    made = _Round(func, changed, operands, [])
    try:
        made.results = made.again(operands)
        same = made.again(operands)
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return None
    return made if _close(made.results, same) else None


def _disturbed(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return tensor ^ (torch.rand(tensor.shape, device=tensor.device) < 0.3)
    if tensor.dtype in _SMALL:
        return tensor.flatten()[torch.randperm(tensor.numel(), device=tensor.device)].view(tensor.shape)
    scale = tensor.detach().abs().nan_to_num(0, 0, 0).mean() if tensor.numel() else 0
    return tensor * (1 + 0.1 * torch.randn_like(tensor)) + 0.1 * scale * torch.randn_like(tensor)


def _close(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(difference(a, b) <= _tolerance(a) for a, b in zip(some, others, strict=True))


def _tolerance(tensor: torch.Tensor) -> float:
    loose = tensor.is_floating_point() or tensor.is_complex()
    return 100 * torch.finfo(tensor.dtype).eps if loose else 0.0


class _Search:
    """The search for axes, over rounds of the same call."""

    def __init__(self, rounds: list[_Round]) -> None:
        self.rounds = rounds
        self.ins = [(n, dim) for n, t in enumerate(rounds[0].operands) for dim in range(t.dim())]
        self.outs = [(n, dim) for n, t in enumerate(rounds[0].results) for dim in range(t.dim())]
        self.generator = torch.Generator().manual_seed(0)

    def axes(self) -> Iterator[Probed]:
        """Axes that pass first, then those whose indices are alike: first such that come out, then such that go."""
        for passing, gone in ((True, False), (False, False), (False, True)):
            sizes = [self._size(place, out=False) for place in self.ins] if gone else \
                    [self._size(place, out=True) for place in self.outs]
            for size in dict.fromkeys(size for size in sizes if size > 1):
                yield from self._of_size(size, passing, gone)

    def _size(self, place: tuple[int, int], *, out: bool) -> int:
        number, dim = place
        first = self.rounds[0]
        return (first.results if out else first.operands)[number].shape[dim]

    def _of_size(self, size: int, passing: bool, gone: bool) -> Iterator[Probed]:
        found = True
        while found:
            found = False
            for ins, outs in itertools.islice(self._pairs(size, gone), _TRIES):
                if self._holds(size, ins, outs, passing) and self._complete(size, ins):
                    role = ("diagonal" if len(ins) > 1 else "broadcast") if passing else "normalised" if outs else \
                        "contracted" if len(ins) > 1 else "reduced"
                    yield Probed(role, ins, outs)
                    self.ins = [place for place in self.ins if place not in ins]
                    self.outs = [place for place in self.outs if place not in outs]
                    found = True
                    break

    def _pairs(self, size: int, gone: bool) -> Iterator[tuple[Dims, Dims]]:
        """At most one dimension of each operand, with at most one of each result; fewest first."""
        ins = sorted(_choices([p for p in self.ins if self._size(p, out=False) == size]), key=len)
        outs = [()] if gone else sorted(_choices([p for p in self.outs if self._size(p, out=True) == size]), key=len,
                                        reverse=True)
        return ((i, o) for i in ins if i for o in outs if o or gone)

    def _holds(self, size: int, ins: Dims, outs: Dims, passing: bool) -> bool:
        """Whether re-indexing these operands re-indexes these results just so, in all rounds, and changes something."""
        for number, each in enumerate(self.rounds):
            for index in self._indices(size, passing):
                try:
                    operands, expected = _taken(each.operands, ins, index), _taken(each.results, outs, index)
                    if not _close(each.again(operands), expected):
                        return False
                except (RuntimeError, IndexError, ValueError, TypeError):
                    return False
                if number and (_still(each.operands, operands, ins) or _still(each.results, expected, outs)):
                    return False
        return True

    def _indices(self, size: int, passing: bool) -> list[torch.Tensor]:
        """Re-indexings: of what passes, each half alone, so that whatever depends on all entries (their largest) shows."""
        index = draw_index(size, False, self.generator)
        if not passing:
            return [index]
        return [half.repeat(-(-size // len(half)))[:size] for half in (index[: size // 2], index[size // 2 :])]

    def _complete(self, size: int, ins: Dims) -> bool:
        """Whether every other dimension of this size varies: of a constant one it cannot be seen that it belongs."""
        index = draw_index(size, False, self.generator)
        taken = {number for number, _ in ins}
        for number, dim in self.ins:
            if number not in taken and self._size((number, dim), out=False) == size:
                before = self.rounds[-1].operands
                if _still(before, _taken(before, ((number, dim),), index), ((number, dim),)):
                    return False
        return True


def _choices(places: list[tuple[int, int]]) -> Iterator[Dims]:
    """All ways to choose at most one dimension of each array."""
    numbers = sorted({number for number, _ in places})
    options = [[None, *(place for place in places if place[0] == number)] for number in numbers]
    for choice in itertools.product(*options):
        yield tuple(place for place in choice if place is not None)


def _taken(tensors: list[torch.Tensor], places: Dims, index: torch.Tensor) -> list[torch.Tensor]:
    made = list(tensors)
    for number, dim in places:
        made[number] = made[number].index_select(dim, index.to(made[number].device))
    return made


def _still(before: list[torch.Tensor], after: list[torch.Tensor], places: Dims) -> bool:
    """Whether re-indexing left one of these arrays as it was."""
    return any(difference(before[number], after[number]) == 0 for number, _ in places)
