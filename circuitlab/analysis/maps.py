"""The learned linear maps of a circuit: which ops apply one, to what, and where its rows sit in a parameter.

A map's matrix is a parameter, something computed from parameters alone, or one of many that are stacked in a parameter, as experts
are: that one is picked by a number, which may be computed from the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from circuitlab.analysis.views import NoViewError, view
from circuitlab.circuit import PASSING_ROLES, Axis, Circuit, Dims, Op

ALL = "all"


class NoMapError(Exception):
    """What was looked at is no learned linear map, or no feed-forward block."""


@dataclass(frozen=True)
class Weight:
    """Where the neurons of a wire sit in one linear map.

    Attributes:
        parameter: name.
        dim: its dimension along which the neurons lie.
        rows: (start, stop, step) of the neurons along that dimension; of each expert's part where that counts experts as well.
        bias: name of the bias that has the same rows, "" if there is none.
        op: name of the op that applies it first, and fn: its torch function.
        operand: number of the tensor among that op's inputs that is multiplied, and axis: its dimension that is summed
            over, counted from the end.
        order: number of that op in the run.
        module: path of the module that does this map and nothing else, None if there is none.
        direct: the op takes the parameter itself, not something computed from it (weight norm, a merged adapter).
        stacked: number of such maps in the parameter, as of experts; 1 if it is one matrix.
        along: the dimension of the parameter that counts them, None if there is not one; `dim` if they lie there one after another.
        by: what picks one of them in that op: a number, or the name of the tensor of numbers (of the ends of their rows for a
            grouped product); "all" if it takes all in their order, "" if that is not known.
        calls: for each op of the run that applies fn to the parameter, whether it is for this block: another block may share
            the parameter, as tied weights do. () if all are.
    """

    parameter: str
    dim: int
    rows: tuple[int, int, int]
    bias: str = ""
    op: str = ""
    fn: str = ""
    operand: int = 0
    axis: int = -1
    order: int = 0
    module: str | None = None
    direct: bool = True
    stacked: int = 1
    along: int | None = None
    by: str = ""
    calls: tuple[bool, ...] = ()

    def of(self, tensor: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """The neurons' rows of the parameter, of shape (neurons, what else the parameter has); those of one expert where many are stacked."""
        rows, along = tensor.movedim(self.dim, 0), self.along
        if along == self.dim:
            rows, along = rows.unflatten(0, (self.stacked, -1)).transpose(0, 1), 1
        elif along is not None:
            along += along < self.dim
        rows = rows[slice(*self.rows)]
        if expert is not None and along is not None:
            rows = rows.select(along, expert)
        return rows.flatten(1) if rows.ndim > 1 else rows[:, None]

    def of_bias(self, tensor: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """The neurons' entries of the bias, of shape (neurons,); (experts, neurons) where each has its own and none is asked for."""
        tensor = tensor.squeeze()
        return (tensor if expert is None or tensor.ndim < 2 else tensor[expert])[..., slice(*self.rows)]


@dataclass(frozen=True)
class Pick:
    """What is left of a learned tensor where a computed number, or one for each position, picks from one of its dimensions.

    Attributes:
        source: name of the learned tensor.
        wires: of its other dimensions.
        index: name of the tensor of numbers, and dims: its wires.
    """

    source: str
    wires: Dims
    index: str
    dims: Dims


class Maps:
    """The linear maps of one circuit.

    Attributes:
        number: op name -> its place in the run.
        roots: names of parameters, buffers and constants, and of what is computed of these alone -> which these are.
        picks: names of what is picked of learned tensors.
    """

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.number = {op.name: number for number, op in enumerate(circuit.ops)}
        self.chain: dict[str, tuple[str, ...]] = {}
        for block, above in _within(circuit.root, ()):
            for item in block.items:
                if isinstance(item, str):
                    self.chain[item] = (*above, block.name)
        self.roots: dict[str, tuple[str, ...]] = {}
        self.picks: dict[str, Pick] = {}
        for tensor in circuit.tensors:
            if tensor.kind in ("parameter", "buffer", "constant"):
                self.roots[tensor.name] = (tensor.name,)
        for op in circuit.ops:
            if op.inputs and all(name in self.roots for name in op.inputs):
                both = tuple(dict.fromkeys(root for name in op.inputs for root in self.roots[name]))
                self.roots.update(dict.fromkeys(op.outputs, both))
            elif op.kind == "reindex" and op.inputs and all(name in self.picks for name in op.inputs):
                self.picks.update(dict.fromkeys(op.outputs, self.picks[op.inputs[0]]))
            elif (pick := self._pick(op)) is not None:
                self.picks.update(dict.fromkeys(op.outputs, pick))

    def _pick(self, op: Op) -> Pick | None:
        """What an op picks of a learned tensor by a computed number, if that is all it does."""
        if op.kind != "gather" or len(op.inputs) != 2 or not self.learned(op.inputs[0]):
            return None
        source, index = (self.circuit.tensor(name) for name in op.inputs)
        taken = {place[1] for axis in op.axes if axis.role == "gathered" for place in axis.ins if place[0] == 0}
        rest = [axis for axis in op.axes if axis.role != "gathered"]
        if len(taken) != 1 or any(not axis.passes or len({place[0] for place in axis.ins}) > 1 for axis in rest):
            return None
        others = tuple(dim for n, dim in enumerate(source.dims) if n not in taken and dim)
        return Pick(source.name, others, self._unviewed(index.name), tuple(dim for dim in index.dims if dim))

    def _unviewed(self, name: str) -> str:
        """Name of the tensor that this one is a view of."""
        while (op := self._maker(name)) is not None and op.kind == "reindex" and len(op.inputs) == 1:
            name = op.inputs[0]
        return name

    def _maker(self, name: str) -> Op | None:
        tensor = self.circuit.tensor(name)
        return self.circuit.op(tensor.op) if tensor.op else None

    # what is learned ----------------------------------------------------------------------------------

    def fixed(self, name: str) -> bool:
        """Whether a tensor's values are parameters or constants, or picked of these: the data at most choose which."""
        return name in self.roots or name in self.picks

    def sources(self, name: str) -> tuple[str, ...]:
        """The parameters, buffers and constants that a fixed tensor is made of."""
        return self.roots.get(self.picks[name].source if name in self.picks else name, ())

    def learned(self, name: str) -> bool:
        """Whether a tensor is a parameter, or computed from parameters and constants alone."""
        return any(self.circuit.tensor(root).kind == "parameter" for root in self.roots.get(name, ()))

    def _matrix(self, name: str) -> bool:
        """Whether a tensor is a matrix, or one for each position, that is picked of many."""
        return name in self.picks and len(self.picks[name].wires) > 1

    # maps ---------------------------------------------------------------------------------------------

    def multiplied(self, op: Op, axis: Axis, others: bool = False) -> int | None:
        """Number of the input that a linear map contracts, None if the op is no linear map at each position.

        With ``others``, it may sum over other wires as well; else only over those that a third operand has too, such as
        the experts where their outputs are weighed and added at once.
        """
        slots = {place[0] for place in axis.ins}
        summed = [{place[0] for place in a.ins} for a in op.axes if a.role == "contracted" and a is not axis]
        if op.kind == "scan" or any(a.role in ("windowed", "opaque") for a in op.axes) or (not others and any(not also > slots for also in summed)):
            return None
        data = [slot for slot in slots if op.inputs[slot] not in self.roots]
        if len(data) == 2:
            left = [slot for slot in data if not self._matrix(op.inputs[slot])]
            return left[0] if len(left) == 1 and len(slots) == 2 else None
        return data[0] if len(data) == 1 and any(self.learned(op.inputs[slot]) for slot in slots) else None

    def maps(self, op: Op) -> bool:
        """Whether an op is a linear map, learned, at each position separately. Where what it maps has size 1, nothing is summed."""
        summed = [self.multiplied(op, a, others=True) for a in op.axes if a.role == "contracted"]
        if summed and None not in summed and len(set(summed)) == 1:
            return True
        flowing = [name for name in op.inputs if name not in self.roots]
        return op.kind == "linear" and len(flowing) == 1 and not any(a.role in ("contracted", "windowed", "opaque") for a in op.axes)

    def made(self, op: Op) -> set[str]:
        """Wires that a linear map makes."""
        picked = {slot: self.picks[name].wires for slot, name in enumerate(op.inputs) if self._matrix(name)}
        return {a.wire for a in op.axes if a.role == "created" or (
            picked and a.outs and a.ins and all(slot in picked and any(a.wire in dim for dim in picked[slot]) for slot, *_ in a.ins))}

    def weight(self, op: Op, wires: tuple[str, ...], rows: tuple[int, int, int], *, makes: bool) -> Weight:
        """Where a dimension made of these wires sits in the parameter of a linear map, that makes them or that contracts them.

        Raises:
            NoMapError: in none that can be told.
        """
        others = {a.wire for a in op.axes if a.role == "contracted"} if makes else self.made(op)
        for slot, name, root in self._matrices(op):
            tensor = self.circuit.tensor(root)
            dims = [n for n, dim in enumerate(tensor.dims) if dim == wires] or [
                n for n, dim in enumerate(tensor.dims) if len(dim) > len(wires) and dim[-len(wires) :] == wires]
            if not dims or (others and not any(wire in others for dim in tensor.dims for wire in dim)):
                continue  # a bias
            if not self._kept(name, root, wires):
                raise NoMapError
            dim, data = dims[0], self._data(op)
            before = tensor.dims[dim][: -len(wires)]
            rest = [n for n, factors in enumerate(tensor.dims) if n != dim and not set(factors) & others]
            sizes = [self.circuit.wires[wire].size for factors in (before, *(tensor.dims[n] for n in rest)) for wire in factors]
            along = [*([dim] if before else []), *(n for n in rest if tensor.shape[n] > 1)]
            found = Weight(
                root, dim, rows, self._bias(op, slot, wires) if makes else self._added(op, slot), op.name, op.fn, data,
                self._summed(op, data, () if makes else wires), self.number[op.name], self._only(op), root == name, math.prod(sizes),
                along[0] if len(along) == 1 else None)
            return found if found.along is None else replace(found, by=self._by(op, name, root, before or tensor.dims[found.along]))
        raise NoMapError

    def shared(self, weight: Weight, mine: set[str], size: int) -> Weight:
        """The same with which ops it is for, and without a module if that is not for these alone: see `Weight`.

        Args:
            mine: names of the ops that apply it for the block. size: entries that it is summed over, 0 for any number.
        """
        calls: list[bool] = []
        if weight.stacked > 1 and weight.by != ALL:  # how often it is applied depends on the data
            return replace(weight, module=None)
        for op in self.circuit.ops:
            if op.fn == weight.fn and any(weight.parameter in self.sources(name) for name in op.inputs):
                name = op.inputs[weight.operand] if len(op.inputs) > weight.operand else ""
                shape = self.circuit.tensor(name).shape if name and not self.fixed(name) else ()
                if len(shape) >= -weight.axis and size in (0, shape[weight.axis]):
                    calls.append(op.name in mine)
        return weight if all(calls) else replace(weight, module=None, calls=tuple(calls))

    def _kept(self, name: str, root: str, wires: tuple[str, ...]) -> bool:
        """Whether what is computed of a parameter has, for each index of these wires, what comes of the entry at its place."""
        maker = self._maker(name)
        if maker is None:
            return True
        moved = any(a.wire in wires and not (a.ins and a.outs and a.role in (*PASSING_ROLES, "created", "normalised")) for a in maker.axes)
        ahead = [other for other in maker.inputs if root in self.sources(other) and any(
            wire in wires for dim in self.circuit.tensor(other).dims for wire in dim)]
        return not moved and all(self._kept(other, root, wires) for other in ahead)

    def _matrices(self, op: Op) -> Iterator[tuple[int, str, str]]:
        """(number of the input, its name, parameter or constant) that may be the matrix of a map: those picked come last."""
        inputs = list(enumerate(op.inputs))
        for slot, name in [*((s, n) for s, n in inputs if self.learned(n)), *((s, n) for s, n in inputs if self._matrix(n))]:
            for root in self.sources(name):
                yield slot, name, root

    def _data(self, op: Op) -> int:
        """Number of the input that a linear map is applied to."""
        found = [self.multiplied(op, a, others=True) for a in op.axes if a.role == "contracted"]
        flowing = [slot for slot, name in enumerate(op.inputs) if name not in self.roots and not self._matrix(name)]
        return next(slot for slot in (*found, *flowing) if slot is not None)

    def _summed(self, op: Op, data: int, wires: tuple[str, ...]) -> int:
        """The dimension of what is mapped that is summed over, counted from the end: that of these wires, if there are any."""
        axes = [a for a in op.axes if a.role == "contracted" and (not wires or a.wire in wires)]
        first = [a for a in axes if self.multiplied(op, a) is not None] or axes
        dims = [place[1] for a in first for place in a.ins if place[0] == data]
        return dims[0] - len(self.circuit.tensor(op.inputs[data]).dims) if dims else -1

    def _only(self, op: Op) -> str | None:
        """Path of the module that does nothing but this op, and views before and after it."""
        block = self.circuit.block(self.chain.get(op.name, ("",))[-1])
        others = [item for item in block.items if item != op.name]
        if block.kind == "function" or any(not isinstance(item, str) or self.circuit.op(item).kind != "reindex" for item in others):
            return None
        return _path(block.name)

    # biases -------------------------------------------------------------------------------------------

    def bias(self, name: str, wires: tuple[str, ...]) -> str:
        """The parameter, or constant, that adds an entry to each index of a dimension made of these wires; "" if a tensor is none.

        It may have one for each of many experts.
        """
        sources = self.sources(name)
        dims = [dim for dim in self.circuit.tensor(sources[0]).dims if dim] if len(sources) == 1 else []
        while (op := self._maker(name)) is not None:
            if op.kind not in ("reindex", "index", "gather"):
                return ""
            name = op.inputs[0]
        return sources[0] if dims and len(dims) < 3 and dims[-1] == wires else ""

    def _bias(self, op: Op, weight: int, wires: tuple[str, ...]) -> str:
        found = (self.bias(name, wires) for slot, name in enumerate(op.inputs) if slot != weight and self.fixed(name))
        return next((name for name in found if name), "")

    def _added(self, op: Op, weight: int) -> str:
        """The output bias of a value map."""
        extra = [self.sources(name)[0] for slot, name in enumerate(op.inputs) if slot != weight and (self.learned(name) or name in self.picks)]
        return extra[0] if extra else ""

    # one of many --------------------------------------------------------------------------------------

    def _by(self, op: Op, name: str, root: str, experts: tuple[str, ...]) -> str:
        """What picks one of many maps, along these wires of a parameter, for an op that takes this tensor; see `Weight.by`."""
        by = ALL
        if "grouped_mm" in op.fn:
            ends = [other for other in op.inputs if not self.fixed(other) and self.circuit.tensor(other).dtype in ("int32", "int64")]
            by = ends[0] if len(ends) == 1 and experts in self.circuit.tensor(name).dims else ""
        while by and (maker := self._maker(name)) is not None:
            source = next(other for other in maker.inputs if root in self.sources(other))
            if experts in self.circuit.tensor(source).dims and experts not in self.circuit.tensor(name).dims:
                by = self._unviewed(maker.inputs[1]) if maker.kind == "gather" and name in self.picks else self._constant(maker, name, source, experts)
            elif maker.kind not in ("reindex", "elementwise") or any(a.wire in experts and not a.passes for a in maker.axes):
                by = ""  # other experts, or in another order
            name = source
        return by

    def _constant(self, op: Op, name: str, source: str, experts: tuple[str, ...]) -> str:
        """The number that a view picks one of many with: it is made of numbers in their place."""
        tensor = self.circuit.tensor(source)
        if op.kind not in ("index", "slice") or len(op.inputs) != 1 or tensor.dims.count(experts) != 1:
            return ""
        at = tensor.dims.index(experts)
        numbers = torch.arange(tensor.shape[at], device="cpu").view([-1 if n == at else 1 for n in range(len(tensor.dims))])
        try:
            result: Any = view(self.circuit, op, [numbers])
        except NoViewError:
            return ""
        found = (result if isinstance(result, (tuple, list)) else (result,))[op.outputs.index(name)]
        return str(int(found)) if isinstance(found, torch.Tensor) and found.numel() == 1 else ""

    def rows_picked(self, weight: Weight) -> bool:
        """Whether what a map reads was picked by an index from rows that count examples first."""
        first = {next((wire for dim in self.circuit.tensor(name).dims for wire in dim), "") for name in self.circuit.inputs}
        name = self.circuit.op(weight.op).inputs[weight.operand]
        while (op := self._maker(name)) is not None and op.inputs:
            if op.kind == "gather" and op.inputs[0] not in self.roots:
                source = self.circuit.tensor(op.inputs[0])
                if len(source.dims) > 1 and next((wire for dim in source.dims[:-1] for wire in dim), "") in first:
                    return True
                name = source.name
                continue
            flowing = [other for other in op.inputs if other not in self.roots]
            if op.kind == "elementwise":
                flowing = [other for other in flowing if self.circuit.tensor(other).dims == self.circuit.tensor(name).dims]
            if len(flowing) != 1 or op.kind not in ("elementwise", "reindex", "slice", "index"):
                return False
            name = flowing[0]
        return False

    # paths --------------------------------------------------------------------------------------------

    def module_of(self, op: str) -> str:
        """Path of the innermost module that an op runs in."""
        return _path(self.chain.get(op, ("",))[-1])

    def smallest(self, ops: list[str]) -> str:
        """Path of the smallest module in which all of these ops run."""
        chains = [self.chain.get(op, ("",)) for op in ops]
        shared = ""
        for level in zip(*chains, strict=False):
            if len(set(level)) > 1:
                break
            shared = level[0]
        return _path(shared)


def _within(block: Any, above: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    yield block, above
    for item in block.items:
        if not isinstance(item, str):
            yield from _within(item, (*above, block.name))


def _path(block: str) -> str:
    """Path of the module of a block: without a function's name and the number of the call."""
    return block.partition("/")[0].partition("#")[0]
