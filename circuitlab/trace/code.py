"""The blocks of a circuit as Python functions: lines that read and write tensors, named in `variables`."""

from __future__ import annotations

import builtins
import functools
import itertools
import keyword
import re

from circuitlab.circuit import Block, Circuit, Op
from circuitlab.trace.patterns import Id, Letters, View, ascii_of, product_of
from circuitlab.trace.variables import Function, Line, Namer, axes_of, tensor_of

_EINSUMS = frozenset("matmul mm bmm mv dot einsum inner outer tensordot".split())
_RESHAPES = frozenset(
    "view reshape flatten unflatten ravel squeeze unsqueeze permute transpose swapaxes swapdims T t mT movedim moveaxis "
    "expand broadcast_to repeat tile _unsafe_view".split()
)
_RESERVED = frozenset("torch F einsum rearrange repeat expect m each".split())

class Writer:
    """Writes all functions of a circuit."""

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.found: dict[str, str] = {}  # text without its name -> name
        self.texts: list[str] = []
        self.names: set[str] = set(_RESERVED) | {"forward"}
        self.maker = {name: op.name for op in circuit.ops for name in op.outputs}
        self.ended = set(circuit.outputs)
        self.given = {wire for name in circuit.inputs for dim in circuit.tensor(name).dims for wire in dim}
        self.short: dict[str, bool] = {}

    def functions(self) -> list[str]:
        """Their texts, what is called first."""
        self.write(self.circuit.root)
        return self.texts

    def write(self, block: Block) -> Function:
        """Write a block's function and those it calls."""
        return _Body(self, block).function()

    def keep(self, function: Function, wanted: str) -> None:
        """Name a function; the same text gets the same name."""
        known = self.found.get(wanted + function.text)
        if known is None:
            known, count = wanted, 1
            while known in self.names or keyword.iskeyword(known):
                count += 1
                known = f"{wanted}_{count}"
            if wanted == "forward":
                known = wanted
            self.names.add(known)
            self.found[wanted + function.text] = known
            self.texts.append(f"def {known}{function.text}")
        function.name = known

    def outs_of(self, block: Block) -> list[str]:
        """Tensors made in a block and read outside of it, or returned."""
        inside = set(block.op_names())
        return [
            name
            for op in map(self.circuit.op, block.op_names())
            for name in op.outputs
            if name in self.ended or any(reader not in inside for reader in self.circuit.consumers.get(name, ()))
        ]

    def is_short(self, block: Block) -> bool:
        """Whether a block is one line, and no function of its own: one op or call that is more than a view."""
        known = self.short.get(block.name)
        if known is None:
            weights = [
                (self.is_short(item) and not any(True for _ in item.op_names())) if isinstance(item, Block)
                else self.is_quiet(self.circuit.op(item))
                for item in block.items
            ]
            known = self.short[block.name] = sum(not quiet for quiet in weights) <= 1
        return known

    def read_by(self, block: Block) -> list[str]:
        """Tensors that a block reads and does not make."""
        ops = [self.circuit.op(name) for name in block.op_names()]
        made = {name for op in ops for name in op.outputs}
        return [name for op in ops for name in op.inputs if name not in made]

    def is_quiet(self, op: Op) -> bool:
        """Whether nothing, or nothing but re-indexing, happens."""
        return op.call == "$0" or (op.kind == "reindex" and op.fn in _RESHAPES)


class _Body:
    """The lines of one block's function."""

    def __init__(self, writer: Writer, block: Block) -> None:
        self.writer, self.block, self.circuit = writer, block, writer.circuit
        self.base = "" if block is writer.circuit.root else block.name.split("/")[0].split("#")[0]
        self.lines: list[Line] = []
        self.views: dict[str, View] = {}
        self.written: set[str] = set()
        self.known: dict[str, None] = {}
        self.holders: dict[str, str] = {}  # a wire -> the first array at hand with a dimension of it

    def function(self) -> Function:
        root = self.block is self.circuit.root
        self._items(self.block, "")
        outs = list(self.circuit.outputs) if root else self.writer.outs_of(self.block)
        function = Function("", self.base)
        written = {name for op in self.block.op_names() for name in self.circuit.op(op).outputs}
        for name in outs:
            key = self._solid(name)
            if root or key.split("@")[0] in written:
                function.outs.append(name)
            else:
                function.same[name] = key
        self._add(Line("return", [self._solid(name) for name in function.outs], []))
        Namer(self.circuit, self.lines, function, self.writer.names, root=root).finish()
        self.writer.keep(function, "forward" if root else _snake(self.block.title))
        return function

    # lines --------------------------------------------------------------------------------------------

    def _items(self, block: Block, prefer: str) -> None:
        for item in block.items:
            if not isinstance(item, Block):
                self._op(self.circuit.op(item), prefer)
            elif self.writer.is_short(item):
                word = item.name.rpartition("/")[2].rpartition(".")[2].split("#")[0]
                self._items(item, prefer if word.isdigit() or item.kind == "function" else word)
            else:
                self._call(item)

    def _call(self, block: Block) -> None:
        inner = self.writer.write(block)
        reads = [f"module {inner.base}"] if inner.uses_m else []
        reads += [key if key.startswith("module ") else self._solid(key) for key in inner.args]
        text = f"{inner.name}({', '.join(f'${n}' for n in range(len(reads)))})"
        word = block.name.rpartition("/")[2].rpartition(".")[2].split("#")[0]
        self.views.update({name: self._view(key) for name, key in inner.same.items()})
        named = block.kind == "module" and not word.isdigit() and len(inner.outs) == 1
        prefer = f"{word}_out" if word in self.writer.names else word
        self._line(Line(text, reads, list(inner.outs), words=[prefer] if named else inner.names, named=named))

    def _line(self, line: Line) -> None:
        line.note = line.note or "; ".join(axes_of(self.circuit, key) for key in line.writes if " " not in key)
        self._add(line)
        for key in (*line.reads, *line.writes):
            if " " not in key and key not in self.known:
                self.known[key] = None
                self._holds(key, self.holders)

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        self.written.update(line.writes)

    def _holds(self, key: str, holders: dict[str, str]) -> None:
        """Note the wires whose sizes can be read off an array."""
        tensor = tensor_of(self.circuit, key)
        if tensor.kind in ("input", "value"):
            for dim in tensor.dims:
                if len(dim) == 1:
                    holders.setdefault(dim[0], key)

    @functools.cached_property
    def outer(self) -> dict[str, str]:
        """A wire -> the first array with a dimension of it that the block reads, or the circuit."""
        found: dict[str, str] = {}
        for name in (*self.writer.read_by(self.block), *self.circuit.inputs):
            self._holds(name, found)
        return found

    def _op(self, op: Op, prefer: str) -> None:
        if op.call == "$0":
            self.views[op.outputs[0]] = self._view(op.inputs[0])
            return
        if op.kind == "reindex" and op.fn in _RESHAPES:
            view = self._reshaped(op)
            if view is not None:
                self.views[op.outputs[0]] = view
                return
        if op.kind == "contract" and op.fn in _EINSUMS and self._einsum(op, prefer):
            return
        reads = [self._solid(name) for name in op.inputs]
        text = op.call.replace("$$", "\0")
        text = re.sub(r"\$\[(\d+):(\d+)\]", lambda found: self._size(op, int(found[1]), int(found[2]), reads), text)
        if "$device" in text:
            near = next((key for key in itertools.chain(reads, self.known, self.circuit.inputs[:1]) if " " not in key), None)
            if near is not None and near not in reads:
                reads.append(near)
            device = "" if near is None else f"${reads.index(near)}.device"
            text = text.replace("$device", device) if device else re.sub(r"(, )?device=\$device", "", text)
        self._line(Line(text.replace("\0", "$$"), reads, list(op.outputs), words=[prefer or _word(op.fn)], named=bool(prefer)))

    def _size(self, op: Op, number: int, dim: int, reads: list[str]) -> str:
        """The size of a result's dimension, from the shapes of arrays at hand where a wire's size may differ."""
        names = self.circuit.tensor(op.outputs[number]).dims[dim]
        texts = [self.wire_size(name, reads) for name in names] or ["1"]
        numbers = [int(text) for text in texts if text.isdigit()]
        rest = [text for text in texts if not text.isdigit()]
        return " * ".join([*rest, str(product_of(numbers))] if numbers else rest)

    def wire_size(self, name: str, reads: list[str]) -> str:
        """A wire's size: a number, or a variable that is added to what is read."""
        wire = self.circuit.wires[name]
        key = f"size of {name}"
        if any(part is None for *_, part in wire.places) or (wire.places and name not in self.writer.given):
            return str(wire.size)
        if key not in self.written:
            near: dict[str, str] = {}
            for known in reads:
                if " " not in known:
                    self._holds(known, near)
            known = near.get(name) or self.holders.get(name) or self.outer.get(name)
            if known is None:
                return str(wire.size)
            at = tensor_of(self.circuit, known).dims.index((name,))
            self._add(Line(f"$0.shape[{at}]", [known], [key], words=[f"n_{ascii_of(wire.label)}"]))
        if key not in reads:
            reads.append(key)
        return f"${reads.index(key)}"

    # views --------------------------------------------------------------------------------------------

    def _view(self, name: str) -> View:
        known = self.views.get(name)
        if known is None:
            dims = [[Id(wire) for wire in dim] for dim in self.circuit.tensor(name).dims]
            known = self.views[name] = View(name, dims, dims)
        return known

    def _reshaped(self, op: Op) -> View | None:
        """The view after an op that only re-indexes; None where its axes do not say so one by one."""
        view = self._view(op.inputs[0])
        at: dict[tuple[int, int], Id] = {}
        for axis in op.axes:
            if len(axis.outs) != 1 or len(axis.ins) > 1 or axis.outs[0][0] or (axis.ins and axis.ins[0][0]):
                return None
            place = axis.outs[0][1:]
            at[place] = view.dims[axis.ins[0][1]][axis.ins[0][2]] if axis.ins else Id(axis.wire, new=True)
        before = [found for dim in view.dims for found in dim]
        dims = [[at[d, f] for f in range(len(dim))] if all((d, f) in at for f in range(len(dim))) else None
                for d, dim in enumerate(self.circuit.tensor(op.outputs[0]).dims)]
        if any(dim is None for dim in dims):
            return None
        whole = [dim for dim in dims if dim is not None]
        kept = [found for dim in whole for found in dim if not found.new or found in before]
        if len(op.inputs) > 1 or {id(i) for i in kept} != {id(i) for i in before}:
            return None
        return View(view.base, view.start, whole)

    def _solid(self, name: str) -> str:
        """The key of a tensor as it is, re-indexed by a line of its own if need be."""
        view = self._view(name)
        if view.is_plain():
            return view.base
        key = f"{name}@"
        if key not in self.written:
            self._line(self._rearranged(view, key))
        self.views[name] = View(key, view.dims, view.dims)
        return key

    def _rearranged(self, view: View, key: str) -> Line:
        letters, reads = Letters(self.circuit), [view.base]
        sizes: dict[str, str] = {}
        for dim in view.start:
            free = [found for found in dim if not self.circuit.wires[found.wire].places] or dim[-1:]
            sizes |= {letters.of(i): self.wire_size(i.wire, reads) for i in dim if i is not free[0]}
        own = {id(i) for dim in view.start for i in dim}
        news = [i for dim in view.dims for i in dim if id(i) not in own]
        left = letters.pattern(view.start)
        sizes |= {letters.of(i): self.wire_size(i.wire, reads) for i in news}
        right = letters.pattern(view.dims)
        said = "".join(f", {letter}={size}" for letter, size in sizes.items())
        return Line(f'{"repeat" if news else "rearrange"}($0, "{left} -> {right}"{said})', reads, [key])

    def _einsum(self, op: Op, prefer: str) -> bool:
        """A product of data by its letters; False where a letter is a product itself."""
        if any(axis.role not in ("broadcast", "diagonal", "contracted") or not axis.ins for axis in op.axes):
            return False
        out = self.circuit.tensor(op.outputs[0]).dims
        if any(len(dim) != 1 for dim in out) or any(len(axis.outs) > 1 for axis in op.axes):
            return False
        if any(len(dim) > 1 for name in op.inputs for dim in self.circuit.tensor(name).dims):
            return False
        letters, sides, reads = Letters(self.circuit), list[str](), list[str]()
        axis_at = {(slot, dim): axis for axis in op.axes for slot, dim, _ in axis.ins}
        for slot, name in enumerate(op.inputs):
            view = self._view(name)
            if not view.is_single() and all(view.dims):
                self._solid(name)
                view = self._view(name)
            axis_of = {id(dim[0]): axis_at.get((slot, d)) for d, dim in enumerate(view.dims) if dim}
            if not view.is_single() or any(axis_of.get(id(dim[0])) is None for dim in view.start):
                return False
            reads.append(view.base)
            sides.append(" ".join(letters.of(axis_of[id(dim[0])], dim[0].wire) for dim in view.start))
        made = {place[1]: axis for axis in op.axes for place in axis.outs}
        right = " ".join(letters.of(made[d], dim[0]) for d, dim in enumerate(out))
        operands = ", ".join(f"${n}" for n in range(len(reads)))
        line = Line(f'einsum({operands}, "{", ".join(sides)} -> {right}")', reads, list(op.outputs),
                    words=[prefer or _word(op.fn)], named=bool(prefer))
        self._line(line)
        return True


def _snake(title: str) -> str:
    word = re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", title)).lower().strip("_")
    return word if word.isidentifier() and not keyword.iskeyword(word) else f"block_{word}"


def _word(fn: str) -> str:
    """A variable's name after the function that makes it."""
    word = re.sub(r"\W+", "_", fn).strip("_")
    word = f"{word}_" if hasattr(builtins, word) else word
    return {"getitem": "part", "setitem": "whole", "write": "whole", "linear": "y"}.get(word, word) or "x"
