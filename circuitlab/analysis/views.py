"""Calls of views, as a circuit writes them, made on other arrays.

A circuit may come from a file of somebody else's, so its text is not run as code: it is read, and what is no view of
its operands with numbers as arguments is refused.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch

from circuitlab.circuit import Circuit, Op

_VIEWS = frozenset(
    "view reshape unflatten flatten squeeze unsqueeze transpose permute swapaxes swapdims movedim moveaxis t contiguous clone "
    "chunk split tensor_split hsplit vsplit unbind select narrow expand ravel detach to float".split()
)


class NoViewError(ValueError):
    """The call is no view, or its arguments are no plain numbers."""


def view(circuit: Circuit, op: Op, operands: Sequence[torch.Tensor]) -> Any:
    """What the call of an op gives for these operands.

    Raises:
        NoViewError: the op is no view, or does not run on these.
    """
    sizes = [circuit.tensor(name).shape for name in op.outputs]
    text = re.sub(r"\$\[(\d+):(\d+)\]", lambda m: str(sizes[int(m[1])][int(m[2])]), op.call)  # as `trace/calls.py` says
    try:
        return _value(ast.parse(re.sub(r"\$(\d+)", r"_\1", text), mode="eval").body, operands)
    except NoViewError:
        raise
    except Exception as error:
        raise NoViewError(f"{op.fn} in {op.name!r}: {type(error).__name__}: {error}") from None


def _value(node: ast.expr, operands: Sequence[torch.Tensor]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | None | EllipsisType()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
            return -number
        case ast.Name(id=name) if re.fullmatch(r"_\d+", name):
            return operands[int(name[1:])]
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(_value(part, operands) for part in parts)
        case ast.Slice(lower=lower, upper=upper, step=step):
            return slice(*(None if part is None else _value(part, operands) for part in (lower, upper, step)))
        case ast.Subscript(value=inner, slice=index):
            return _value(inner, operands)[_value(index, operands)]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name), args=[first, *args], keywords=keywords) if name in _VIEWS:
            return _called(first, name, args, keywords, operands)
        case ast.Call(func=ast.Attribute(value=inner, attr=name), args=args, keywords=keywords) if name in _VIEWS:
            return _called(inner, name, args, keywords, operands)
    raise NoViewError(ast.unparse(node))


def _called(target: ast.expr, name: str, args: Sequence[ast.expr], keywords: Sequence[ast.keyword], operands: Sequence[torch.Tensor]) -> Any:
    return getattr(_value(target, operands), name)(
        *(_value(arg, operands) for arg in args), **{str(word.arg): _value(word.value, operands) for word in keywords}
    )
