"""Feed-forward blocks of a circuit, found from the wires alone: nobody names layers by hand.

A feed-forward block is a hidden wire that linear maps make at each position separately, that only elementwise functions
act on, and that linear maps contract: ``FFN(x) = Σ_j act(x·K_j + b_j) V_j + c`` or, gated,
``h_j = act(x·G_j)(x·U_j)``. Neuron ``j`` has a key ``K_j`` (and a gate ``G_j``), an activation ``h_j`` and a value ``V_j``
(Geva et al., *Transformer Feed-Forward Layers Are Key-Value Memories*, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from circuitlab.analysis.views import NoViewError, view
from circuitlab.circuit import Axis, Circuit, Op, Tensor, Wire

_LINEAR = frozenset(
    "add add_ sub sub_ rsub neg negative dropout dropout1d dropout2d alpha_dropout to float half bfloat16 double type type_as "
    "clone contiguous detach mul mul_ multiply div div_ true_divide divide lerp where addcmul masked_fill masked_fill_ pad batch_norm "
    "instance_norm".split()
)
"""Elementwise functions that are linear in the wire, as long as what they multiply by is not made of it as well."""

_PRODUCTS = frozenset("mul mul_ multiply div div_ true_divide divide addcmul".split())
_SUMS = frozenset("add add_ sub sub_ rsub".split())
_ZEROS = frozenset("relu relu_ relu6 threshold threshold_ hardtanh hardswish hardshrink softshrink".split())
"""Functions that are exactly zero on a half-line, or on an interval around zero."""
_KEEP_ZERO = frozenset("pow square mul mul_ multiply div div_ sqrt abs".split())


@dataclass(frozen=True)
class Weight:
    """Where the neurons of a wire sit in one linear map.

    Attributes:
        parameter: name.
        dim: its dimension along which the neurons lie.
        rows: (start, stop, step) of the neurons along that dimension.
        bias: name of the bias that has the same rows, "" if there is none.
        op: name of the op that applies it first, and fn: its torch function.
        operand: number of the tensor among that op's inputs that is multiplied, and axis: its dimension that is summed
            over, counted from the end.
        order: number of that op in the run.
        module: path of the module that does this map and nothing else, None if there is none.
        direct: the op takes the parameter itself, not something computed from it (weight norm, a merged adapter).
        stacked: number of such maps in the parameter, as of experts; 1 if it is one matrix.
        along: the dimension of the parameter that counts them, None if there is not one.
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
    calls: tuple[bool, ...] = ()

    def of(self, tensor: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """The neurons' rows of the parameter, of shape (neurons, what else the parameter has); those of one expert where many are stacked."""
        start, stop, step = self.rows
        if expert is not None and self.along is not None:
            if tensor.ndim < 3:  # a bias
                return tensor[expert][start:stop:step, None]
            tensor = tensor.movedim(self.dim, 0).select(self.along + (self.along < self.dim), expert)
            return tensor[start:stop:step].flatten(1)
        return tensor.movedim(self.dim, 0)[start:stop:step].flatten(1) if tensor.ndim > 1 else tensor[start:stop:step, None]


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block.

    Attributes:
        path: of the smallest module that holds it.
        wire: name of the hidden wire.
        size: number of neurons.
        keys: the maps that make the wire; for a gated block those without the activation ("up").
        gates: the maps whose product with the input goes through the activation and gates the keys'; () if not gated.
        values: the maps that contract the wire.
        activation: names of the functions between, in order, such as "gelu".
        zeros: whether the activation is exactly zero on a part of its range, as ReLU is.
        scales: parameters and buffers of the wire between keys and values (batch norm, learned scales).
        positions: wires of the other dimensions of what the first value map multiplies, slowest first.
        batch: number of that dimension of these which counts examples, None if there is none.
        seen: whether the wire's values are returned by the model as well.
        expert: which of the stacked experts, None for all of them.
        experts: number of that dimension of positions which counts the stacked experts, None if none does.
        picked: whether its inputs are picked by an index from a matrix whose rows count examples first, as for experts.
    """

    path: str
    wire: str
    size: int
    keys: tuple[Weight, ...]
    gates: tuple[Weight, ...]
    values: tuple[Weight, ...]
    activation: str = ""
    zeros: bool = False
    scales: tuple[str, ...] = ()
    positions: tuple[tuple[str, ...], ...] = ()
    batch: int | None = None
    seen: bool = False
    expert: int | None = None
    experts: int | None = None
    picked: bool = False

    @property
    def gated(self) -> bool:
        """Whether the block is gated (SwiGLU, GEGLU and the like)."""
        return bool(self.gates)

    @property
    def stacked(self) -> int:
        """Number of experts whose neurons share the wire's numbering; 1 for an ordinary block."""
        return max(weight.stacked for weight in (*self.keys, *self.gates, *self.values))

    @property
    def first(self) -> tuple[Weight, ...]:
        """The maps before the activation: gates of a gated block, else keys."""
        return self.gates or self.keys


class _NoBlockError(Exception):
    """What was looked at is no feed-forward block."""


def ffn(circuit: Circuit) -> dict[str, Wire]:
    """Module path -> hidden wire of every feed-forward block of a circuit, in the order of the run.

    Blocks that stand side by side in one module, as in an MLP of three layers, go by the path of the map that makes
    their wire.
    """
    return {path: circuit.wires[found.wire] for path, found in blocks(circuit).items()}


def blocks(circuit: Circuit) -> dict[str, FeedForward]:
    """Module path -> `FeedForward`, as `ffn`."""
    search = _Search(circuit)
    found: list[FeedForward] = []
    mine: list[tuple[set[str], set[str]]] = []  # the ops of each: into the wire, and out of it
    for op in circuit.ops:
        for axis in op.axes:
            for block in search.read_by(op, axis) if axis.role == "contracted" else ():
                at = next((n for n, known in enumerate(found) if _again(known, block, mine[n][0])), len(found))
                if at == len(found):
                    found.append(block)
                    mine.append((set(), set()))
                elif block.values[0].parameter not in [value.parameter for value in found[at].values]:
                    found[at] = replace(found[at], values=(*found[at].values, *block.values), path=search.common(found[at].path, block.path))
                elif found[at].activation != block.activation:  # the same weights again, activated in another way
                    names = " ".join(dict.fromkeys(f"{found[at].activation} {block.activation}".split()))
                    found[at] = replace(found[at], activation=names, zeros=found[at].zeros and block.zeros)
                mine[at][0].update(w.op for w in (*block.keys, *block.gates))
                mine[at][1].update(value.op for value in block.values)
    paths, wires = ([getattr(block, name) for block in found] for name in ("path", "wire"))
    named: dict[str, FeedForward] = {}
    for block, ops in zip(found, mine, strict=True):
        path = block.path
        if paths.count(path) > 1:
            path = search.module_of(block.keys[0].op)
        if path in named:
            path = block.wire if wires.count(block.wire) == 1 else f"{path}#{len(named) + 1}"
        into, out = ops
        maps = {kind: tuple(search.shared(weight, into, 0) for weight in getattr(block, kind)) for kind in ("keys", "gates")}
        maps["values"] = tuple(search.shared(weight, out, block.size) for weight in block.values)
        named[path] = replace(block, path=path, **maps)
    return named


def _again(known: FeedForward, block: FeedForward, ops: set[str]) -> bool:
    """Whether a block is one that is known: another map that reads its values, or a further call of its maps."""
    one, two = ({w.parameter + str(w.rows) for w in (*some.keys, *some.gates)} for some in (known, block))
    return one == two and (block.values[0].parameter in [value.parameter for value in known.values]
                           or any(w.op in ops for w in (*block.keys, *block.gates)))


@dataclass
class _Piece:
    """A tensor of the region: the sources it is made of, and what has been done to them."""

    sources: frozenset[str]
    functions: tuple[str, ...] = ()
    bent: bool = False


class _Search:
    """Looks for feed-forward blocks in one circuit."""

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.number = {op.name: number for number, op in enumerate(circuit.ops)}
        self.chain: dict[str, tuple[str, ...]] = {}
        for block, above in _within(circuit.root, ()):
            for item in block.items:
                if isinstance(item, str):
                    self.chain[item] = (*above, block.name)
        self.roots: dict[str, tuple[str, ...]] = {}
        for tensor in circuit.tensors:
            if tensor.kind in ("parameter", "buffer", "constant"):
                self.roots[tensor.name] = (tensor.name,)
        for op in circuit.ops:
            if op.inputs and all(name in self.roots for name in op.inputs):
                both = tuple(dict.fromkeys(root for name in op.inputs for root in self.roots[name]))
                self.roots.update(dict.fromkeys(op.outputs, both))

    # from a contraction back ---------------------------------------------------------------------------

    def read_by(self, op: Op, axis: Axis) -> Iterator[FeedForward]:
        """The block whose wire is contracted here, if there is one."""
        data = self._multiplied(op, axis)
        if data is None:
            return
        try:
            yield _Region(self, op, axis, data).block()
        except _NoBlockError:
            return

    def _multiplied(self, op: Op, axis: Axis, others: bool = False) -> int | None:
        """Number of the input that a linear map contracts, None if the op is no linear map at each position.

        With ``others``, it may sum over other wires as well.
        """
        if op.kind == "scan" or any(a.role in ("windowed", "opaque") for a in op.axes) or (not others and sum(a.role == "contracted" for a in op.axes) > 1):
            return None
        slots = {place[0] for place in axis.ins}
        data = [slot for slot in slots if op.inputs[slot] not in self.roots]
        learned = [slot for slot in slots if self.learned(op.inputs[slot])]
        return data[0] if len(data) == 1 and learned else None

    def maps(self, op: Op) -> bool:
        """Whether an op is a linear map, learned, at each position separately. Where what it maps has size 1, nothing is summed."""
        summed = [self._multiplied(op, a, others=True) for a in op.axes if a.role == "contracted"]
        if summed and None not in summed and len(set(summed)) == 1:
            return True
        flowing = [name for name in op.inputs if name not in self.roots]
        return op.kind == "linear" and len(flowing) == 1 and not any(a.role in ("contracted", "windowed", "opaque") for a in op.axes)

    def learned(self, name: str) -> bool:
        """Whether a tensor is a parameter, or computed from parameters and constants alone."""
        return any(self.circuit.tensor(root).kind == "parameter" for root in self.roots.get(name, ()))

    def weight(self, op: Op, wires: tuple[str, ...], rows: tuple[int, int, int], axis_role: str) -> Weight:
        """Where a dimension made of these wires sits in the parameter of a linear map."""
        others = {a.wire for a in op.axes if a.role == ("contracted" if axis_role == "created" else "created")}
        for slot, name in enumerate(op.inputs):
            if not self.learned(name):
                continue
            for root in self.roots[name]:
                tensor = self.circuit.tensor(root)
                dims = [dim for dim, factors in enumerate(tensor.dims) if factors == wires]
                if not dims or (others and not any(wire in others for dim in tensor.dims for wire in dim)):
                    continue  # a bias
                data = next((n for a in op.axes if a.role == "contracted" for n, *_ in a.ins if op.inputs[n] not in self.roots),
                            next(n for n, other in enumerate(op.inputs) if other not in self.roots))
                rest = [n for n, dim in enumerate(tensor.dims) if dim != wires and not set(dim) & others]
                stacked = math.prod(self.circuit.wires[wire].size for n in rest for wire in tensor.dims[n])
                along = [n for n in rest if tensor.shape[n] > 1]
                summed = [place[1] for a in op.axes if a.role == "contracted" for place in a.ins if place[0] == data]
                axis = summed[0] - len(self.circuit.tensor(op.inputs[data]).dims) if summed else -1
                return Weight(root, dims[0], rows, self._bias(op, slot, wires) if axis_role == "created" else self._added(op, slot),
                              op.name, op.fn, data, axis, self.number[op.name], self._only(op), root == name, stacked,
                              along[0] if len(along) == 1 else None)
        raise _NoBlockError

    def shared(self, weight: Weight, mine: set[str], size: int) -> Weight:
        """The same with which ops it is for, and without a module if that is not for these alone. See `Tap`."""
        calls: list[bool] = []
        for op in self.circuit.ops:
            if op.fn == weight.fn and any(weight.parameter in self.roots.get(name, ()) for name in op.inputs):
                name = op.inputs[weight.operand] if len(op.inputs) > weight.operand else ""
                shape = self.circuit.tensor(name).shape if name and name not in self.roots else ()
                if len(shape) >= -weight.axis and size in (0, shape[weight.axis]):
                    calls.append(op.name in mine)
        return weight if all(calls) else replace(weight, module=None, calls=tuple(calls))

    def _only(self, op: Op) -> str | None:
        """Path of the module that does nothing but this op, and views before and after it."""
        block = self.circuit.block(self.chain.get(op.name, ("",))[-1])
        others = [item for item in block.items if item != op.name]
        if block.kind == "function" or any(not isinstance(item, str) or self.circuit.op(item).kind != "reindex" for item in others):
            return None
        return _module(block.name)

    def _bias(self, op: Op, weight: int, wires: tuple[str, ...]) -> str:
        for slot, name in enumerate(op.inputs):
            if slot != weight and name in self.roots and self.circuit.tensor(name).dims == (wires,):
                return name
        return ""

    def _added(self, op: Op, weight: int) -> str:
        """The output bias of a value map."""
        extra = [name for slot, name in enumerate(op.inputs) if slot != weight and self.learned(name)]
        return extra[0] if extra else ""

    def picked(self, weight: Weight) -> bool:
        """Whether what a map reads was picked by an index from a matrix whose rows count examples first."""
        tensor = self.circuit.tensor(self.circuit.op(weight.op).inputs[weight.operand])
        while tensor.op:
            op = self.circuit.op(tensor.op)
            source = self.circuit.tensor(op.inputs[0]) if op.inputs else tensor
            if op.kind in ("gather", "index") and len(source.dims) == 2 and source.name not in self.roots:
                return bool(source.dims[0]) and self.circuit.wires[source.dims[0][0]].kind == "batch"
            flowing = [name for name in op.inputs if name not in self.roots]
            if len(flowing) != 1 or op.kind not in ("elementwise", "reindex"):
                return False
            tensor = self.circuit.tensor(flowing[0])
        return False

    # paths --------------------------------------------------------------------------------------------

    def module_of(self, op: str) -> str:
        """Path of the innermost module that an op runs in."""
        return _module(self.chain.get(op, ("",))[-1])

    def smallest(self, ops: list[str]) -> str:
        """Path of the smallest module in which all of these ops run."""
        chains = [self.chain.get(op, ("",)) for op in ops]
        shared = ""
        for level in zip(*chains, strict=False):
            if len(set(level)) > 1:
                break
            shared = level[0]
        return _module(shared)

    def common(self, one: str, two: str) -> str:
        """The path that two paths begin with."""
        a, b = one.split("."), two.split(".")
        return ".".join(x for n, x in enumerate(a[: len(b)]) if a[: n + 1] == b[: n + 1])


class _Region:
    """The ops between the maps that make a wire and one that contracts it."""

    def __init__(self, search: _Search, reader: Op, axis: Axis, data: int) -> None:
        self.search = search
        self.circuit = search.circuit
        self.reader, self.wire, self.data = reader, axis.wire, data
        self.hidden = self.circuit.tensor(reader.inputs[data])
        where = [place for place in axis.ins if place[0] == data]
        if len(where) != 1 or self.hidden.dims[where[0][1]] != (self.wire,):
            raise _NoBlockError
        self.dim = where[0][1]
        self.pieces: dict[str, _Piece] = {}
        self.sources: dict[str, tuple[Op, tuple[str, ...], tuple[int, int, int]]] = {}
        self.ops: dict[str, Op] = {}
        self.scales: dict[str, None] = {}
        self.biases: dict[str, str] = {}
        self.group: dict[str, str] = {}
        self.activated: set[str] = set()

    def block(self) -> FeedForward:
        whole = self._piece(self.hidden)
        self._alone()
        gates, keys = self._branches(whole)
        value = self.search.weight(self.reader, (self.wire,), (0, self.circuit.wires[self.wire].size, 1), "contracted")
        names = [name for name in whole.functions if name not in _LINEAR] or ["mul"]  # bilinear
        bent = [name for name in names if name not in _KEEP_ZERO]
        positions = tuple(dim for n, dim in enumerate(self.hidden.dims) if n != self.dim)
        return FeedForward(
            path=self.search.smallest([self.reader.name, *(op.name for op, _, _ in self.sources.values())]),
            wire=self.wire, size=self.circuit.wires[self.wire].size,
            keys=keys, gates=gates, values=(value,), activation=" ".join(dict.fromkeys(names)),
            zeros=bool(bent) and bent[-1] in _ZEROS, scales=tuple(self.scales),
            positions=positions,
            batch=next((n for n, dim in enumerate(positions) if dim and self.circuit.wires[dim[0]].kind == "batch"), None),
            seen=any(name in self.circuit.outputs for name in self.pieces),
            experts=None if value.along is None else next(
                (n for n, dim in enumerate(positions) if dim == self.circuit.tensor(value.parameter).dims[value.along]), None),
            picked=self.search.picked((gates or keys)[0]),
        )

    def _piece(self, tensor: Tensor) -> _Piece:
        if tensor.name not in self.pieces:
            self.pieces[tensor.name] = self._found(tensor)
        return self.pieces[tensor.name]

    def _found(self, tensor: Tensor) -> _Piece:
        if tensor.kind != "value" or not tensor.op:
            raise _NoBlockError
        op = self.circuit.op(tensor.op)
        self.ops[op.name] = op
        if self._makes(op):
            return self._source(tensor, [(op, [])])
        if not _carries(tensor, self.wire):
            raise _NoBlockError
        if op.fn == "glu":
            return self._glu(tensor, op)
        if not _passes_all(op):
            return self._source(tensor, self._cut(tensor))
        children: list[_Piece] = []
        held: list[str] = []
        for name in op.inputs:
            inner = self.circuit.tensor(name)
            if not _carries(inner, self.wire):
                if name not in self.search.roots and any(self._part(wire) for dim in inner.dims for wire in dim):
                    return self._source(tensor, self._cut(tensor))
                continue
            if name in self.search.roots:
                held.append(name)
            else:
                children.append(self._piece(inner))
        if not children:
            raise _NoBlockError
        for name in held:
            source = min(children[0].sources)
            if op.fn in ("add", "add_") and not children[0].bent and len(children[0].sources) == 1 and source not in self.biases:
                self.biases[source] = self.search.roots[name][0]
            else:
                self.scales.update(dict.fromkeys(self.search.roots[name]))
        return self._joined(op, children)

    def _glu(self, tensor: Tensor, op: Op) -> _Piece:
        """The first half of a tensor, gated by the sigmoid of the second."""
        inner = self._cut(self.circuit.tensor(op.inputs[0]))
        halves = [self._source(tensor, [(maker, [*between, op]) for maker, between in inner], half) for half in (0, 1)]
        self.activated |= {self._leader(source) for source in halves[1].sources}
        return _Piece(halves[0].sources | halves[1].sources, ("sigmoid",), True)

    def _joined(self, op: Op, children: list[_Piece]) -> _Piece:
        """What an elementwise op makes of pieces: a sum is one branch, a product of different branches a gate."""
        sources = frozenset[str]().union(*(child.sources for child in children))
        functions = tuple(dict.fromkeys(name for child in children for name in child.functions))
        bent = any(child.bent for child in children)
        if op.fn in _PRODUCTS and len(children) > 1:
            # of a value with what was made of it: an activation written out
            bent = bent or bool(set.intersection(*({self._leader(s) for s in child.sources} for child in children)))
        elif op.fn in _LINEAR or op.kind == "reindex":
            each = [{self._leader(source) for source in child.sources} for child in children]
            if any(one != each[0] for one in each):
                if bent or any(len(one) > 1 for one in each):
                    raise _NoBlockError  # a sum of what is multiplied, or already activated, with something else
                self.group.update({self._leader(other): self._leader(min(sources)) for other in sources})
        else:
            bent = True
            if len({self._leader(source) for source in sources}) > 1:
                raise _NoBlockError  # a function of more than one pre-activation
        leaders = {self._leader(source) for source in sources}
        if bent and len(leaders) == 1:
            self.activated |= leaders
        return _Piece(sources, (*functions, op.fn) if op.kind != "reindex" else functions, bent)

    def _leader(self, source: str) -> str:
        while self.group.get(source, source) != source:
            source = self.group[source]
        return source

    def _makes(self, op: Op) -> bool:
        """Whether a linear map makes the wire here."""
        if not self.search.maps(op):
            return False
        made = {a.wire for a in op.axes if a.role == "created"}
        if self.wire in made and any(a.role == "contracted" and a.wire == self.wire for a in op.axes):
            raise _NoBlockError  # a recurrence, or a stream that is written to
        return self.wire in made or any(self._part(wire) for wire in made)

    def _part(self, wire: str) -> bool:
        """Whether the wire is a part of this one."""
        return any(self.wire in wires for _, _, wires in self.circuit.wires[wire].parts)

    def _cut(self, tensor: Tensor) -> list[tuple[Op, list[Op]]]:
        """The linear maps that a tensor was cut out of, their outputs being added, and the ops between each and the tensor."""
        op = self.circuit.op(tensor.op) if tensor.op else None
        if op is None:
            raise _NoBlockError
        self.ops[op.name] = op
        if self._makes(op):
            return [(op, [])]
        if not (_passes_all(op) or op.kind in ("slice", "index")) or op.fn not in _LINEAR and op.kind not in ("reindex", "slice", "index"):
            raise _NoBlockError
        if op.kind == "elementwise":
            self.scales.update(dict.fromkeys(root for name in op.inputs for root in self.search.roots.get(name, ())))
        flowing = [self.circuit.tensor(name) for name in op.inputs if name not in self.search.roots]
        if len(flowing) != 1 and op.fn not in _SUMS:
            raise _NoBlockError  # multiplied with something that is not learned, such as the norm of the whole
        flowing = [inner for inner in flowing if len(flowing) == 1 or not self._chosen(inner)]
        found = [(maker, [*between, op]) for inner in flowing for maker, between in self._cut(inner)]
        if not 0 < len(found) < 16:
            raise _NoBlockError
        return found

    def _chosen(self, tensor: Tensor) -> bool:
        """Whether a tensor is a row of a learned one, by a number that is computed: the bias of an expert."""
        op = self.circuit.op(tensor.op) if tensor.op else None
        return op is not None and op.kind in ("index", "gather", "embedding") and self.search.learned(op.inputs[0])

    def _source(self, tensor: Tensor, makers: list[tuple[Op, list[Op]]], half: int = 0) -> _Piece:
        """What linear maps make, alone or, all of them, added; of a gated linear unit the first half, or the second."""
        names: list[str] = []
        for number, (op, between) in enumerate(makers):
            made = self.circuit.tensor(op.outputs[0])
            created = {a.wire for a in op.axes if a.role == "created"}
            dim = next((n for n, wires in enumerate(made.dims)
                        if set(wires) & created and (self.wire in wires or any(self._part(w) for w in wires))), None)
            if dim is None:
                raise _NoBlockError
            rows = (0, made.shape[dim], 1) if not between else self._rows(made, dim, between, tensor, half)
            if len(range(*rows)) != self.circuit.wires[self.wire].size:
                raise _NoBlockError
            names.append("+".join([tensor.name, *(["gate"] if half else []), *([str(number)] if number else [])]))
            self.sources[names[-1]] = (op, made.dims[dim], rows)
        self.group.update(dict.fromkeys(names[1:], names[0]))
        return _Piece(frozenset(names))

    def _rows(self, made: Tensor, dim: int, between: list[Op], wanted: Tensor, half: int = 0) -> tuple[int, int, int]:
        """Which entries of a map's output a tensor cut out of it holds: the calls are made on numbered entries."""
        shape = [1] * len(made.shape)
        shape[dim] = -1
        tags = torch.arange(made.shape[dim]).view(shape).expand(made.shape)
        known: dict[str, Any] = {made.name: tags}
        for op in between:
            if op.fn == "glu":
                along = next(place[1] for axis in op.axes if axis.role == "joined" for place in axis.ins)
                known[op.outputs[0]] = known[op.inputs[0]].chunk(2, along)[half]
                continue
            if _passes_all(op) and op.kind == "elementwise":
                source = next(known[name] for name in op.inputs if name in known)
                known.update(dict.fromkeys(op.outputs, source))
                continue
            if any(name not in known for name in op.inputs):
                raise _NoBlockError
            try:
                result = view(self.circuit, op, [known[name] for name in op.inputs])
            except NoViewError:
                raise _NoBlockError from None
            results = result if isinstance(result, (tuple, list)) else (result,)
            known.update(zip(op.outputs, results, strict=False))
        found = known.get(wanted.name)
        if found is None or tuple(found.shape) != wanted.shape:
            raise _NoBlockError
        at = next((n for n, wires in enumerate(wanted.dims) if wires == (self.wire,)), None)
        if at is None:
            raise _NoBlockError
        line = found.movedim(at, -1).flatten(0, -2)
        first = line[0].tolist()
        step = first[1] - first[0] if len(first) > 1 else 1
        rows = (first[0], first[-1] + 1, step)
        if step < 1 or list(range(*rows)) != first or not bool((line == line[0]).all()):
            raise _NoBlockError
        return rows

    # the whole ------------------------------------------------------------------------------------------

    def _read(self, name: str) -> None:
        """All that reads the wire's values contracts it, if need be after a cast, a dropout or a scale."""
        for reader in self.circuit.consumers.get(name, ()):
            op = self.circuit.op(reader)
            if reader in self.ops or any(
                a.role == "contracted" and a.wire == self.wire and self.search._multiplied(op, a) is not None for a in op.axes
            ):
                continue
            flowing = [other for other in op.inputs if other not in self.search.roots]
            if len(flowing) > 1 or not _passes_all(op) or not (op.fn in _LINEAR or op.kind == "reindex"):
                raise _NoBlockError
            for output in op.outputs:
                self._read(output)

    def _alone(self) -> None:
        """The wire's values are read by the block alone: a residual stream, which others read as well, is none."""
        for name in self.pieces:
            self._read(name)
        makers = {op.name for op, _, _ in self.sources.values()}
        reached = set(self.pieces)
        numbers = [self.search.number[name] for name in makers]
        for op in self.circuit.ops[min(numbers) : max(numbers) + 1]:
            if any(name in reached for name in op.inputs):
                if op.name in makers:
                    raise _NoBlockError  # what is read of the wire is written to it again
                reached.update(op.outputs)

    def _branches(self, whole: _Piece) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
        """Gates and keys."""
        order = self.search.number
        branches: dict[str, list[str]] = {}
        for source in sorted(self.sources, key=lambda name: (order[self.sources[name][0].name], self.sources[name][2])):
            branches.setdefault(self._leader(source), []).append(source)
        activated = {self._leader(source) for source in self.activated}
        first = [leader for leader in branches if leader in activated]
        if len(branches) == 1:
            if not whole.bent:
                raise _NoBlockError
            return (), self._weights(next(iter(branches.values())))
        gates = first if 0 < len(first) < len(branches) else [next(iter(branches))]
        return (self._weights([s for leader in gates for s in branches[leader]]),
                self._weights([s for leader in branches if leader not in gates for s in branches[leader]]))

    def _weights(self, sources: list[str]) -> tuple[Weight, ...]:
        found: list[Weight] = []
        for name in sources:
            weight = self.search.weight(*self.sources[name], "created")
            if name in self.biases and weight.bias:
                self.scales[self.biases[name]] = None
            found.append(weight if weight.bias else replace(weight, bias=self.biases.get(name, "")))
        return tuple(found)


def _carries(tensor: Tensor, wire: str) -> bool:
    return any(wire in dim for dim in tensor.dims)


def _passes_all(op: Op) -> bool:
    """Whether an op does the same to every index of every axis, separately.

    Where an axis has size 1 it is no wire, so that a sum over it is told by the op's kind alone.
    """
    return op.kind in ("elementwise", "reindex", "norm", "box", "random", "create") and all(axis.passes for axis in op.axes)


def _within(block: Any, above: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    yield block, above
    for item in block.items:
        if not isinstance(item, str):
            yield from _within(item, (*above, block.name))


def _module(block: str) -> str:
    """Path of the module of a block: without a function's name and the number of the call."""
    return block.partition("/")[0].partition("#")[0]
