"""Torch functions by what recording does with them: tables of names, and a plan for each."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable
from typing import Any

import torch

from circuitlab.trace import compose, rules

FACTORIES = frozenset(
    "zeros ones full empty arange range linspace logspace eye rand randn randint randperm tensor as_tensor "
    "scalar_tensor tril_indices triu_indices hann_window hamming_window bartlett_window blackman_window kaiser_window "
    "empty_strided new_tensor new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like "
    "rand_like randn_like randint_like normal complex sparse_coo_tensor".split()
)
VIEWS = frozenset(
    "view reshape flatten unflatten transpose permute getitem select narrow split chunk unbind diagonal expand "
    "squeeze unsqueeze detach data real imag view_as_real view_as_complex unfold T mT H mH contiguous to float double "
    "half bfloat16 int long bool type alias swapaxes swapdims movedim moveaxis t as_strided ravel adjoint broadcast_to "
    "expand_as view_as reshape_as tensor_split hsplit vsplit dsplit positive split_with_sizes unsafe_split "
    "unsafe_chunk atleast_1d atleast_2d atleast_3d broadcast_tensors squeeze_ unsqueeze_ transpose_ t_ swapaxes_ "
    "detach_ type_as cpu cuda requires_grad_ conj pixel_shuffle".split()
)
BY_SHAPE = {
    "view_as": (torch.Tensor.view, lambda other: tuple(other.shape)),
    "reshape_as": (torch.Tensor.reshape, lambda other: tuple(other.shape)),
    "expand_as": (torch.Tensor.expand, lambda other: tuple(other.shape)),
    "type_as": (torch.Tensor.to, lambda other: other.dtype),
}
"""Functions whose other operand gives its shape or type and nothing else -> what they are without it."""

LEAVING = frozenset("item tolist bool float int index complex numpy array equal allclose is_nonzero".split())
"""Functions that give numbers to Python, where we cannot follow them."""

KEEPS_PLACE = frozenset("requires_grad_ detach_".split())

Plan = tuple[Any, str, Any, Callable[..., Any] | None]
"""The function itself, its name, its rule, and for composites the function to run in its place."""

_plans: dict[Any, Plan] = {}
_TORCH = os.path.dirname(torch.__file__) + os.sep


def plan_of(func: Any) -> Plan:
    """The plan for a function."""
    plan = _plans.get(func)
    if plan is None:
        plan = _plans[func] = _planned(_itself(func))
    return plan


def _itself(func: Any) -> Any:
    """A function of torch without what other tools have put around it: that has run already."""
    def torchs(known: Any) -> bool:
        return not isinstance(known, types.FunctionType) or known.__code__.co_filename.startswith(_TORCH)

    inner = inspect.unwrap(func, stop=torchs)
    return inner if torchs(inner) else func


def _planned(func: Any) -> Plan:
    name = rules.name_of(func)
    replacement = compose.REPLACEMENTS.get(name) or compose.before_relu(func, name)
    if replacement is not None:
        return func, name, None, replacement
    rule = rules.lookup(func, name)
    if rule is rules.opaque and func is not torch.autograd.grad:  # of which the body says nothing
        entered = _entered(func)
        if entered is not None:
            return func, name, None, entered
    return func, name, rule, None


def _entered(func: Any) -> Callable[..., Any] | None:
    """A composite torch function whose body runs instead of asking the mode again; None where there is no body."""
    if not isinstance(func, types.FunctionType) or not func.__module__.startswith("torch"):
        return None
    checks = [n for n in func.__code__.co_names if n.startswith("has_torch_function")]
    if not checks or any(check not in func.__globals__ for check in checks):
        return None
    names = {**func.__globals__, **{check: lambda *_: False for check in checks}}
    made = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    made.__kwdefaults__ = func.__kwdefaults__
    return made
