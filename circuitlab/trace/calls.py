"""One recorded call -> its text in Python, for `compile.py`: what the author wrote, on single-assignment names.

In the text ``$0``, ``$1`` ... stand for the operands, ``$[n:d]`` for the size of dimension d of result n, ``$device``
for the device, and ``$out`` for the result where it takes several statements. "" is a call that cannot be written.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from dataclasses import replace
from typing import Any

import torch

from circuitlab.trace import rules
from circuitlab.trace.events import Event, Operand, Value

_SPACES = {
    "torch": torch, "F": torch.nn.functional, "torch.linalg": torch.linalg, "torch.special": torch.special,
    "torch.fft": torch.fft, "torch._C._nn": torch._C._nn,  # pyright: ignore[reportAttributeAccessIssue]
}
_OPERATORS = {
    "add": "$0 + $1", "sub": "$0 - $1", "mul": "$0 * $1", "div": "$0 / $1", "true_divide": "$0 / $1", "pow": "$0 ** $1",
    "floor_divide": "$0 // $1", "remainder": "$0 % $1", "matmul": "$0 @ $1", "bitwise_and": "$0 & $1",
    "bitwise_or": "$0 | $1", "eq": "$0 == $1", "ne": "$0 != $1", "lt": "$0 < $1", "le": "$0 <= $1", "gt": "$0 > $1",
    "ge": "$0 >= $1", "neg": "-$0", "bitwise_not": "~$0", "rsub": "$1 - $0", "rdiv": "$1 / $0", "rtruediv": "$1 / $0",
    "rpow": "$1 ** $0", "rfloordiv": "$1 // $0", "rmod": "$1 % $0", "rmatmul": "$1 @ $0", "truediv": "$0 / $1",
    "floordiv": "$0 // $1", "mod": "$0 % $1", "invert": "~$0", "xor": "$0 ^ $1", "and": "$0 & $1", "or": "$0 | $1",
}
_ENTRYWISE = (rules.pointwise.pointwise, rules.index.where)
_SAME = frozenset("contiguous clone alias positive cpu cuda resolve_conj resolve_neg alias_copy requires_grad".split())
_CASTS = frozenset("to float double half bfloat16 int long short char byte bool type type_as".split())
_DROPOUTS = frozenset("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout".split())
_SIZED = {"zeros": 0, "ones": 0, "empty": 0, "rand": 0, "randn": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_empty": 1,
          "new_full": 1, "expand": 1, "broadcast_to": 1, "view": 1, "reshape": 1}
"""Function -> the argument where the result's sizes begin."""

_LONGEST = 4096
"""Of lists written out as data."""


class _CannotSayError(Exception):
    """Not to be written as text."""


class _Size(str):
    """Text that stands for a size."""

    __slots__ = ()


def call_text(event: Event) -> str:
    """The text of a call, "" where it cannot be written."""
    try:
        if event.levels:
            return _mapped(event)
        if event.rule is rules.leave:
            return _left(event)
        if event.fn == "write":
            view = event.args[0]
            part = f"[{event.kwargs['number']}]" if view.packed else ""
            return f"$out = $0.clone()\n{_call(view, base='$out')}{part}.copy_($1)"
        text = "" if event.func is None else _call(event)
        return f"{text}[0]" if event.packed and len(event.outs) == 1 else text
    except _CannotSayError:
        return ""


def _mapped(event: Event) -> str:
    """The call under ``vmap``, mapped again over what it hides an axis for."""
    ins, outs = [operand.levels for operand in event.operands], event.levels
    seen = replace(event, levels=(), outs=[
        Value(out.name, out.shape[len(levels) :], out.dtype, out.kind) for out, levels in zip(event.outs, outs, strict=True)
    ])
    text = call_text(seen)
    levels = {level for each in ins for level in each}
    if text == "$0" and outs == (ins[0],):
        return text
    if not text or any(set(each) != levels for each in outs) or event.rule is rules.pointwise.random:
        return ""
    if event.rule is rules.index.indexed and not ins[0] and not any(operand.ndim for operand in event.operands[1:]):
        return f"$0[{', '.join(f'${o.slot}{_place(o, outs[0], 0)}' for o in event.operands[1:])}]"
    if event.rule in _ENTRYWISE:  # broadcasting finds the axes that stand in their places
        places = [_place(operand, outs[0], len(seen.outs[0].shape)) for operand in event.operands]
        return re.sub(r"\$(\d+)", lambda found: found[0] + places[int(found[1])], text.replace("$$", "\0")).replace("\0", "$$")
    names = [chr(ord("a") + n) if n < 26 else f"a{n}" for n in range(len(ins))]
    inner = re.sub(r"\$(\d+)", lambda found: names[int(found[1])], text.replace("$$", "\0"))
    inner = re.sub(r"\$\[(\d+):(\d+)\]", lambda found: f"$[{found[1]}:{int(found[2]) + len(outs[int(found[1])])}]", inner)
    rows = inner.replace("$out", "out").split("\n")
    function, before = f"lambda {', '.join(names)}: {inner}", ""
    if len(rows) > 1:
        function, before = "each", "\n    ".join([f"def each({', '.join(names)}):", *rows, "return out"]) + "\n$out = "
    for level in sorted(levels, reverse=True):
        said = ", ".join("0" if level in each else "None" for each in ins)
        in_dims = f", in_dims=({said}{',' if len(ins) == 1 else ''})" if "None" in said else ""
        function = f"torch.vmap({function}{in_dims})"
    return f"{before}{function}({', '.join(f'${n}' for n in range(len(ins)))})".replace("\0", "$$")


def _place(operand: Operand, levels: tuple[int, ...], ndim: int) -> str:
    """An index that puts an operand's axes, hidden ones included, where the result's are."""
    items = [":" if level in operand.levels else "None" for level in levels]
    items += ["None"] * (ndim - operand.ndim) + [":"] * operand.ndim
    while items[:1] == ["None"]:
        del items[0]
    while items[-1:] == [":"]:
        del items[-1]
    return f"[{', '.join(items)}]" if items else ""


def _left(event: Event) -> str:
    """Numbers that steer Python code: they must be what they were."""
    number = event.kwargs.get("result")
    if number is None:
        raise _CannotSayError
    if event.fn in ("equal", "allclose"):
        return f"expect(torch.{event.fn}({', '.join(map(_literal, event.args))}), {number})"
    return f"expect($0.tolist(), {_literal(number)})"


def _call(event: Event, base: str = "") -> str:
    name = event.fn
    args, kwargs = list(event.args), {k: v for k, v in event.kwargs.items() if k not in ("result", "inplace", "device")}
    if event.kwargs.get("device") is not None:
        kwargs["device"] = _Size("$device")
    if name in _SAME or (name in _CASTS and event.outs[0].dtype == event.operands[0].value.dtype):
        return base or "$0"
    if name == "setitem":
        return f"$out = $0.clone()\n$out[{_index(event.args[1])}] = {_literal(event.args[2])}"
    if name == "as_strided":  # of memory in order, which copies that are not said may have put it in
        if base or event.rule is rules.opaque:
            raise _CannotSayError
        base = "$0.contiguous()"
    bare = name[:-1] if rules.in_place(name) else name
    signature = _parameters(event.func)
    if "inplace" in signature:
        args = args[: signature.index("inplace")]
    if bare in _DROPOUTS and not _training(args, kwargs, signature):
        return base or "$0"
    if _is_nothing(bare, args, kwargs, event):
        return base or "$0"
    args, kwargs = _without_defaults(event.func, args if base else _sized(name, args, event), kwargs)
    if name == "getitem":
        return f"{base}[{_index(args[1])}]" if base else f"$0[{_index(_sliced(event))}]"
    said = _OPERATORS.get(bare, "")
    if said and not kwargs and len(args) == (1 if "$1" not in said else 2):
        texts = [base or _literal(args[0]), *map(_literal, args[1:])]
        return said.replace("$1", "\0").replace("$0", _enclosed(texts[0])).replace("\0", _enclosed(texts[-1]))
    method, path = _path(event.func)
    if method == "property":
        return f"{base or '$0'}.{path}"
    written = method == "method" and bare != name and not hasattr(torch.Tensor, bare)
    if bare != name and path.startswith("__i"):  # a |= b
        written, path = False, f"__{path[3:]}"
    elif bare != name and not written:
        path = path.removesuffix("_")
    texts = [*map(_literal, args), *(f"{key}={_literal(item)}" for key, item in kwargs.items())]
    if method == "method":
        whole = base or texts[0]
        if written:
            return f"$out = {whole}.clone()\n$out.{path}({', '.join(texts[1:])})"
        return f"{_enclosed(whole)}.{path}({', '.join(texts[1:])})"
    if base:
        texts[0] = base
    return f"{path}({', '.join(texts)})"


def _is_nothing(name: str, args: list[Any], kwargs: dict[str, Any], event: Event) -> bool:
    """Times one, or plus zero: left over from a choice that was not taken."""
    neutral = {"mul": 1, "div": 1, "add": 0, "sub": 0}.get(name)
    plain = len(args) == 2 and not kwargs and isinstance(args[1], (int, float)) and args[1] == neutral
    return plain and isinstance(args[0], Operand) and event.outs[0].dtype == args[0].value.dtype


def _without_defaults(func: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a Python function that are its defaults need not be said."""
    if not isinstance(func, types.FunctionType):
        while len(args) > 2 and args[-1] is None and not kwargs:
            args = args[:-1]
        return args, kwargs
    defaults = _defaults(func)
    names = [*defaults][: len(args)]

    def said(name: str, value: Any) -> bool:
        plain = value is None or isinstance(value, (bool, int, float, str))
        return not (plain and type(value) is type(defaults.get(name)) and value == defaults.get(name))

    while len(args) > 1 and len(names) == len(args) and not said(names[-1], args[-1]):
        args, names = args[:-1], names[:-1]
    return args, {key: value for key, value in kwargs.items() if said(key, value)}


def _enclosed(text: str) -> str:
    """A negative number or an expression, in parentheses."""
    return f"({text})" if text[:1] == "-" or " " in text else text


@functools.cache
def _path(func: Any) -> tuple[str, str]:
    """How a function is called ("method", "property" or "function"), and by which name."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "property", getattr(func.__self__, "__name__", "")
    if isinstance(func, (rules.torch_op_packet, rules.torch_op)):
        return "function", f"torch.ops.{func}"
    if _same(getattr(torch.Tensor, name, None), func):
        return "method", name
    for space, module in _SPACES.items():
        short = name.removeprefix(space.rpartition(".")[2] + "_")
        if _same(getattr(module, short, None), func):
            return "function", f"{space}.{short}"
    raise _CannotSayError


def _same(found: Any, func: Any) -> bool:
    """Whether a function is torch's ``func``, or what another tool has put around that: it keeps the name and the text."""
    if found is None or found == func:
        return found is not None
    return isinstance(found, types.FunctionType) and (found.__name__, found.__doc__) == (func.__name__, func.__doc__)


@functools.cache
def _defaults(func: Any) -> dict[str, Any]:
    """A Python function's parameters with their defaults."""
    if not isinstance(func, types.FunctionType):
        return {}
    return {name: p.default for name, p in inspect.signature(func, follow_wrapped=False).parameters.items()}


@functools.cache
def _parameters(func: Any) -> tuple[str, ...]:
    """Names of a Python function's parameters."""
    return tuple(_defaults(func))


def writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function is told ``inplace=True``."""
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    names = _parameters(func)
    return "inplace" in names and len(args) > (at := names.index("inplace")) and bool(args[at])


def _training(args: list[Any], kwargs: dict[str, Any], signature: tuple[str, ...]) -> bool:
    given = dict(zip(signature or ("input", "p", "train"), args, strict=False)) | kwargs
    return bool(given.get("training", given.get("train", True)))


def _sized(name: str, args: list[Any], event: Event) -> list[Any]:
    """Arguments that are the result's sizes, as such."""
    shape = event.outs[0].shape if event.outs else ()
    if name == "arange" and shape:
        plain = len(args) == 1 or (len(args) == 2 and args[0] == 0)
        return [*args[:-1], _Size("$[0:0]")] if plain and args[-1] == shape[0] else args
    if name == "narrow" and len(args) == 4 and isinstance(args[1], int) and args[2] == 0:
        return [*args[:3], _Size(f"$[0:{args[1] % len(shape)}]")]
    start = _SIZED.get(name)
    if start is None or len(args) <= start:
        return args
    listed = isinstance(args[start], (tuple, list))
    sizes = list(args[start]) if listed else args[start:]
    if len(sizes) != len(shape) or any(size not in (-1, whole) for size, whole in zip(sizes, shape, strict=True)):
        return args
    said = [size if size in (-1, 1) else _Size(f"$[0:{d}]") for d, size in enumerate(sizes)]
    return [*args[:start], tuple(said), *args[start + 1 :]] if listed else [*args[:start], *said]


def _sliced(event: Event) -> Any:
    """The index of a getitem; a slice's stop, where it is the size of the result, as such."""
    index = event.args[1]
    items = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is Ellipsis or isinstance(item, (int, slice))) for item in items):
        return index
    taken = sum(item is not None and item is not Ellipsis for item in items)
    shape, dim = event.outs[0].shape, 0
    said: list[Any] = []
    for item in items:
        if item is Ellipsis:
            dim += event.operands[0].ndim - taken
        elif isinstance(item, slice):
            plain = item.start in (None, 0) and item.step in (None, 1) and isinstance(item.stop, int) and item.stop > 0
            said.append(_Size(f":$[0:{dim}]") if plain and item.stop == shape[dim] else item)
            dim += 1
            continue
        elif item is None:
            dim += 1
        said.append(item)
    return tuple(said)


def _index(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(map(_index, index)) + ("," if len(index) == 1 and not isinstance(index[0], slice) else "") or "()"
    if isinstance(index, slice):
        start, stop, step = ("" if v is None else _literal(v) for v in (index.start, index.stop, index.step))
        return f"{start}:{stop}" + (f":{step}" if step else "")
    return "..." if index is Ellipsis else _literal(index)


def _literal(value: Any) -> str:
    if isinstance(value, Operand):
        return f"${value.slot}"
    if isinstance(value, _Size):
        return str(value)
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, str):
        return repr(value).replace("$", "$$")
    if isinstance(value, (tuple, list, range)):
        if len(value) > _LONGEST:
            raise _CannotSayError
        inner = ", ".join(map(_literal, value))
        return f"[{inner}]" if not isinstance(value, tuple) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, torch.device):
        return "$device"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value)
    if value is Ellipsis or isinstance(value, slice):
        return "..." if value is Ellipsis else f"slice({value.start}, {value.stop}, {value.step})"
    if hasattr(value, "item") and hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        return _literal(value.item())
    raise _CannotSayError
