"""Which glyph an op, or a small block of ops, is drawn as, and what is written on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from circuitlab.circuit import Block, Circuit, Op


@dataclass(frozen=True)
class Sign:
    """Kind of glyph, its text, superscript and subscript."""

    kind: str
    label: str = ""
    upper: str = ""
    lower: str = ""


_GREEK = {"sigmoid": "σ", "relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "tanh": "tanh", "mul": "×", "sub": "−",
          "div": "÷", "add": "+", "exp": "exp", "rsqrt": "1/√", "pow": "pow", "sqrt": "√", "neg": "−",
          "eq": "=", "ne": "≠", "lt": "<", "le": "≤", "gt": ">", "ge": "≥", "logical_not": "not", "logical_and": "and",
          "logical_or": "or", "bitwise_not": "not", "bitwise_and": "and", "bitwise_or": "or"}
_BINARY = frozenset("mul add sub div pow eq ne lt le gt ge".split())
_REVERSED = {"rsub": "−", "rdiv": "÷", "rtruediv": "÷", "rpow": "^"}
_REDUCTIONS = {"mean": "𝔼", "sum": "Σ", "amax": "Max", "max": "Max", "amin": "Min", "min": "Min", "nanmean": "𝔼",
               "prod": "Π", "adaptive_avg_pool1d": "𝔼", "adaptive_avg_pool2d": "𝔼", "adaptive_avg_pool3d": "𝔼",
               "adaptive_max_pool1d": "Max", "adaptive_max_pool2d": "Max", "logsumexp": "LSE"}
_KINDS = {"softmax": "softmax", "norm": "norm", "reduce": "reduce", "contract": "contract", "embedding": "embedding",
          "slice": "bar", "cat": "bar", "opaque": "opaque", "index": "index", "conv": "conv", "pool": "pool"}


def sign_of(circuit: Circuit, ops: Sequence[Op], block: Block | None, static: frozenset[str]) -> Sign:
    """The glyph for ops that are drawn as one."""
    if len(ops) > 1:
        assert block is not None
        reduces = any(op.kind in ("reduce", "norm") for op in ops)
        return Sign("norm" if reduces else "elementwise", _name(block))
    op = ops[0]
    pointlike = op.kind == "conv" and {a.role for a in op.axes} <= {"broadcast", "contracted", "created"}
    if op.kind == "linear" or pointlike:  # a 1x1 convolution is a linear map at each position
        return Sign("linear", "L", _map_name(circuit, op, block), "+" if op.attrs.get("bias") else "")
    if op.kind == "elementwise":
        return _elementwise(circuit, op, block, static)
    if op.kind == "random" and any(name not in static for name in op.inputs):
        return Sign("elementwise", op.fn)
    if op.kind == "reduce":
        return Sign("reduce", _REDUCTIONS.get(op.fn, op.fn))
    if op.kind == "conv":
        return Sign("conv", f"★ {_window(op)}", "T" if op.attrs.get("transposed") else "", _stride(op))
    if op.kind == "pool":
        return Sign("pool", f"{'Max' if 'max' in op.fn else '𝔼'} {_window(op)}", "", _stride(op))
    if op.kind == "embedding":
        return Sign("embedding", "E")
    if op.kind == "index" and len(op.outputs) > 1:  # unbind takes apart
        return Sign("bar")
    if op.kind == "index":
        return Sign("index", _index(op.attrs.get("index", "")))
    if op.kind == "norm":
        return Sign("norm", _norm_name(op, block))
    if op.kind == "softmax":
        return Sign("softmax", "SoftMax" if op.fn in ("softmax", "_safe_softmax") else op.fn)
    if op.kind == "opaque":
        return Sign("opaque", f"{op.fn} (probed)" if op.attrs.get("probed") else op.fn)
    if op.kind in _KINDS:
        return Sign(_KINDS[op.kind])
    return Sign("box", {"getitem": "index", "setitem": "assign"}.get(op.fn, op.fn))


def part_of(sign: Sign, number: int, count: int) -> Sign:
    """The sign of one part of a fused map: of QKV Q, of kv v, of gate_up gate; else the name with a number."""
    words = sign.upper.split("_")
    if len(sign.upper) == count:
        upper = sign.upper[number]
    elif len(words) == count and "proj" not in words:
        upper = words[number]
    else:
        upper = f"{sign.upper}{number + 1}"
    return Sign(sign.kind, sign.label, upper, sign.lower)


def _map_name(circuit: Circuit, op: Op, block: Block | None) -> str:
    """Superscript of a learned map: by its wires where they tell (heads in: O; a sum of three heads out: QKV)."""
    kinds = {axis.role: set[str]() for axis in op.axes}
    for axis in op.axes:
        wire = circuit.wires[axis.wire]
        kinds[axis.role].add(wire.kind)
        if axis.role == "created" and len(wire.parts) == 3:
            inner = [circuit.wires[name].kind for _, _, names in wire.parts for name in names]
            if inner.count("head_size") == 3:
                return "QKV"
    if "head_size" in kinds.get("contracted", ()):
        return "O"
    if block is not None and block.kind == "module" and block.name:
        return letter_of(f"{block.name.split('#')[0]}.weight")
    return letter_of(_parameter(circuit, op))


def letter_of(parameter: str) -> str:
    """A short sign for a learned map, from the last word of its module's name: q_proj -> Q, out_proj -> O."""
    path = parameter.split(".")
    word = path[-2] if len(path) > 1 and path[-1] in ("weight", "bias") else path[-1] if path else ""
    low = word.lower()
    for stem, sign in (("query_key_value", "QKV"), ("qkv", "QKV"), ("c_attn", "QKV"), ("in_proj_w", "QKV"),
                       ("query", "Q"), ("key", "K"), ("value", "V"), ("out", "O")):
        if low.startswith(stem):
            return sign
    match = re.fullmatch(r"(?:w|to|fc|lin|linear)?_?([qkvo])(?:_?(?:proj|lin|linear|net|map))?", low)
    if match:
        return match[1].upper()
    return "" if word.isdigit() or low in ("linear", "dense", "fc", "weight", "lin", "proj") or len(word) > 10 else word


def _parameter(circuit: Circuit, op: Op) -> str:
    """The parameter that a linear map multiplies with, through whatever is computed from it."""
    pending, seen = list(op.inputs), set[str]()
    while pending:
        name = pending.pop(0)
        tensor = circuit.tensor(name)
        if tensor.kind == "parameter":
            if len(tensor.shape) > 1 or len(op.inputs) == 1:
                return name
        elif tensor.op and name not in seen and circuit.op(tensor.op).kind in ("reindex", "norm", "elementwise"):
            seen.add(name)
            static = all(circuit.tensor(n).kind != "input" for n in circuit.op(tensor.op).inputs)
            if static and len(seen) < 8:
                pending.extend(circuit.op(tensor.op).inputs)
    return ""


def _elementwise(circuit: Circuit, op: Op, block: Block | None, static: frozenset[str]) -> Sign:
    live = [name for name in op.inputs if name not in static]
    if len(set(live)) > 1:
        return Sign("merge", _GREEK.get(op.fn, op.fn))
    constants = [name for name in op.inputs if name in static]
    if constants:
        made = _history(circuit, constants[-1])
        functions = {step.fn for step in made}
        if op.fn in ("masked_fill", "where") or (op.fn == "add" and functions & {"masked_fill", "where", "tril", "triu"}):
            return Sign("mask", "causal" if _is_causal(circuit, made) else "mask")
        source = _source(circuit, constants[-1], made) or "const"
        last = next((s.fn for s in made if s.kind != "reindex" and "scalar" not in s.attrs), "")
        if last in _CURVES:
            source = f"{last} {source}"
        return Sign("elementwise", f"{_GREEK.get(op.fn, op.fn)} {source}")
    if block is not None and block.kind == "module" and op.fn not in ("mul", "add", "sub", "div"):
        return Sign("elementwise", _name(block))
    scalar = op.attrs.get("scalar")
    if op.fn in _BINARY and isinstance(scalar, (int, float)):
        return Sign("elementwise", f"{_GREEK.get(op.fn, op.fn)} {scalar:.3g}")
    if op.fn in _REVERSED and isinstance(scalar, (int, float)):  # the number comes first
        return Sign("elementwise", f"{scalar:.3g} {_REVERSED[op.fn]}")
    return Sign("elementwise", _GREEK.get(op.fn, op.fn))


_CURVES = frozenset("cos sin tan exp log log2 sqrt rsqrt sigmoid tanh softplus relu silu gelu abs square reciprocal".split())
"""Functions worth naming where a constant is made by them: rotary tables are cos and sin of frequencies."""


def _history(circuit: Circuit, name: str) -> list[Op]:
    """The ops that a static array comes from, the last one first; of very long histories the end."""
    pending, found = [name], dict[str, Op]()
    while pending and len(found) < 64:
        tensor = circuit.tensor(pending.pop(0))
        if tensor.op and tensor.op not in found:
            found[tensor.op] = circuit.op(tensor.op)
            pending.extend(circuit.op(tensor.op).inputs)
    return list(found.values())


def _is_causal(circuit: Circuit, made: list[Op]) -> bool:
    """A triangle, or a comparison of positions with positions."""
    if len({step.fn for step in made} & {"tril", "triu"}) == 1:
        return True
    return any(step.fn in ("le", "lt", "ge", "gt") and len(step.inputs) == 2 for step in made)


def _source(circuit: Circuit, name: str, made: list[Op]) -> str:
    """Name of the parameter or buffer that a static array comes from, or of its module; "" if there is none."""
    held = [name, *(read for step in made for read in step.inputs)]
    for kind in ("parameter", "buffer"):
        for each in held:
            if circuit.tensor(each).kind == kind:
                path = [p for p in each.split(".") if not p.isdigit()]
                return path[-2] if len(path) > 1 and path[-1] in ("weight", "bias") else path[-1]
    return ""


_NICE = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "sigmoid": "σ", "newgelu": "GELU", "geluactivation": "GELU",
         "newgeluactivation": "GELU", "siluactivation": "SiLU", "fastgeluactivation": "GELU", "identity": "id"}


def _name(block: Block) -> str:
    return _NICE.get(block.title.lower(), block.title)


def _norm_name(op: Op, block: Block | None) -> str:
    return block.title if block is not None and block.kind == "module" else op.fn


def _window(op: Op) -> str:
    sizes: tuple[int, ...] = tuple(op.attrs.get("kernel") or ())
    return str(sizes[0]) if sizes and len(set(sizes)) == 1 else "×".join(map(str, sizes))


def _stride(op: Op) -> str:
    strides = set(op.attrs.get("stride") or ())
    return "" if strides <= {1} else "/" + ",".join(map(str, sorted(strides)))


def _index(index: object) -> str:
    if isinstance(index, (tuple, list)):
        return ",".join(_index(item) if not isinstance(item, (tuple, list)) else ":".join(map(str, item))
                        for item in index)
    return str(index) if index is not None else ""
