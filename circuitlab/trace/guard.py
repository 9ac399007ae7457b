"""Harmlessness: a trace runs a copy that shares the parameters, and puts global random state back.

The copy is a deep copy of everything but the parameters, so that whatever a forward writes (caches, counters, running
statistics, lists) is written to the copy. In a meta copy every tensor is a meta tensor: no weights are allocated. What
a forward keeps outside of its module (results of cached functions, tables in global dicts) is taken out again.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import gc
import io
import random
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from circuitlab.errors import InputError


class _CopyTensors(TorchFunctionMode):
    """While active, ``copy.deepcopy`` of a tensor gives what ``twin`` gives."""

    def __init__(self, twin: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.twin = twin

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__deepcopy__":  # by name: other tools put wrappers in the place of torch's functions
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.twin(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A new meta tensor of the same shape, strides, dtype and kind."""
    with torch.no_grad():
        twin = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.detach().clone()


def copy_model(
    model: torch.nn.Module, values: Any, *, meta: bool = False, convert: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.nn.Module, Any, dict[int, torch.Tensor]]:
    """Deep copies of a model and of values for its forward.

    Args:
        model: is not changed.
        values: any structure of inputs.
        meta: all tensors of the copies are meta tensors; otherwise parameters are shared and other tensors cloned.
        convert: gives the copy of each tensor, parameters included, which are then not shared.

    Returns:
        the model's copy, the values' copy, and id of a copied tensor of the model -> its original.
    """
    known: dict[int, Any] = {}
    originals: dict[int, torch.Tensor] = {}
    copy_of = convert or (to_meta if meta else _own_copy)

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        made = copy_of(tensor)
        originals[id(made)] = tensor
        return made

    def attempt() -> tuple[torch.nn.Module, Any, dict[int, torch.Tensor]]:
        memo = dict(known)
        originals.clear()
        copied = _eager(copy.deepcopy(model, memo))
        return copied, copy.deepcopy(values, memo), dict(originals)

    for parameter in model.parameters():
        known[id(parameter)] = copy_of(parameter) if meta or convert else parameter
    with _CopyTensors(twin), _generators():
        try:
            return attempt()
        except Exception:
            known.update(_stand_ins((model, values), known, (type(model).__name__, "inputs")))
            return attempt()


@contextmanager
def _generators() -> Iterator[None]:
    """While active, generators are copied with their own state: by their pickled one it would be a tensor to be copied."""
    known = copyreg.dispatch_table.get(torch.Generator)
    copyreg.dispatch_table[torch.Generator] = lambda generator: (generator.clone_state, ())
    try:
        yield
    finally:
        if known is None:
            del copyreg.dispatch_table[torch.Generator]
        else:
            copyreg.dispatch_table[torch.Generator] = known


def _stand_ins(given: tuple[Any, ...], known: dict[int, Any], names: tuple[str, ...]) -> dict[int, Any]:
    """What stands in the copy for what cannot be copied: locks, files and objects of other languages are shared.

    Raises:
        InputError: a module or tensor, or a generator or another iterator, which a run would use up.
    """
    found: dict[int, Any] = {}
    for value, name in zip(given, names, strict=True):
        for where, part in _uncopyable(value, known, name, set()):
            if isinstance(part, (torch.nn.Module, torch.Tensor)):
                raise InputError(
                    f"{where} ({type(part).__name__}) cannot be copied by copy.deepcopy, and a run of it could change it"
                )
            if isinstance(part, Iterator) and not isinstance(part, io.IOBase):
                where = re.sub(r"^inputs\[[01]\]", "inputs", where)  # args and kwargs
                raise InputError(
                    f"{where} is a {type(part).__name__}, which cannot be copied, and running the module would use it up; "
                    "put a list in its place"
                ) from None
            found[id(part)] = part.clone_state() if isinstance(part, torch.Generator) else part
    return found


def _uncopyable(value: Any, memo: dict[int, Any], path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The innermost parts of a value that ``copy.deepcopy`` fails on, with where they stand."""
    if id(value) in seen:
        return
    seen.add(id(value))
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        parts: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            parts = [(f"{path}[{key!r}]", item) for key, item in cast("dict[Any, Any]", value).items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = [(f"{path}[{number}]", item) for number, item in enumerate(cast("list[Any]", value))]
        elif isinstance(value, torch.nn.Module):
            parts = [(f"{path}.{key}", item) for held in (vars(value), value._modules) for key, item in held.items()]
        elif not isinstance(value, type):
            parts = [(f"{path}.{key}", item) for key, item in getattr(value, "__dict__", {}).items()]
        found = [inner for where, part in parts for inner in _uncopyable(part, memo, where, seen)]
        yield from found or [(path, value)]


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that shares nothing with it; a parameter stays one."""
    made = _own_copy(tensor)
    return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor in double precision that shares nothing with it."""
    double = torch.float64 if tensor.is_floating_point() else torch.complex128 if tensor.is_complex() else tensor.dtype
    try:
        made = tensor.detach().to(double, copy=True)
    except NotImplementedError:  # a class of arrays that has one precision
        return own(tensor)
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made


def _eager(model: torch.nn.Module) -> torch.nn.Module:
    """A copied module, whose parts that are compiled by torch.compile run their Python code instead."""
    for module in model.modules():
        inner = module._modules.get("_orig_mod")
        if inner is not None and "forward" in vars(module):
            module.__dict__["forward"] = inner.__call__
    return model


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer; the CPU if it has none."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def with_numbers(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """New tensors are made on the module's device if the caller's default is meta, where there are no numbers."""
    return device_of(model) if torch.get_default_device().type == "meta" else nullcontext()


@contextmanager
def random_state() -> Iterator[None]:
    """Put the random state of torch (CPU and CUDA), NumPy and Python back, however the body ends."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None and drawn is not None:
            numpy.random.set_state(drawn)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def no_collection() -> Iterator[None]:
    """Leave out the collection of reference cycles: building thousands of small objects sets it off again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_DICTS = (dict, OrderedDict, defaultdict)


def forget(tensors: Callable[[], list[torch.Tensor]]) -> None:
    """Take the meta tensors of a run that outlived it out of where they are kept: later runs would find them there.

    Args:
        tensors: gives those that are alive.
    """
    if tensors():
        gc.collect(0)  # what is only held by cycles of this run
        kept = tensors()
        if kept:
            _forget(kept, 3)


def _forget(kept: list[Any], depth: int) -> None:
    """Clear the caches of functions, and delete the entries of dicts, that hold one of these, or a tuple of them."""
    mine = {id(item) for item in kept}
    outer: list[Any] = []
    for holder in gc.get_referrers(*kept):
        if isinstance(holder, functools._lru_cache_wrapper):
            holder.cache_clear()
        elif type(holder) in _DICTS and not _is_namespace(holder):
            for key in [key for key, item in holder.items() if id(item) in mine]:
                del holder[key]
        elif isinstance(holder, (tuple, list)) and holder is not kept:
            outer.append(holder)
    if outer and depth:
        _forget(outer, depth - 1)


def _is_namespace(names: dict[Any, Any]) -> bool:
    """Whether a dict holds the attributes of an object, which are not ours to delete."""
    def is_of(holder: Any) -> bool:
        try:
            return isinstance(holder, (type, ModuleType)) or object.__getattribute__(holder, "__dict__") is names
        except (AttributeError, TypeError):
            return False

    return "__name__" in names or any(is_of(holder) for holder in gc.get_referrers(names))
