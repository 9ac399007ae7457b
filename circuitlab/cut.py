"""Cutting wires: a smaller network inside a network, by keeping some entries of a wire everywhere it sits.

A wire whose entries can be permuted can also be cut: nothing that happens to it depends on which entries there are, so
that the same run goes through with fewer. A cut is plain data: which entries of which wires are kept. From it follow
the smaller circuit, and in `circuitlab.trace.cutting` the smaller module.

Keeping the first entries gives nested networks (SortedNet: Valipour et al., 2023), keeping the most important ones is
structured pruning, where a wire is what is called a dependency group or zero-invariant group (OTO: Chen et al., 2021,
OTOv2: 2023).
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from circuitlab.circuit import Circuit, Op, Tensor, Wire, unknown
from circuitlab.errors import InputError
from circuitlab.recurrent import with_states

_SUMS = frozenset({"sum", "nansum"})
"""Reductions to which an entry of zeros adds nothing."""


@dataclass(frozen=True)
class Cut:
    """Some entries of some wires, kept everywhere these sit.

    Numbers in the author's code that were computed from sizes (the root of the head size that scores are divided by)
    stay what they were when the circuit was traced; sizes that functions are told follow.

    Attributes:
        source: the whole circuit.
        kept: wire name -> the entries that are kept, in their old order.
        changes: the wires whose cut does more than mask: each with the reason. A softmax, norm or mean over a wire
            depends on how many entries there are. Of all other wires, the cut network computes exactly what the whole
            one does when the values of the dropped entries are set to zero where they are summed over.
    """

    source: Circuit
    kept: Mapping[str, tuple[int, ...]]
    changes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def exact(self) -> bool:
        """Whether the cut network is the whole one with the dropped entries masked; `changes` says why not."""
        return not self.changes

    @cached_property
    def circuit(self) -> Circuit:
        """The smaller circuit, to be drawn, costed, compared and cut again. It has the same names everywhere."""
        return _Resized(self).circuit()

    def indices(self, tensor: str) -> tuple[tuple[int, ...] | None, ...]:
        """For each dimension of an array of the circuit the entries that are kept; None where all are."""
        return tuple(
            None if found is None else tuple(cast("list[int]", found.tolist()))
            for found in self._entries.tensor(self.source.tensor(tensor))
        )

    @cached_property
    def _entries(self) -> _Entries:
        return _Entries(self.source.wires, self.kept)

    def apply(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The smaller module. See `circuitlab.trace.cutting.apply`."""
        return importlib.import_module("circuitlab.trace.cutting").apply(self, model, *args, **kwargs)

    def state(self, model: Any) -> dict[str, Any]:
        """The smaller module's parameters as parts of the model's. See `circuitlab.trace.cutting.state`."""
        return importlib.import_module("circuitlab.trace.cutting").state(self, model)

    def __repr__(self) -> str:
        sizes = [f"{name} {self.source.wires[name].size} -> {len(kept)}" for name, kept in self.kept.items()]
        more = f" and {len(sizes) - 4} more" if len(sizes) > 4 else ""
        how = "exact masking" if self.exact else "not masking: " + next(iter(self.changes.values()))
        return f"Cut({self.source.title}: {', '.join(sizes[:4])}{more}; {how})"


def cut(circuit: Circuit, wire: Any, n: Any = None, *, keep: Any = "first") -> Cut:
    """Keep some entries of wires, everywhere these sit.

    Args:
        circuit: the whole.
        wire: name of a permutable wire, a label that only one wire has, or a `Wire`; or a dict of these to numbers n.
        n: how many entries are kept; a fraction below 1 is a share of the wire, at least one entry. It may be left out
            where ``keep`` holds indices.
        keep: which. "first" keeps the first n, so that smaller networks are inside larger ones. A list or array of
            whole numbers holds the indices; one of floating-point numbers, one for each entry, is an importance, of
            which the n largest are kept. A dict gives one of these for each wire, the others keep their first.

    Returns:
        a `Cut`: its ``circuit`` is the smaller one, and ``apply(model)`` makes the smaller module.

    Raises:
        InputError: an unknown wire, one that cannot be cut (with the reason), or numbers that do not fit.
    """
    asked: dict[Any, Any] = dict(cast("Mapping[Any, Any]", wire)) if isinstance(wire, Mapping) else {wire: n}
    if isinstance(wire, Mapping) and n is not None:
        raise InputError(f"cut: a dict of wires holds their numbers of entries, and n={n!r} was given as well")
    if not asked:
        raise InputError("cut: no wire was given; circuit.cut('name', n), where circuit.symmetry() tells the wires that can be cut")
    chosen: dict[str, Any] = {}
    if isinstance(keep, Mapping):
        for key, value in cast("Mapping[Any, Any]", keep).items():
            chosen[_named(circuit, key).name] = value
    kept: dict[str, tuple[int, ...]] = {}
    for key, number in asked.items():
        found = _named(circuit, key)
        if found.name in kept:
            raise InputError(f"cut: the wire {found.name!r} is given twice")
        if not found.permutable:
            raise InputError(f"the wire {found.name!r} cannot be cut: {found.why}")
        kept[found.name] = _chosen(found, number, chosen.get(found.name, "first") if isinstance(keep, Mapping) else keep)
    stray = [name for name in chosen if name not in kept]
    if stray:
        raise InputError(f"cut: keep tells of the wire {stray[0]!r}, which is not cut; cut are {list(kept)}")
    return Cut(circuit, with_states(circuit, kept, _Entries(circuit.wires, kept).length), _changes(circuit, kept))


def _named(circuit: Circuit, key: Any) -> Wire:
    if isinstance(key, Wire):
        key = key.name
    if not isinstance(key, str):
        raise InputError(f"cut: a wire is given by its name, and a {type(key).__name__} was given; {list(circuit.wires)[:5]} are names")
    if key in circuit.wires:
        return circuit.wires[key]
    labelled = [wire for wire in circuit.wires.values() if wire.label == key]
    if len(labelled) > 1:
        raise InputError(f"{len(labelled)} wires have the label {key!r}; give their names, e.g. {[w.name for w in labelled[:4]]}")
    if not labelled:
        raise unknown("wire", key, [name for name, wire in circuit.wires.items() if wire.permutable])
    return labelled[0]


def _chosen(wire: Wire, n: Any, keep: Any) -> tuple[int, ...]:
    """The entries of a wire that are kept, ascending."""
    if isinstance(keep, str):
        if keep != "first":
            raise InputError(f"cut: keep={keep!r} is not known; give 'first', indices, or an importance for each entry")
        return tuple(range(_number(wire, n)))
    given = np.asarray(keep.detach().cpu() if hasattr(keep, "detach") else keep)
    if given.ndim != 1 or given.dtype.kind not in "iuf":
        raise InputError(f"cut: keep for {wire.name!r} must be indices or importances along one axis, and is of shape "
                         f"{given.shape}, {given.dtype}")
    if given.dtype.kind == "f":
        if given.shape != (wire.size,) or np.isnan(given).any():
            raise InputError(f"cut: the wire {wire.name!r} has {wire.size} entries, and needs as many importances, none of them "
                             f"NaN; {len(given)} were given. Indices are whole numbers")
        order = np.argsort(-given, kind="stable")[: _number(wire, n)]
        return tuple(int(entry) for entry in np.sort(order))
    entries = [int(entry) for entry in np.sort(given)]
    if not entries or entries[0] < 0 or entries[-1] >= wire.size or len(set(entries)) != len(entries):
        raise InputError(f"cut: the indices kept of {wire.name!r} must be different numbers from 0 to {wire.size - 1}, at least "
                         f"one; given were {given[:8].tolist()}")
    if n is not None and _number(wire, n) != len(entries):
        raise InputError(f"cut: n={n} entries of {wire.name!r} are to be kept, and {len(entries)} indices were given")
    return tuple(entries)


def _number(wire: Wire, n: Any) -> int:
    plain = isinstance(n, (int, float, np.integer, np.floating)) and not isinstance(n, bool)
    if plain and 0 < n < 1:
        return max(1, round(float(n) * wire.size))
    if not plain or n != int(n) or not 1 <= n <= wire.size:
        raise InputError(f"cut: n={n!r}: of the wire {wire.name!r}, 1 to {wire.size} entries can be kept, or a share below 1")
    return int(n)


# what a cut does to the function --------------------------------------------------------------------------


def _changes(circuit: Circuit, kept: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The wires of which it matters how many entries there are, each with the reason."""
    short = [name for name, entries in kept.items() if len(entries) < circuit.wires[name].size]
    around = {name: {name, *_sums_of(circuit.wires, name)} for name in short}
    found: dict[str, str] = {}
    for op in circuit.ops:
        for axis in op.axes:
            if axis.role == "normalised" or (axis.role == "reduced" and op.fn not in _SUMS):
                for name in short:
                    if axis.wire in around[name] and name not in found:
                        where = f" ({op.source})" if op.source else ""
                        found[name] = f"{op.fn} in {op.name!r}{where} is over {name!r}, and depends on how many entries there are"
    return found


def _sums_of(wires: Mapping[str, Wire], name: str) -> set[str]:
    """The sums that a wire is in a part of, and those that they are in a part of."""
    found: set[str] = set()
    pending = [name]
    while pending:
        inner = pending.pop()
        for whole in wires.values():
            if whole.name not in found and any(inner in names for _, _, names in whole.parts):
                found.add(whole.name)
                pending.append(whole.name)
    return found


class _Entries:
    """The entries that are kept of wires, sums of them, and dimensions."""

    def __init__(self, wires: Mapping[str, Wire], kept: Mapping[str, Sequence[int]]) -> None:
        self.wires = wires
        self.known: dict[str, np.ndarray | None] = {
            name: np.asarray(entries) if len(entries) < wires[name].size else None for name, entries in kept.items()
        }

    def wire(self, name: str) -> np.ndarray | None:
        """The entries that are kept of a wire, None for all."""
        if name not in self.known:
            wire = self.wires[name]
            marks = np.ones(wire.size, dtype=bool)
            for start, stop, names in wire.parts:
                inner = self.product(names)
                if inner is not None:
                    marks[start:stop] = False
                    marks[start + inner] = True
            self.known[name] = None if marks.all() else marks.nonzero()[0]
        return self.known[name]

    def product(self, names: Iterable[str]) -> np.ndarray | None:
        """The entries that are kept of a product of wires, None for all."""
        names = tuple(names)
        each = [self.wire(name) for name in names]
        if all(entries is None for entries in each):
            return None
        flat = np.zeros(1, dtype=np.int64)
        for name, entries in zip(names, each, strict=True):
            size = self.wires[name].size
            flat = (flat[:, None] * size + (np.arange(size) if entries is None else entries)).ravel()
        return flat

    def length(self, names: tuple[str, ...]) -> int:
        """How many entries are kept of a product of wires."""
        found = self.product(names)
        return math.prod(self.wires[name].size for name in names) if found is None else len(found)

    def tensor(self, tensor: Tensor) -> list[np.ndarray | None]:
        """For each dimension of an array the entries that are kept, None for all."""
        return [self.product(dim) for dim in tensor.dims]


# the smaller circuit --------------------------------------------------------------------------------------


class _Resized:
    """Makes the circuit of a cut: the same run, with other sizes in wires, arrays and calls."""

    def __init__(self, made: Cut) -> None:
        self.whole = made.source
        self.entries = made._entries
        self.kept = {tensor.name: self.entries.tensor(tensor) for tensor in self.whole.tensors}
        self.shape = {
            tensor.name: tuple(
                size if entries is None else len(entries)
                for size, entries in zip(tensor.shape, self.kept[tensor.name], strict=True)
            )
            for tensor in self.whole.tensors
        }

    def circuit(self) -> Circuit:
        """The circuit."""
        wires = {name: self._wire(wire) for name, wire in self.whole.wires.items()}
        tensors = tuple(replace(tensor, shape=self.shape[tensor.name]) for tensor in self.whole.tensors)
        return replace(self.whole, wires=wires, tensors=tensors, ops=tuple(map(self._op, self.whole.ops)))

    def _wire(self, wire: Wire) -> Wire:
        entries = self.entries.wire(wire.name)
        parts = tuple((_at(entries, start), _at(entries, stop), names) for start, stop, names in wire.parts)
        places = tuple(
            (tensor, dim, factor, part and (_at(self.kept[tensor][dim], part[0]), _at(self.kept[tensor][dim], part[1])))
            for tensor, dim, factor, part in wire.places
        )
        return replace(wire, size=self.entries.length((wire.name,)), parts=parts, places=places)

    def _op(self, op: Op) -> Op:
        names = (*op.inputs, *op.outputs)
        if all(entries is None for name in names for entries in self.kept[name]):
            return op
        changed: dict[str, Any] = {}
        write = _WRITERS.get(op.fn)
        call = op.call if write is None or not op.call else write(self, op, changed)
        if op.kind in ("slice", "cat") and "parts" in op.attrs and len(op.outputs) == len(op.attrs["parts"]):
            changed["parts"] = tuple(self.shape[name][op.attrs["dim"]] for name in op.outputs)
        return replace(op, call=call, attrs={**op.attrs, **{k: v for k, v in changed.items() if k in op.attrs}})

    # calls that are told sizes; everything else reads them off its operands --------------------------------

    def normalised(self, op: Op, changed: dict[str, Any]) -> str:
        """A norm over the last dimensions, whose sizes it is told."""
        shape = self.shape[op.inputs[0]]
        return _edited(op.call, 1, "normalized_shape", lambda old: shape[len(shape) - (len(old) if isinstance(old, (tuple, list)) else 1) :])

    def grouped_norm(self, op: Op, changed: dict[str, Any]) -> str:
        """A norm over groups of channels: as many as their wires have entries."""
        def count(old: Any) -> int:
            groups, made = 1, 1
            for name in self.whole.tensor(op.inputs[0]).dims[1]:
                if groups == old:
                    break
                groups *= self.whole.wires[name].size
                made *= self.entries.length((name,))
            changed["groups"] = made
            return made

        return _edited(op.call, 1, "num_groups", count)

    def convolved(self, op: Op, changed: dict[str, Any]) -> str:
        """A convolution's groups: how often the kernel's channels are in the image's."""
        dim = len(self.shape[op.inputs[1]]) - 1
        channels = -dim  # the image may have no batch
        kernel = self.shape[op.inputs[1]]
        transposed = "transpose" in op.fn
        groups = self.shape[op.outputs[0] if transposed else op.inputs[0]][channels] // kernel[1]
        changed["groups"] = groups
        return _edited(op.call, 7 if transposed else 6, "groups", lambda _: groups)

    def split(self, op: Op, changed: dict[str, Any]) -> str:
        """A dimension taken apart: in parts of the sizes that they have now."""
        dim = next((axis.ins[0][1] for axis in op.axes if axis.role == "joined" and axis.ins), op.attrs.get("dim"))
        if dim is None:
            return op.call
        sizes = [self.shape[name][dim] for name in op.outputs]
        base = self.shape[op.inputs[0]][dim]
        if op.fn in ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"):
            key = "split_size_or_sections" if op.call.startswith("torch.split(") else "split_size"
            plain = sum(sizes) == base and sizes == [min(sizes[0], base - start) for start in range(0, base, sizes[0])]
            return _edited(op.call, 1, key, lambda old: type(old)(sizes) if isinstance(old, (tuple, list)) else sizes[0] if plain else sizes)
        count = len(sizes)
        if op.fn == "chunk" and sizes == [min(-(-base // count), base - start) for start in range(0, base, -(-base // count))]:
            return op.call
        if op.fn == "tensor_split" and re.search(r"split\((\$0, )?\d+", op.call) and sizes == [base // count + (n < base % count) for n in range(count)]:
            return op.call
        return f"$0.split({sizes}, dim={dim})"

    def sliced(self, op: Op, changed: dict[str, Any]) -> str:
        """Slices of a dimension: from and to where their entries are now."""
        read = op.inputs[0]
        if not op.call.startswith("$0[") or len(op.inputs) > 1:
            return op.call
        node = cast("ast.Subscript", _parsed(op.call))
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        plain = [item for item in items if not (isinstance(item, ast.Constant) and item.value in (None, Ellipsis))]
        dim, moved = 0, dict[tuple[int, int], tuple[int, int]]()
        for item in items:
            if isinstance(item, ast.Constant) and item.value is Ellipsis:
                dim += len(self.shape[read]) - len(plain)
            elif not (isinstance(item, ast.Constant) and item.value is None):
                entries, size = self.kept[read][dim], self.whole.tensor(read).shape[dim]
                if isinstance(item, ast.Slice) and entries is not None:
                    ends = [_value(end) if isinstance(end, (ast.Constant, ast.UnaryOp)) else None for end in (item.lower, item.upper)]
                    start, stop, _ = slice(ends[0], ends[1]).indices(size)
                    if ends[1] is None and item.upper is not None:  # the size of the result
                        stop = next((label[1] for label in op.attrs.get("index", ()) if isinstance(label, tuple) and label[0] == start), stop)
                    moved[start, stop] = (_at(entries, start), _at(entries, stop))
                    if ends[0] is not None:
                        item.lower = ast.Constant(_at(entries, start))
                    if ends[1] is not None:
                        item.upper = ast.Constant(_at(entries, stop))
                dim += 1
        if "index" in op.attrs:
            changed["index"] = tuple(
                moved.get(cast("tuple[int, int]", label), label) if isinstance(label, tuple) else label
                for label in cast("tuple[Any, ...]", op.attrs["index"])
            )
        return _text(node)

    def narrowed(self, op: Op, changed: dict[str, Any]) -> str:
        """A piece of a dimension."""
        dims = [n for n, entries in enumerate(self.kept[op.inputs[0]]) if entries is not None]
        dim = next((n for n in dims if self.shape[op.outputs[0]][n] != self.shape[op.inputs[0]][n]), None)
        if dim is None:
            return op.call
        entries = self.kept[op.inputs[0]][dim]
        call = _edited(op.call, 2, "start", lambda old: _at(entries, old))
        return _edited(call, 3, "length", lambda _: self.shape[op.outputs[0]][dim])

    def unflattened(self, op: Op, changed: dict[str, Any]) -> str:
        """A dimension as several."""
        dims = list[Any]()
        _edited(op.call, 1, "dim", lambda old: dims.append(old) or old)
        if not dims or not isinstance(dims[0], int):
            return op.call
        start, after = dims[0] % len(self.shape[op.inputs[0]]), self.shape[op.outputs[0]]
        return _edited(op.call, 2, "sizes", lambda old: type(old)(-1 if size == -1 else after[start + n] for n, size in enumerate(old)))

    def repeated(self, op: Op, changed: dict[str, Any]) -> str:
        """Each entry several times: as often as there are entries of what is new."""
        before, after = self.shape[op.inputs[0]], self.shape[op.outputs[0]]
        whole = self.whole.tensor(op.inputs[0]).shape, self.whole.tensor(op.outputs[0]).shape
        if len(before) != len(after):
            return op.call
        times = {b // a for a, b, c, d in zip(before, after, *whole, strict=True) if c != d}
        return _edited(op.call, 1, "repeats", lambda old: times.pop() if isinstance(old, int) and len(times) == 1 else old)


_Writer = Callable[[_Resized, Op, dict[str, Any]], str]
_WRITERS: dict[str, _Writer] = {
    **dict.fromkeys(("layer_norm", "rms_norm"), _Resized.normalised),
    "group_norm": _Resized.grouped_norm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _Resized.convolved),
    **dict.fromkeys(
        ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split",
         "hsplit", "vsplit", "dsplit"),
        _Resized.split,
    ),
    "getitem": _Resized.sliced,
    "narrow": _Resized.narrowed,
    "unflatten": _Resized.unflattened,
    "repeat_interleave": _Resized.repeated,
}
"""Function -> how its call is written with other sizes."""


def _at(entries: np.ndarray | None, place: int) -> int:
    """Where a place between entries is, among those that are kept."""
    return place if entries is None else int(np.searchsorted(entries, place))


def _parsed(call: str) -> ast.expr:
    """A call as a tree; what stands for operands and sizes as names."""
    names = re.sub(r"\$\[(\d+):(\d+)\]", r"_size_\1_\2", call)
    names = re.sub(r"\$(\d+)", r"_operand_\1", names).replace("$device", "_device_")
    return ast.parse(names, mode="eval").body


def _text(node: ast.expr) -> str:
    text = re.sub(r"_size_(\d+)_(\d+)", r"$[\1:\2]", ast.unparse(node))
    return re.sub(r"_operand_(\d+)", r"$\1", text).replace("_device_", "$device")


def _value(node: ast.expr | None) -> Any:
    return None if node is None else ast.literal_eval(node)


def _edited(call: str, position: int, keyword: str, change: Callable[[Any], Any]) -> str:
    """A call with one of its arguments changed, which stands at a position (the operand's is 0) or under a keyword."""
    node = _parsed(call)
    if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Attribute, ast.Name)):
        return call
    method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value).startswith("_operand_")
    place = position - 1 if method else position
    try:
        if len(node.args) > place:
            node.args[place] = ast.parse(repr(_plain(change(_value(node.args[place])))), mode="eval").body
        else:
            for given in node.keywords:
                if given.arg == keyword:
                    given.value = ast.parse(repr(_plain(change(_value(given.value)))), mode="eval").body
    except ValueError:  # not a number but one that the operands tell
        return call
    return _text(node)


def _plain(value: Any) -> Any:
    return tuple(map(int, value)) if isinstance(value, tuple) else [int(item) for item in value] if isinstance(value, list) else int(value)


def parameters(circuit: Circuit) -> int:
    """Number of entries of all parameters that a run reads."""
    return sum(math.prod(tensor.shape) for tensor in circuit.tensors if tensor.kind == "parameter")
