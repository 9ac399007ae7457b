"""The ops between the linear maps that make a hidden wire and one that contracts it, walked back from there.

What stands between may only do the same to every neuron separately. A sum of what maps make is one branch; a product of different
branches is a gate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from circuitlab.analysis.maps import ALL, Maps, NoMapError, Pick, Weight
from circuitlab.analysis.views import NoViewError, view
from circuitlab.circuit import Axis, Dims, Op, Tensor

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
_CLIPS = frozenset("clamp clamp_ clip clip_ clamp_min clamp_max hardtanh".split())
_KEEP_ZERO = frozenset("pow square mul mul_ multiply div div_ sqrt abs".split())


@dataclass
class _Piece:
    """A tensor of the region: the sources it is made of, and what has been done to them."""

    sources: frozenset[str]
    functions: tuple[str, ...] = ()
    bent: bool = False


class Region:
    """The ops between the maps that make a wire and one that contracts it.

    Args:
        maps: of the circuit.
        reader: the map that contracts the wire, axis: where, and data: number of its input that has the wire.

    Attributes:
        keys, gates, value: maps, as of a `FeedForward`.
        activation: functions between, in order. zeros: whether they give exact zeros on a part of their range.
        scales: parameters and buffers between.
        positions: wires of the other dimensions of what the value map multiplies.
        seen: whether the wire's values are returned by the model as well.
        told: whether it is known which of stacked maps each position meets.
        ops: names of the maps.

    Raises:
        NoMapError: something else happens between.
    """

    def __init__(self, maps: Maps, reader: Op, axis: Axis, data: int) -> None:
        self.maps = maps
        self.circuit = maps.circuit
        self.reader, self.wire, self.data = reader, axis.wire, data
        hidden = self.circuit.tensor(reader.inputs[data])
        where = [place for place in axis.ins if place[0] == data]
        if len(where) != 1 or hidden.dims[where[0][1]] != (self.wire,):
            raise NoMapError
        self.pieces: dict[str, _Piece] = {}
        self.sources: dict[str, tuple[Op, tuple[str, ...], tuple[int, int, int]]] = {}
        self.between: dict[str, Op] = {}
        self.scales: dict[str, None] = {}
        self.biases: dict[str, tuple[str, Pick | None]] = {}
        self.rows: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.taken: dict[Dims, tuple[str, int]] = {}
        self.group: dict[str, str] = {}
        self.activated: list[tuple[str, tuple[str, ...]]] = []
        self.positions = tuple(dim for n, dim in enumerate(hidden.dims) if n != where[0][1])
        whole = self._piece(hidden)
        self._alone()
        self.value = maps.weight(reader, (self.wire,), (0, self.circuit.wires[self.wire].size, 1), makes=False)
        self.gates, self.keys = self._branches(whole)
        names = [name for name in whole.functions if name not in _LINEAR] or ["mul"]  # bilinear
        bent = [name for name in names if name not in _KEEP_ZERO]
        self.activation = " ".join(dict.fromkeys(names))
        self.zeros = bool(bent) and bent[-1] in _ZEROS
        self.seen = any(name in self.circuit.outputs for name in self.pieces)
        self.ops = [reader.name, *(op.name for op, _, _ in self.sources.values())]

    @property
    def experts(self) -> int | None:
        """Number of that dimension of positions which counts stacked maps."""
        value = self.value
        if value.along is None:
            return None
        counted = self.circuit.tensor(value.parameter).dims[value.along]
        counted = counted[:-1] if value.along == value.dim else counted
        return next((n for n, dim in enumerate(self.positions) if dim == counted), None)

    @property
    def told(self) -> bool:
        """Whether it is known which of stacked maps each position meets."""
        every, by = [weight for weight in (*self.keys, *self.gates, self.value) if weight.stacked > 1], self.value.by
        sizes = {weight.stacked for weight in every}
        if not every:
            return True
        if not by or any(weight.along is None or weight.by != by for weight in every):
            return False
        if by == ALL or "grouped_mm" in self.value.fn:
            return len(sizes) == 1 and (by != ALL or self.experts is not None)
        if by.isdecimal():
            return True
        picks = [self.maps.picks[name] for name in self.reader.inputs if name in self.maps.picks and self.maps.picks[name].index == by]
        return any(pick.dims in ((), tuple(dim for dim in self.positions if dim)) for pick in picks)

    def _piece(self, tensor: Tensor) -> _Piece:
        if tensor.name not in self.pieces:
            self.pieces[tensor.name] = self._found(tensor)
        return self.pieces[tensor.name]

    def _found(self, tensor: Tensor) -> _Piece:
        if tensor.kind != "value" or not tensor.op:
            raise NoMapError
        op = self.circuit.op(tensor.op)
        self.between[op.name] = op
        if self._makes(op):
            return self._source(tensor, [(op, [])])
        if not _carries(tensor, self.wire):
            raise NoMapError
        if op.fn == "glu":
            return self._glu(tensor, op)
        if (whole := self._same_rows(op, tensor)) is not None:
            return self._piece(whole)
        if not _passes_all(op):
            return self._source(tensor, self._cut(tensor))
        children: list[_Piece] = []
        held: list[str] = []
        for name in op.inputs:
            inner = self.circuit.tensor(name)
            if not _carries(inner, self.wire):
                if not self.maps.fixed(name) and any(self._part(wire) for dim in inner.dims for wire in dim):
                    return self._source(tensor, self._cut(tensor))
                continue
            if self.maps.fixed(name):
                held.append(name)
            else:
                children.append(self._piece(inner))
        if not children:
            raise NoMapError
        for name in held:
            source = min(children[0].sources)
            sums = op.fn in ("add", "add_") and not children[0].bent and len(children[0].sources) == 1
            self._held(name, source if sums and self.sources[source][2] == (0, self.circuit.wires[self.wire].size, 1) else "", (self.wire,))
        return self._joined(op, children)

    def _held(self, name: str, source: str, wires: tuple[str, ...]) -> None:
        """A learned tensor that is added to what a source (a tensor, or a map) has made, or else scales it."""
        bias = self.maps.bias(name, wires) if source else ""
        if bias and self.biases.setdefault(source, (bias, self.maps.picks.get(name)))[0] == bias:
            return
        if name in self.maps.picks:
            raise NoMapError  # a row that depends on the data
        self.scales.update(dict.fromkeys(self.maps.sources(name)))

    def _glu(self, tensor: Tensor, op: Op) -> _Piece:
        """The first half of a tensor, gated by the sigmoid of the second."""
        inner = self._cut(self.circuit.tensor(op.inputs[0]))
        halves = [self._source(tensor, [(maker, [*between, op]) for maker, between in inner], half) for half in (0, 1)]
        self.activated += [(source, ("sigmoid",)) for source in halves[1].sources]
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
                    raise NoMapError  # a sum of what is multiplied, or already activated, with something else
                self.group.update({self._leader(other): self._leader(min(sources)) for other in sources})
        else:
            bent = True
            if len({self._leader(source) for source in sources}) > 1:
                raise NoMapError  # a function of more than one pre-activation
        leaders = {self._leader(source) for source in sources}
        if bent and len(leaders) == 1:
            self.activated.append((min(leaders), (*functions, op.fn)))
        return _Piece(sources, (*functions, op.fn) if op.kind != "reindex" else functions, bent)

    def _leader(self, source: str) -> str:
        while self.group.get(source, source) != source:
            source = self.group[source]
        return source

    def _makes(self, op: Op) -> bool:
        """Whether a linear map makes the wire here."""
        if not self.maps.maps(op):
            return False
        made = self.maps.made(op)
        if self.wire in made and any(a.role == "contracted" and a.wire == self.wire for a in op.axes):
            raise NoMapError  # a recurrence, or a stream that is written to
        return self.wire in made or any(self._part(wire) for wire in made)

    def _part(self, wire: str) -> bool:
        """Whether the wire is a part of this one."""
        return any(self.wire in wires for _, _, wires in self.circuit.wires[wire].parts)

    def _cut(self, tensor: Tensor) -> list[tuple[Op, list[Op]]]:
        """The linear maps that a tensor was cut out of, their outputs being added, and the ops between each and the tensor."""
        op = self.circuit.op(tensor.op) if tensor.op else None
        if op is None:
            raise NoMapError
        self.between[op.name] = op
        if self._makes(op):
            return [(op, [])]
        if (whole := self._same_rows(op, tensor)) is not None:
            return [(maker, [*between, op]) for maker, between in self._cut(whole)]
        if not (_passes_all(op) or op.kind in ("slice", "index")) or op.fn not in _LINEAR and op.kind not in ("reindex", "slice", "index"):
            raise NoMapError
        flowing = [self.circuit.tensor(name) for name in op.inputs if not self.maps.fixed(name)]
        if len(flowing) != 1 and op.fn not in _SUMS:
            raise NoMapError  # multiplied with something that is not learned, such as the norm of the whole
        found = [(maker, [*between, op]) for inner in flowing for maker, between in self._cut(inner)]
        if not 0 < len(found) < 16:
            raise NoMapError
        if op.kind == "index" and not any(a.wire in self.maps.made(maker) for a in op.axes if a.ins and not a.passes for maker, _ in found):
            self._taken(op, tensor, flowing[0].dims)
        for name in (name for name in op.inputs if op.kind == "elementwise" and self.maps.fixed(name)):
            wires = next((dim for dim in self.circuit.tensor(found[0][0].outputs[0]).dims if set(dim) & self.maps.made(found[0][0])), ())
            self._held(name, found[0][0].name if op.fn in ("add", "add_") else "", wires)
        return found

    def _same_rows(self, op: Op, tensor: Tensor) -> Tensor | None:
        """The operand that has a tensor's positions too, where an op takes positions apart, or puts together what was taken apart so."""
        flowing = [self.circuit.tensor(name) for name in op.inputs if not self.maps.fixed(name)]
        if op.kind not in ("slice", "cat") or any(len(inner.dims) != len(tensor.dims) for inner in flowing):
            return None
        found: list[Tensor] = []
        for inner in flowing:
            apart = [(one, two) if op.kind == "slice" else (two, one) for one, two in zip(inner.dims, tensor.dims, strict=True) if one != two]
            if len(apart) == 1 and not any(wire == self.wire or self._part(wire) for dim in apart[0] for wire in dim):
                whole, part = apart[0]
                if op.kind == "slice":
                    self._taken(op, tensor, (whole,))
                    self.rows[whole] = part
                found += [inner] if self.rows.get(whole) == part else []
        return found[0] if len(found) == 1 else None

    def _taken(self, op: Op, tensor: Tensor, whole: Dims) -> None:
        """Note which of some positions are taken: the neurons at others may not be joined with those here."""
        how = (op.call, op.outputs.index(tensor.name))
        if self.taken.setdefault(whole, how) != how:
            raise NoMapError

    def _source(self, tensor: Tensor, makers: list[tuple[Op, list[Op]]], half: int = 0) -> _Piece:
        """What linear maps make, alone or, all of them, added; of a gated linear unit the first half, or the second."""
        names: list[str] = []
        for number, (op, between) in enumerate(makers):
            made = self.circuit.tensor(op.outputs[0])
            created = self.maps.made(op)
            dim = next((n for n, wires in enumerate(made.dims)
                        if set(wires) & created and (self.wire in wires or any(self._part(w) for w in wires))), None)
            if dim is None:
                raise NoMapError
            rows = (0, made.shape[dim], 1) if not between else self._rows(made, dim, between, tensor, half)
            if len(range(*rows)) != self.circuit.wires[self.wire].size:
                raise NoMapError
            names.append("+".join([tensor.name, *(["gate"] if half else []), *([str(number)] if number else [])]))
            self.sources[names[-1]] = (op, made.dims[dim], rows)
        self.group.update(dict.fromkeys(names[1:], names[0]))
        return _Piece(frozenset(names))

    def _rows(self, made: Tensor, dim: int, between: list[Op], wanted: Tensor, half: int = 0) -> tuple[int, int, int]:
        """Which entries of a map's output a tensor cut out of it holds: the calls are made on numbered entries."""
        shape = [1] * len(made.shape)
        shape[dim] = -1
        tags = torch.arange(made.shape[dim], device="cpu").view(shape).expand(made.shape)
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
            if op.kind == "cat":  # of positions
                part, sizes = next(known[name] for name in op.inputs if name in known), self.circuit.tensor(op.outputs[0]).shape
                if not part.numel():
                    raise NoMapError
                cut = [slice(0, 1) if size != sizes[n] else slice(None) for n, size in enumerate(part.shape)]
                known[op.outputs[0]] = part[tuple(cut)].expand(sizes)
                continue
            if any(name not in known for name in op.inputs):
                raise NoMapError
            try:
                result = view(self.circuit, op, [known[name] for name in op.inputs])
            except NoViewError:
                raise NoMapError from None
            results = result if isinstance(result, (tuple, list)) else (result,)
            known.update(zip(op.outputs, results, strict=False))
        found = known.get(wanted.name)
        if found is None or tuple(found.shape) != wanted.shape:
            raise NoMapError
        at = next((n for n, wires in enumerate(wanted.dims) if wires == (self.wire,)), None)
        if at is None:
            raise NoMapError
        line = found.movedim(at, -1).flatten(0, -2)
        first = line[0].tolist()
        step = first[1] - first[0] if len(first) > 1 else 1
        rows = (first[0], first[-1] + 1, step)
        if step < 1 or list(range(*rows)) != first or not bool((line == line[0]).all()):
            raise NoMapError
        return rows

    # the whole ------------------------------------------------------------------------------------------

    def _read(self, name: str) -> None:
        """All that reads the wire's values contracts it, if need be after a cast, a dropout or a scale."""
        for reader in self.circuit.consumers.get(name, ()):
            op = self.circuit.op(reader)
            if reader in self.between or any(
                a.role == "contracted" and a.wire == self.wire and self.maps.multiplied(op, a) is not None for a in op.axes
            ):
                continue
            flowing = [other for other in op.inputs if not self.maps.fixed(other)]
            apart = op.kind == "slice" and all(a.passes or a.wire != self.wire for a in op.axes)
            if len(flowing) > 1 or not apart and (not _passes_all(op) or not (op.fn in _LINEAR or op.kind == "reindex")):
                raise NoMapError
            for output in op.outputs:
                self._read(output)

    def _alone(self) -> None:
        """The wire's values are read by the block alone: a residual stream, which others read as well, is none."""
        for name in self.pieces:
            self._read(name)
        makers = {op.name for op, _, _ in self.sources.values()}
        reached = set(self.pieces)
        numbers = [self.maps.number[name] for name in makers]
        for op in self.circuit.ops[min(numbers) : max(numbers) + 1]:
            if any(name in reached for name in op.inputs):
                if op.name in makers:
                    raise NoMapError  # what is read of the wire is written to it again
                reached.update(op.outputs)

    def _branches(self, whole: _Piece) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
        """Gates and keys."""
        order = self.maps.number
        branches: dict[str, list[str]] = {}
        for source in sorted(self.sources, key=lambda name: (order[self.sources[name][0].name], self.sources[name][2])):
            branches.setdefault(self._leader(source), []).append(source)
        activated: dict[str, set[str]] = {}
        for source, functions in self.activated:
            activated.setdefault(self._leader(source), set()).update(functions)
        first = [leader for leader in branches if leader in activated]
        if len(first) == len(branches):  # one may be clipped only
            first = [leader for leader in first if activated[leader] - _LINEAR - _CLIPS]
        if len(branches) == 1:
            if not whole.bent:
                raise NoMapError
            return (), self._weights(next(iter(branches.values())))
        gates = first if 0 < len(first) < len(branches) else [next(iter(branches))]
        return (self._weights([s for leader in gates for s in branches[leader]]),
                self._weights([s for leader in branches if leader not in gates for s in branches[leader]]))

    def _weights(self, sources: list[str]) -> tuple[Weight, ...]:
        found: list[Weight] = []
        for name in sources:
            op, wires, rows = self.sources[name]
            weight = self.maps.weight(op, wires, rows, makes=True)
            for bias, pick in (self.biases[key] for key in dict.fromkeys((name, op.name)) if key in self.biases):
                if pick is not None and (weight.stacked == 1 or weight.by != pick.index and "grouped_mm" not in op.fn):
                    raise NoMapError  # a row of another number than the map's
                if weight.bias:
                    self.scales[bias] = None
                weight = replace(weight, bias=weight.bias or bias)
            found.append(weight)
        return tuple(found)


def _carries(tensor: Tensor, wire: str) -> bool:
    return any(wire in dim for dim in tensor.dims)


def _passes_all(op: Op) -> bool:
    """Whether an op does the same to every index of every axis, separately.

    Where an axis has size 1 it is no wire, so that a sum over it is told by the op's kind alone.
    """
    return op.kind in ("elementwise", "reindex", "norm", "box", "random", "create") and all(axis.passes for axis in op.axes)
