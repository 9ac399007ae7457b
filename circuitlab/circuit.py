"""The intermediate representation: wires, tensors, ops and blocks, as plain frozen data.

A **wire** is a tensor axis with an identity. A dimension of a tensor is an ordered product of wires, written as a
tuple of wire names, slowest first; a size-1 dimension is the empty product ``()``. The same wire may occur twice in
one tensor (attention scores hold query and key positions).

An **op** is one recorded torch function. Its **axes** are what einsum letters are: each axis is a wire, the role the
op gives it, and the places of its operands and results where it stands. Two axes of one op may be of the same wire:
roles belong to the occurrence, identity to the wire.

A **block** is a module or Python function and holds ops and further blocks, in the order they ran.

This module imports no torch. A circuit is a value: compare it, pickle it, write it to JSON.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from circuitlab.errors import FileFormatError, InputError

FORMAT_VERSION = 1

Dims = tuple[tuple[str, ...], ...]
"""One tuple of wire names per dimension, slowest factor first."""

Place = tuple[int, int, int]
"""(operand or result number, dimension, factor position within the dimension)."""

PASSING_ROLES = frozenset({"broadcast", "diagonal"})
ROLES = frozenset({
    "broadcast",  # the op does the same to each index, separately
    "diagonal",  # like broadcast, but two or more operands are paired index by index
    "contracted",  # summed over after a product
    "reduced",  # mean, sum, max ...: gone from the result
    "normalised",  # stays, but each index sees the others, alike (softmax, layer norm)
    "created",  # new in the result (linear's out dimension, arange, repeat)
    "windowed",  # a position axis seen through a sliding window
    "gathered",  # indexed by the values of another operand
    "indexed",  # a constant index or slice picks entries
    "joined",  # parts put together (cat), or taken apart (split)
    "ordered",  # positions matter: causal mask, cumulative sum, flip, roll
    "opaque",  # nothing is claimed
})
"""What an op can do to an axis."""


@dataclass(frozen=True)
class Wire:
    """A tensor axis with an identity.

    Attributes:
        name: unique, by origin, e.g. ``"transformer.h.0.mlp.f"``.
        label: short sign for drawings, e.g. ``"f"``, ``"x̄"``; not unique.
        size: number of entries.
        kind: "batch", "position", "spatial", "width", "hidden", "head", "head_size", "group", "expert", "channel",
            "vocab", "window", "class" or "".
        group: wires of one non-empty group that stand side by side are drawn as one (height and width).
        origin: how the wire came to be, for people.
        permutable: permuting it everywhere it sits leaves the function as it is.
        why: where it is not permutable, the reason.
        parts: () or ((start, stop, wire names), ...): the wire is a sum, such as a fused q ⊕ k ⊕ v.
        places: ((parameter or buffer name, dimension, factor position, part), ...); part is None or (start, stop).
    """

    name: str
    label: str
    size: int
    kind: str = ""
    group: str = ""
    origin: str = ""
    permutable: bool = False
    why: str = ""
    parts: tuple[tuple[int, int, tuple[str, ...]], ...] = ()
    places: tuple[tuple[str, int, int, tuple[int, int] | None], ...] = ()

    def __repr__(self) -> str:
        state = "permutable" if self.permutable else f"not permutable: {self.why}"
        return f"Wire({self.name!r}, label {self.label!r}, size {self.size}, in {len(self.places)} places, {state})"


@dataclass(frozen=True)
class Tensor:
    """One array: a value in single-assignment form.

    Attributes:
        name: unique, e.g. ``"transformer.h.0.attn.softmax"``; parameters and buffers carry their own name.
        shape: sizes.
        dims: the wires of each dimension.
        dtype: "float32", "int64" ...
        kind: "input", "parameter", "buffer", "constant" or "value".
        op: name of the op that made it, "" for the first four kinds.
        until: name of the last op that ran while Python held the array, "" if it was held to the end.
    """

    name: str
    shape: tuple[int, ...]
    dims: Dims
    dtype: str
    kind: str = "value"
    op: str = ""
    until: str = ""


@dataclass(frozen=True)
class Axis:
    """One index of an op, as a letter in an einsum.

    Attributes:
        wire: name of its wire.
        role: one of `ROLES`.
        ins: places in the op's inputs.
        outs: places in the op's outputs.
    """

    wire: str
    role: str
    ins: tuple[Place, ...] = ()
    outs: tuple[Place, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether the op leaves this axis alone: it goes in, comes out, and no index sees another."""
        return self.role in PASSING_ROLES and bool(self.ins) and bool(self.outs)


@dataclass(frozen=True)
class Op:
    """One recorded torch function.

    Attributes:
        name: unique, e.g. ``"transformer.h.0.attn.matmul_1"``.
        fn: the torch function as written: "linear", "softmax", "add" ...
        kind: its family: "linear" (product with a parameter), "contract" (product of data), "elementwise",
            "reindex" (view, permute, ...: no operation), "softmax", "norm", "reduce", "conv", "pool", "embedding",
            "index", "slice", "cat", "create", "random", "gather", "scatter", "sort", "scan", "resize", "box"
            (has a rule but no glyph of its own) or "opaque" (no rule: nothing is claimed but what probing found).
        inputs: names of its tensor operands, parameters and constants included, in order of appearance.
        outputs: names of the tensors it made.
        axes: what it does to each axis.
        source: "file.py:line" of the author's code.
        attrs: plain values worth showing: kernel_size, stride, dim, scale, p, index ...
        call: the call as Python, with ``$0``, ``$1`` ... for the inputs (`trace/calls.py`); "" if it cannot be written.
    """

    name: str
    fn: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[Axis, ...]
    source: str = ""
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    call: str = ""


@dataclass(frozen=True)
class Block:
    """A module call or Python function call, with what ran inside it.

    Attributes:
        name: unique: the module path (root: ""), ``"path#2"`` for a second call, ``"path/function"`` for a function.
        title: class name of the module, or name of the function.
        kind: "root", "module" or "function".
        items: names of ops, and blocks, in the order they ran.
        source: "file.py:line" where it is defined.
    """

    name: str
    title: str
    kind: str
    items: tuple[str | Block, ...] = ()
    source: str = ""

    def blocks(self) -> Iterator[Block]:
        """This block and all blocks within, depth first, in order."""
        yield self
        for item in self.items:
            if isinstance(item, Block):
                yield from item.blocks()

    def op_names(self) -> Iterator[str]:
        """Names of all ops within, in order."""
        for item in self.items:
            if isinstance(item, Block):
                yield from item.op_names()
            else:
                yield item


@dataclass(frozen=True)
class Circuit:
    """A run of a module, as wires.

    Attributes:
        title: name of the traced module's class.
        ops: in the order they ran.
        tensors: in the order they appeared.
        wires: name -> `Wire`.
        root: the outermost `Block`.
        inputs, outputs: names of the tensors that go in and come out.
        returns: where each output stands in what forward returned: "logits", "[1][0]", "" for a bare tensor.
        device: "meta" (no numbers were computed) or "live".
    """

    title: str
    ops: tuple[Op, ...]
    tensors: tuple[Tensor, ...]
    wires: Mapping[str, Wire]
    root: Block
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: str = "live"
    returns: tuple[str, ...] = ()

    # look-ups -----------------------------------------------------------------------------------------

    @cached_property
    def _op_by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    @cached_property
    def _tensor_by_name(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def _block_by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.root.blocks()}

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def op(self, name: str) -> Op:
        """The op of that name."""
        return self._op_by_name[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self._tensor_by_name[name]

    def block(self, name: str) -> Block:
        """The block of that name; a missing one is an `InputError` that names the nearest."""
        try:
            return self._block_by_name[name]
        except KeyError:
            raise unknown("block", name, list(self._block_by_name)) from None

    @cached_property
    def consumers(self) -> dict[str, tuple[str, ...]]:
        """Tensor name -> names of the ops that read it."""
        found: dict[str, list[str]] = {}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                found.setdefault(name, []).append(op.name)
        return {name: tuple(ops) for name, ops in found.items()}

    def returned(self, output: str) -> str:
        """What to call an output: its name in what forward returned, else what made it."""
        path = dict(zip(self.outputs, self.returns, strict=False)).get(output, "")
        return output.rpartition(".")[2] if path[:1] in ("", "[") else path

    @property
    def opaque(self) -> tuple[Op, ...]:
        """The ops without a rule; where ``attrs["probed"]`` is set, some of their axes were found by probing."""
        return tuple(op for op in self.ops if op.kind == "opaque")

    @cached_property
    def ffn(self) -> dict[str, Wire]:
        """Module path -> hidden wire of every feed-forward block. See `circuitlab.analysis.feedforward.ffn`."""
        return _late("analysis.feedforward").ffn(self)

    @cached_property
    def parameters(self) -> dict[str, tuple[tuple[Wire, ...], ...]]:
        """Name of a parameter or buffer -> its dimensions, each a tuple of `Wire`."""
        return {
            tensor.name: tuple(tuple(self.wires[name] for name in dim) for dim in tensor.dims)
            for tensor in self.tensors
            if tensor.kind in ("parameter", "buffer")
        }

    def __getitem__(self, path: str) -> Circuit:
        """The sub-circuit of a module path, such as ``"transformer.h.0.attn"``."""
        block = self.block(path)
        inside = set(block.op_names())
        ops = tuple(op for op in self.ops if op.name in inside)
        made = {name for op in ops for name in op.outputs}
        outer = {"value", "input"}
        read = dict.fromkeys(name for op in ops for name in op.inputs if name not in made)
        inputs = tuple(name for name in read if self.tensor(name).kind in outer)
        wanted = set(self.outputs)
        outputs = tuple(
            name
            for op in ops
            for name in op.outputs
            if name in wanted or any(reader not in inside for reader in self.consumers.get(name, ()))
        )
        used = made | set(read)
        tensors = tuple(
            replace(t, kind="input", op="") if t.name in inputs else t for t in self.tensors if t.name in used
        )
        names = {wire for t in tensors for dim in t.dims for wire in dim} | {a.wire for op in ops for a in op.axes}
        pending = list(names)
        while pending:
            for _, _, wires in self.wires[pending.pop()].parts:
                new = set(wires) - names
                names |= new
                pending.extend(new)
        wires = {name: wire for name, wire in self.wires.items() if name in names}
        return replace(
            self, title=block.title, ops=ops, tensors=tensors, wires=wires, root=block, inputs=inputs, outputs=outputs,
            returns=(),
        )

    # data ---------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The circuit as JSON text; `load` and `from_json` read it back to an equal circuit."""
        return json.dumps(
            {"format": "circuitlab.circuit", "version": FORMAT_VERSION, "circuit": _plain(self)}, ensure_ascii=False
        )

    @staticmethod
    def from_json(text: str) -> Circuit:
        """Read what `to_json` wrote. A broken or newer file is a `FileFormatError`."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FileFormatError(f"this is not JSON ({error}); give a file that circuit.save wrote") from None
        if not isinstance(data, dict) or data.get("format") != "circuitlab.circuit":
            raise FileFormatError(
                "this JSON is not a circuit: it has no \"format\": \"circuitlab.circuit\"; "
                "give a file that circuit.save wrote"
            )
        document = cast("dict[str, Any]", data)
        if document.get("version") != FORMAT_VERSION:
            raise FileFormatError(
                f"this circuit has format version {document.get('version')!r}, and this circuitlab reads "
                f"version {FORMAT_VERSION}; update circuitlab, or trace the model again"
            )
        try:
            circuit = _read_circuit(document["circuit"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"this circuit file is broken ({type(error).__name__}: {error})") from None
        _check(circuit)
        return circuit

    # what users do with a circuit: each lives where 4-architecture puts it, and is found when it is called ----

    def svg(self, **options: Any) -> str:
        """The drawing as SVG text. See `circuitlab.display.svg`."""
        return _late("display").svg(self, **options)

    def text(self, **options: Any) -> str:
        """The drawing as lines of text. See `circuitlab.display.text`."""
        return _late("display").text(self, **options)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write a file by its suffix: .svg .html .json .png .pdf .dot. See `circuitlab.display.save`."""
        return _late("display").save(self, path, **options)

    def to_graphviz(self) -> Any:
        """The module overview as a `graphviz.Digraph`. See `circuitlab.display.to_graphviz`."""
        return _late("display").to_graphviz(self)

    def view(self, **options: Any) -> Any:
        """The live diagram widget. See `circuitlab.widgets.diagram.DiagramWidget`."""
        return _late("widgets.diagram").DiagramWidget(self, **options)

    def rename(self, names: Mapping[str, str]) -> Circuit:
        """Other names for wires. See `circuitlab.edit.rename`."""
        return _late("edit").rename(self, names)

    def verify(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Test every claim on numbers. See `circuitlab.trace.verify.verify`."""
        return _late("trace.verify").verify(self, model, *args, **kwargs)

    def diff(self, other: Circuit) -> Any:
        """What changed from this circuit to another. See `circuitlab.diff.diff`."""
        return _late("diff").diff(self, other)

    def cost(self) -> Any:
        """Operations and memory of every block and op, as a DataFrame. See `circuitlab.cost.cost`."""
        return _late("cost").cost(self)

    def to_torch(self, model: Any) -> Any:
        """A module compiled from the circuit, sharing the model's parameters. See `circuitlab.trace.compile.to_torch`."""
        return _late("trace.compile").to_torch(self, model)

    def permute(self, model: Any, permutations: Mapping[str, Any]) -> Any:
        """A copy of the model with wires permuted everywhere they sit. See `circuitlab.trace.permute.permute`."""
        return _late("trace.permute").permute(self, model, permutations)

    def cut(self, wire: Any, n: Any = None, *, keep: Any = "first") -> Any:
        """Keep n entries of a wire everywhere it sits: a smaller network inside this one, as a `circuitlab.cut.Cut`.

        ``circuit.cut("mlp.f", 64)`` or ``circuit.cut({"h": 4, "f": 64}, keep=...)``; of the result, ``circuit`` is the
        smaller circuit and ``apply(model)`` the smaller module. See `circuitlab.cut.cut`.
        """
        return _late("cut").cut(self, wire, n, keep=keep)

    def symmetry(self) -> Any:
        """The permutations of the parameters that leave the function as it is. See `circuitlab.analysis.symmetry`."""
        return _late("analysis.symmetry").Symmetry(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return _late("display").mimebundle(self)

    def __repr__(self) -> str:
        opaque = f", {len(self.opaque)} opaque" if self.opaque else ""
        return f"Circuit({self.title}: {len(self.ops)} ops{opaque}, {len(self.wires)} wires, traced on {self.device})"


def load(path: str | Path) -> Circuit:
    """Read a circuit that `Circuit.save` wrote as ``.json``.

    Raises:
        FileFormatError: the file is not a circuit, is broken, or is newer than this circuitlab.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FileFormatError(f"{path} is not text; give a .json file that circuit.save wrote") from None
    return Circuit.from_json(text)


def _late(module: str) -> Any:
    """A higher layer, found when it is called: this file imports none of them."""
    return importlib.import_module(f"circuitlab.{module}")


def unknown(what: str, name: str, known: list[str]) -> InputError:
    """The error for a name that is not there; it names the nearest."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {len(known)}, e.g. {known[:5]}"
    return InputError(f"this circuit has no {what} {name!r}; {hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, (Circuit, Wire, Tensor, Op, Axis, Block)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in cast("list[Any]", value))
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in cast("dict[str, Any]", value).items()}
    return value


def _read_block(data: dict[str, Any]) -> Block:
    items = tuple(item if isinstance(item, str) else _read_block(item) for item in data["items"])
    return Block(data["name"], data["title"], data["kind"], items, data["source"])


def _read_circuit(data: dict[str, Any]) -> Circuit:
    root = _read_block(data["root"])
    data = {key: _tuples(value) for key, value in data.items() if key != "root"}
    ops = tuple(Op(**{**op, "axes": tuple(Axis(**axis) for axis in op["axes"])}) for op in data["ops"])
    return Circuit(
        title=data["title"],
        ops=ops,
        tensors=tuple(Tensor(**tensor) for tensor in data["tensors"]),
        wires={name: Wire(**wire) for name, wire in data["wires"].items()},
        root=root,
        inputs=data["inputs"],
        outputs=data["outputs"],
        device=data["device"],
        returns=data.get("returns", ()),
    )


def _check(circuit: Circuit) -> None:
    """Every name that is used exists, every role is known, every dimension's wires multiply to its size."""
    tensors = {tensor.name: tensor for tensor in circuit.tensors}
    for tensor in circuit.tensors:
        if len(tensor.dims) != len(tensor.shape):
            raise FileFormatError(f"tensor {tensor.name!r} has {len(tensor.shape)} sizes and {len(tensor.dims)} dims")
        for size, dim in zip(tensor.shape, tensor.dims, strict=True):
            product = 1
            for name in dim:
                if name not in circuit.wires:
                    raise FileFormatError(f"tensor {tensor.name!r} names the wire {name!r}, which is not there")
                product *= circuit.wires[name].size
            if product != size:
                raise FileFormatError(f"tensor {tensor.name!r}: wires {dim} multiply to {product}, the size is {size}")
    for op in circuit.ops:
        for name in (*op.inputs, *op.outputs):
            if name not in tensors:
                raise FileFormatError(f"op {op.name!r} names the tensor {name!r}, which is not there")
        for axis in op.axes:
            if axis.role not in ROLES or axis.wire not in circuit.wires:
                raise FileFormatError(f"op {op.name!r} has a broken axis: {axis}")
    names = {op.name for op in circuit.ops}
    for name in circuit.root.op_names():
        if name not in names:
            raise FileFormatError(f"a block names the op {name!r}, which is not there")
