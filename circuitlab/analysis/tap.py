"""Seeing, and changing, the hidden values of feed-forward blocks while a model runs.

A block's values are found where its value map multiplies them: by the parameter, so that it does not matter whether
that is a module, a function of a parameter, or code that is called in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.maps import Weight
from circuitlab.errors import InputError

_mapped: Callable[[Any], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]

Visit = Callable[[str, torch.Tensor], torch.Tensor | None]
"""(wire, values with the neurons or inputs as last dimension) -> what to put in their place, or None to leave them."""

Origin = tuple[torch.Tensor, int]
"""Rows of a matrix that were picked from another: their numbers there, and how many rows that has."""

Expert = int | torch.Tensor | None
"""Number of the expert that values belong to, or of each position's; None if that is not known."""

_BY_FIRST = frozenset("__getitem__ index_select gather take_along_dim to type_as view_as reshape_as expand_as".split())
"""Functions whose other operands choose entries, a type or a shape."""
_CASTS = frozenset("to float half bfloat16 double type type_as contiguous clone cpu cuda".split())
_KEEPS_ROWS = frozenset("to float half bfloat16 type contiguous clone detach dropout mul mul_ masked_fill masked_fill_".split())
_VIEWS_ROWS = frozenset("view reshape flatten unsqueeze squeeze".split())
_PARTS_ROWS = frozenset("split chunk tensor_split".split())
_Readers = tuple[tuple[str, Weight, int, "Visit | None"], ...]


@dataclass(frozen=True)
class _Held:
    """A parameter, or what was made of it alone.

    Attributes:
        readers: blocks that read it, as (wire, weight, size, what to call).
        stack: where experts lie in memory one after another: address, bytes of each, number. None if they do not.
        expert: those that it holds, None for all.
    """

    readers: _Readers
    stack: tuple[int, int, int] | None = None
    expert: Expert = None

    def viewed(self, result: torch.Tensor) -> _Held:
        """The same for a view, or for a copy that goes on as one of its own."""
        if self.stack is None or self.expert is not None or not result.numel():
            return self
        start, size, number = self.stack
        first = result.data_ptr() - start
        last = first + sum((n - 1) * step for n, step in zip(result.shape, result.stride(), strict=True)) * result.element_size()
        if not 0 <= first <= last < size * number:
            return replace(self, stack=None)
        return replace(self, expert=first // size) if first // size == last // size else self


def _stack(tensor: torch.Tensor, number: int) -> tuple[int, int, int] | None:
    """Where experts lie in memory, if the first dimension counts them, or holds their rows one after another."""
    within = sum((n - 1) * step for n, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    if number < 2 or not tensor.ndim or tensor.shape[0] % number or tensor.stride(0) <= within:
        return None
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size() * (tensor.shape[0] // number), number


class Tap(TorchFunctionMode):
    """While active, hands what blocks compute to functions.

    Args:
        model: that is run.
        blocks: wire -> block.
        visit: gets hidden values, of shape (..., neurons), each time that a value map is about to read them; what it puts
            in their place is read by all value maps of the block.
        enter: gets the inputs of a block, of shape (..., inputs), each time that its first map is about to read them.

    Attributes:
        expert: in a call of a function, of the values, where one of many or one for each position is picked.
        origin: in a call of a function, where the rows of the values were picked from, if that is known.
    """

    def __init__(
        self, model: torch.nn.Module, blocks: Mapping[str, FeedForward], visit: Visit | None = None, enter: Visit | None = None
    ) -> None:
        super().__init__()
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.put: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.changed: set[str] = set()
        self.counted: dict[tuple[str, int], int] = {}
        self.origins: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.expert: Expert = None
        self.origin: Origin | None = None
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        self.fixed = frozenset(map(id, named.values()))
        self.learned: WeakIdKeyDictionary = WeakIdKeyDictionary()
        held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
        for tensor in (*named.values(), *held):
            self.learned[tensor] = True
        for wire, block in blocks.items():
            for weights, size, function in ((block.values, block.size, visit), (block.first[:1], 0, enter)):
                for number, weight in enumerate(weights if function is not None else ()):
                    tensor = named[weight.parameter]  # the first is visited: all read the same
                    known = self.known.get(tensor) or _Held((), _stack(tensor, weight.stacked) if weight.along == 0 else None)
                    self.known[tensor] = replace(known, readers=(*known.readers, (wire, weight, size, None if number else function)))

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        # the functions know this tap: what is held in a circle waits for the garbage collector, and GPUs are small
        self.expert = self.origin = None
        for held in (self.known, self.put, self.origins, self.learned):
            held.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        weights = next((tensor for tensor in tensors if tensor in self.known), None)
        name, met = getattr(func, "__name__", ""), False
        learned = bool(tensors) and all(tensor in self.learned for tensor in tensors[: 1 if name in _BY_FIRST else None])
        if weights is None:
            result = func(*args, **kwargs)
            self._follow(name, args, kwargs, tensors, result)
            for made in _tensors((result,), {}) if learned else ():
                self.learned[made] = True
            return result
        held: _Held = self.known[weights]
        for wire, weight, size, function in held.readers:
            if name != weight.fn or weight.operand >= len(tensors) or tensors[weight.operand] in self.learned:
                continue
            values = tensors[weight.operand]
            if values.ndim >= -weight.axis and size in (0, values.shape[weight.axis]):
                met = True
                number = self.counted[wire, id(weight)] = self.counted.get((wire, id(weight)), -1) + 1
                if weight.calls and not weight.calls[number % len(weight.calls)]:
                    continue
                if _mapped(values) or _mapped(weights):
                    raise InputError(f"the values of {wire} that {weight.parameter} reads are of one example of many (torch.vmap), and cannot "
                                     "be told from the others; write the block for all examples at once")
                self.expert = _of_groups(tensors, values, weights, held) if "grouped_mm" in name else held.expert
                self.origin = self.origins.get(values)
                put = self._put(wire, weight, values, function)
                if put is not None:
                    args, kwargs = _replaced(args, kwargs, values, put)
                    tensors = _tensors(args, kwargs)
        result = func(*args, **kwargs)
        for made in _tensors((result,), {}) if learned else ():
            if not any(made is tensor for tensor in tensors):
                self.learned[made] = True
                if not met:
                    self.known[made] = _derived(held, name, args, made)  # a cast or a view of the parameter, or one expert of many
        return result

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], result: Any) -> None:
        """Note where the rows of a function's results come from."""
        made = [tensor for tensor in _tensors((result,), {}) if tensor.ndim > 1 and tensor.is_floating_point()]
        if not made or not tensors or tensors[0].ndim < 2 or id(tensors[0]) in self.fixed:  # an embedding picks no positions
            return
        source, before = tensors[0], self.origins.get(tensors[0])
        rows, total = before or (None, source.shape[:-1].numel())
        found: Any = None
        if name == "__getitem__" and (before or len(tensors) > 1) and _rows_alone(args[1], source.ndim):
            found = (rows if rows is not None else torch.arange(total, device=source.device).view(source.shape[:-1]))[args[1]]
        elif name == "index_select" and len(tensors) == 2 and source.ndim == 2 and kwargs.get("dim", *args[1:2]) == 0:
            found = tensors[1] if rows is None else rows[tensors[1]]
        elif rows is not None and name in _KEEPS_ROWS and made[0].shape == source.shape:
            found = rows
        elif rows is not None and name in _VIEWS_ROWS and made[0].shape[-1] == source.shape[-1]:
            found = rows.reshape(made[0].shape[:-1])
        elif rows is not None and name in _PARTS_ROWS and sum(map(len, made)) == len(source):
            found = rows.split([*map(len, made)])
        for tensor, places in zip(made, found if isinstance(found, (tuple, list)) else [found], strict=False):
            if isinstance(places, torch.Tensor) and places.shape == tensor.shape[:-1]:
                self.origins[tensor] = (places, total)

    def _put(self, wire: str, weight: Weight, values: torch.Tensor, function: Visit | None) -> torch.Tensor | None:
        """What to put in the place of values that a map is about to read."""
        if function is None:
            put = self.put.get(values)
            if put is None and wire in self.changed:
                raise InputError(f"the values of {wire} that {weight.parameter} reads are not those that were changed: they are computed "
                                 "anew, or cast, between the maps that read them")
            return put
        changed = function(wire, values.movedim(weight.axis, -1))
        if changed is None:
            return None
        self.changed.add(wire)
        self.put[values] = changed = changed.movedim(-1, weight.axis)
        return changed


def _derived(held: _Held, name: str, args: tuple[Any, ...], made: torch.Tensor) -> _Held:
    """What is made of a parameter."""
    source = next((arg for arg in args if isinstance(arg, torch.Tensor)), made)
    if held.stack is None or held.expert is not None:
        return held
    if _mapped(made):
        return replace(held, stack=None)
    if made.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        return held.viewed(made)
    if _stack(source, held.stack[2]) != held.stack:  # a part of it, or turned
        return replace(held, stack=None)
    if name in _CASTS and made.shape == source.shape:
        return replace(held, stack=_stack(made, held.stack[2]))
    index: Any = args[1] if name == "__getitem__" else args[2] if name == "index_select" and len(args) > 2 and args[1] == 0 else None
    items: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    numbers = [item for item in items if isinstance(item, torch.Tensor) and item.dtype in (torch.int64, torch.int32)]
    if len(numbers) == 1 and numbers[0] is items[0] and len(source) == held.stack[2]:
        return replace(held, expert=numbers[0] % held.stack[2])
    return replace(held, stack=None)


def _of_groups(tensors: list[torch.Tensor], values: torch.Tensor, weights: torch.Tensor, held: _Held) -> torch.Tensor | None:
    """The expert of each row, of a grouped product: rows beyond the last group's end get a number too large."""
    ends = next((tensor for tensor in tensors if tensor.ndim == 1 and not tensor.is_floating_point()), None)
    if ends is None or held.stack is None or not held.stack[2] == len(weights) == len(ends):
        return None
    return torch.searchsorted(ends, torch.arange(len(values), device=ends.device, dtype=ends.dtype), right=True)


def _rows_alone(index: Any, ndim: int) -> bool:
    """Whether an index leaves a tensor's last dimension alone."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is Ellipsis or isinstance(item, (list, bool)) for item in items):
        return False
    masks = (torch.bool, torch.uint8)
    used = sum(item.ndim if isinstance(item, torch.Tensor) and item.dtype in masks else item is not None for item in items)
    return used < ndim


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], old: torch.Tensor, new: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_swapped(value, old, new) for value in args), {key: _swapped(value, old, new) for key, value in kwargs.items()}


def _swapped(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(value, (list, tuple)) and any(item is old for item in value):
        return type(value)(new if item is old else item for item in value)
    return new if value is old else value
