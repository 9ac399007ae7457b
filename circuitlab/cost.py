"""What a run costs, read off the wires: floating-point operations and memory, as numbers and as polynomials in wires.

An op costs the product of the sizes of all wires that it acts on or is broadcast over; an array takes the product of its
wires. Products of a contraction or convolution count as two operations each (multiply and add), which is how
``torch.utils.flop_counter`` counts; everything else is counted apart, one for each entry that it makes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from circuitlab.circuit import Axis, Block, Circuit, Op, Tensor

_BYTES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float32": 4, "int32": 4, "uint32": 4, "uint64": 8,
          "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "complex32": 4}
"""Bytes an entry; other types take one."""

_ALIASES = frozenset(
    "view unflatten flatten squeeze unsqueeze transpose permute swapaxes swapdims movedim moveaxis t T mT H mH adjoint "
    "expand broadcast_to detach alias data positive narrow split chunk unbind select diagonal tensor_split hsplit vsplit "
    "split_with_sizes unsafe_split unsafe_chunk atleast_1d atleast_2d atleast_3d _unsafe_view real view_as_real "
    "view_as_complex requires_grad".split()
)
_TURNS = frozenset("transpose permute swapaxes swapdims movedim moveaxis t T mT H mH adjoint expand broadcast_to".split())
_COPIES_IF_TURNED = frozenset("reshape flatten contiguous ravel to float double half type type_as clone cpu cuda".split())
_POWERS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
"""At each step and for each example, one product with each of its matrices."""


@dataclass
class Polynomial:
    """A sum of products of wire sizes: monomials, each a sorted tuple of (label, size), with their coefficients."""

    terms: Counter[tuple[tuple[str, int], ...]] = field(default_factory=Counter[tuple[tuple[str, int], ...]])

    @property
    def value(self) -> int:
        """The number."""
        return sum(factor * math.prod(size for _, size in term) for term, factor in self.terms.items())

    def __add__(self, other: Polynomial) -> Polynomial:
        return Polynomial(self.terms + other.terms)

    def text(self, sizes: Mapping[str, set[int]]) -> str:
        """As text, largest monomial first; a label that stands for several sizes carries its own.

        Args:
            sizes: label -> the sizes of wires with this label.
        """
        ordered = sorted(self.terms.items(), key=lambda term: (-term[1] * math.prod(size for _, size in term[0]), term[0]))
        shown: list[str] = []
        for term, factor in ordered:
            letters = [
                (label if len(sizes[label]) == 1 else f"{label}[{size}]") + (str(power).translate(_POWERS) if power > 1 else "")
                for (label, size), power in Counter(term).items()
            ]
            shown.append(" ".join([str(factor), *letters] if factor != 1 or not letters else letters))
        return " + ".join(shown) or "0"


@dataclass
class _Row:
    """One op or block."""

    kind: str
    name: str
    title: str
    flops: Polynomial = field(default_factory=Polynomial)
    entries: Polynomial = field(default_factory=Polynomial)
    memory: Polynomial = field(default_factory=Polynomial)
    live: int = 0
    parameters: int = 0
    unknown: int = 0


def cost(circuit: Circuit) -> Any:
    """Operations and memory of every block and op of a run.

    Args:
        circuit: traced on inputs of the sizes that are counted.

    Returns:
        a pandas DataFrame, blocks before what is in them, the whole first. Its columns:

        - ``kind``, ``name``, ``title``: "block" or "op", its name, and its class or function.
        - ``flops``: of contractions and convolutions, two for each multiply and add.
        - ``entries``: made by everything else (elementwise functions, sums, norms, softmax ...), one for each.
        - ``memory``: bytes of the arrays that it makes. Views take none.
        - ``live``: bytes of all arrays that are alive while it runs, its inputs and results among them, the largest
          for a block, in a run without gradients. An array lives as long as Python held it in the traced run; parameters
          are not counted, nor what functions use inside.
        - ``parameters``: bytes of the parameters and buffers that it reads, each once.
        - ``unknown``: number of ops without a rule, of which no flops are known.
        - ``flops_in_wires``, ``memory_in_wires``: the same as polynomials in wire labels.
    """
    import pandas as pd

    live = _live(circuit)
    rows: list[_Row] = []
    _block(circuit, circuit.root, live, rows)
    sizes: dict[str, set[int]] = {}
    for wire in circuit.wires.values():
        sizes.setdefault(wire.label, set()).add(wire.size)
    return pd.DataFrame([
        {
            "kind": row.kind, "name": row.name, "title": row.title, "flops": row.flops.value, "entries": row.entries.value,
            "memory": row.memory.value, "live": row.live, "parameters": row.parameters, "unknown": row.unknown,
            "flops_in_wires": row.flops.text(sizes), "memory_in_wires": row.memory.text(sizes),
        }
        for row in rows
    ])


def _block(circuit: Circuit, block: Block, live: Mapping[str, int], rows: list[_Row]) -> _Row:
    total = _Row("block", block.name, block.title)
    rows.append(total)
    for item in block.items:
        if isinstance(item, Block):
            row = _block(circuit, item, live, rows)
        else:
            row = _op(circuit, circuit.op(item), live)
            rows.append(row)
        total.flops += row.flops
        total.entries += row.entries
        total.memory += row.memory
        total.live = max(total.live, row.live)
        total.unknown += row.unknown
    total.parameters = _parameters(circuit, block.op_names())
    return total


def _op(circuit: Circuit, op: Op, live: Mapping[str, int]) -> _Row:
    row = _Row("op", op.name, op.fn, live=live[op.name], parameters=_parameters(circuit, [op.name]))
    row.unknown = int(op.kind == "opaque")
    own = [circuit.tensor(name) for name in op.outputs]
    if op.fn in _RECURRENT:
        read = [circuit.tensor(name) for name in op.inputs]
        steps = [name for dim in read[0].dims[:-1] for name in dim]
        for weight in read:
            if weight.kind == "parameter" and len(weight.shape) == 2:
                row.flops += _product(circuit, [*steps, *(name for dim in weight.dims for name in dim)], 2)
    elif op.kind in ("linear", "contract", "conv") and _is_product(op):
        row.flops = _product(circuit, _multiplied(op), 2)
    elif op.kind not in ("reindex", "opaque") and op.fn != "write" and op.fn not in _ALIASES:
        for tensor in own:
            row.entries += _entries(circuit, tensor, 1)
    if not op.attrs.get("inplace") and not _is_alias(op):
        for tensor in own:
            row.memory += _entries(circuit, tensor, _BYTES.get(tensor.dtype, 1))
    return row


def _is_product(op: Op) -> bool:
    """Whether products are summed: of two arrays, or of one with itself (a covariance)."""
    summed = any(
        axis.role in ("contracted", "windowed") or (axis.role == "ordered" and len(axis.ins) > 1 and not axis.outs)
        for axis in op.axes
    )
    return summed and (len(op.inputs) > 1 or any(len(axis.outs) > 1 for axis in op.axes))


def _multiplied(op: Op) -> list[str]:
    """The wires over which products are formed.

    Of a convolution's positions, those of the result count, or those of the input if it is transposed: each sees the
    whole kernel. Of groups of rows, each is multiplied with its own matrix only.
    """
    if op.kind != "conv":
        many = [axis for axis in op.axes if axis.role != "gathered" and not _is_extent(axis)]
        return [axis.wire for axis in many for _ in range(max(1, len(axis.outs)))]
    transposed = "transpose" in op.fn

    def counts(axis: Any) -> bool:
        if axis.role != "windowed" or any(slot == 1 for slot, _, _ in axis.ins):
            return True
        return bool(axis.ins if transposed else axis.outs)

    return [axis.wire for axis in op.axes if counts(axis)]


def _is_extent(axis: Axis) -> bool:
    """Whether an axis tells where groups end, and neither factor has it."""
    return axis.role == "ordered" and all(slot > 1 for slot, _, _ in axis.ins)


def _product(circuit: Circuit, wires: Iterable[str], factor: int) -> Polynomial:
    term = tuple(sorted((circuit.wires[name].label, circuit.wires[name].size) for name in wires))
    return Polynomial(Counter({term: factor}))


def _entries(circuit: Circuit, tensor: Tensor, factor: int) -> Polynomial:
    return _product(circuit, [name for dim in tensor.dims for name in dim], factor)


def _parameters(circuit: Circuit, ops: Iterable[str]) -> int:
    read = {name for op in ops for name in circuit.op(op).inputs}
    held = [circuit.tensor(name) for name in read]
    return sum(_bytes(tensor) for tensor in held if tensor.kind in ("parameter", "buffer"))


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 1)


# what is alive ----------------------------------------------------------------------------------------------


def _is_alias(op: Op) -> bool:
    """Whether a result is a view of the first operand, as far as that does not depend on its layout."""
    if op.call == "$0":
        return True
    plain = op.fn == "getitem" and len(op.inputs) == 1 and op.kind in ("slice", "reindex", "index")
    return op.fn in _ALIASES or plain


def _live(circuit: Circuit) -> dict[str, int]:
    """Op name -> bytes of the arrays that are alive while it runs."""
    memory: dict[str, str] = {}  # array -> the array whose memory it is
    turned: set[str] = set()
    sizes: dict[str, int] = {}
    for name in circuit.inputs:
        memory[name], sizes[name] = name, _bytes(circuit.tensor(name))
    for op in circuit.ops:
        first = op.inputs[0] if op.inputs else ""
        for name in op.outputs:
            tensor = circuit.tensor(name)
            alias = bool(op.attrs.get("inplace")) or (
                first not in turned or _bytes(tensor) != _bytes(circuit.tensor(first))
                if op.fn in _COPIES_IF_TURNED and (op.call == "$0" or op.kind == "reindex")
                else _is_alias(op)
            )
            if first and alias:
                memory[name] = memory.get(first, "")
                if op.fn in _TURNS or first in turned:
                    turned.add(name)
            else:
                memory[name], sizes[name] = name, _bytes(tensor)
    end = len(circuit.ops)
    last = {memory[name]: end for name in (*circuit.outputs, *circuit.inputs) if memory.get(name)}
    born: dict[str, int] = dict.fromkeys(circuit.inputs, 0)
    at = {op.name: number for number, op in enumerate(circuit.ops)}
    for number, op in enumerate(circuit.ops):
        for name in (*op.inputs, *op.outputs):
            held = memory.get(name, "")
            if held:
                born.setdefault(held, number)
                last[held] = max(last.get(held, 0), number, at.get(circuit.tensor(name).until, 0))
    change = Counter[int]()
    for held, number in born.items():
        change[number] += sizes[held]
        change[last[held] + 1] -= sizes[held]
    found: dict[str, int] = {}
    alive = 0
    for number, op in enumerate(circuit.ops):
        alive += change[number]
        copied = [name for name in op.inputs if name in turned and op.fn in ("matmul", "einsum")]
        found[op.name] = alive + sum(_bytes(circuit.tensor(name)) for name in copied if len(circuit.tensor(name).shape) > 3)
    return found
