"""Seeing, and changing, the hidden values of feed-forward blocks while a model runs.

A block's values are found where its value map multiplies them: by the parameter, so that it does not matter whether
that is a module, a function of a parameter, or code that is called in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from circuitlab.analysis.feedforward import FeedForward, Weight
from circuitlab.errors import InputError

Visit = Callable[[str, torch.Tensor], torch.Tensor | None]
"""(wire, values with the neurons or inputs as last dimension) -> what to put in their place, or None to leave them."""

Origin = tuple[torch.Tensor, int]
"""Rows of a matrix that were picked from another: their numbers there, and how many rows that has."""

_PICKS = frozenset("__getitem__ index_select gather take_along_dim".split())
_KEEPS_ROWS = frozenset("to float half bfloat16 type contiguous clone detach dropout mul mul_ masked_fill masked_fill_".split())


class Tap(TorchFunctionMode):
    """While active, hands what blocks compute to functions.

    Args:
        model: that is run.
        blocks: wire -> block.
        visit: gets hidden values, of shape (..., neurons), each time that a value map is about to read them; what it puts
            in their place is read by all value maps of the block.
        enter: gets the inputs of a block, of shape (..., inputs), each time that its first map is about to read them.

    Attributes:
        groups: in a call of a function, the ends of each expert's rows if the values are read by a grouped product.
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
        self.groups: torch.Tensor | None = None
        self.origin: Origin | None = None
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        self.learned: WeakIdKeyDictionary = WeakIdKeyDictionary()
        held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
        for tensor in (*named.values(), *held):
            self.learned[tensor] = True
        for wire, block in blocks.items():
            for weights, size, function in ((block.values, block.size, visit), (block.first[:1], 0, enter)):
                for number, weight in enumerate(weights if function is not None else ()):
                    tensor = named[weight.parameter]  # the first is visited: all read the same
                    self.known[tensor] = (*(self.known.get(tensor) or ()), (wire, weight, size, None if number else function))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        readers: tuple[tuple[str, Weight, int, Visit | None], ...] = ()
        for tensor in tensors:
            readers = readers or self.known.get(tensor) or ()
        name, met = getattr(func, "__name__", ""), False
        learned = bool(tensors) and all(tensor in self.learned for tensor in tensors[: 1 if name in _PICKS else None])
        if not readers:
            result = self._followed(name, tensors, func(*args, **kwargs))
            return self._made(result, tensors, None) if learned else result
        for wire, weight, size, function in readers:
            if name != weight.fn or weight.operand >= len(tensors) or tensors[weight.operand] in self.learned:
                continue
            values = tensors[weight.operand]
            if values.ndim >= -weight.axis and size in (0, values.shape[weight.axis]):
                met = True
                number = self.counted[wire, id(weight)] = self.counted.get((wire, id(weight)), -1) + 1
                if weight.calls and not weight.calls[number % len(weight.calls)]:
                    continue
                self.groups = next((t for t in tensors if t.ndim == 1 and not t.is_floating_point()), None) if "grouped_mm" in name else None
                self.origin = self.origins.get(values)
                put = self._put(wire, weight, values, function)
                if put is not None:
                    args, kwargs = _replaced(args, kwargs, values, put)
                    tensors = _tensors(args, kwargs)
        result = func(*args, **kwargs)
        return self._made(result, tensors, None if met else readers) if learned else result

    def _made(self, result: Any, tensors: list[torch.Tensor], readers: Any) -> Any:
        """What is made of parameters alone: a cast or a view, one expert of many."""
        for made in _tensors((result,), {}):
            if not any(made is tensor for tensor in tensors):
                self.learned[made] = True
                if readers:
                    self.known[made] = readers
        return result

    def _followed(self, name: str, tensors: list[torch.Tensor], result: Any) -> Any:
        """A function's result, and where its rows come from."""
        if not isinstance(result, torch.Tensor) or result.ndim != 2 or not tensors or not result.is_floating_point():
            return result
        source, before = tensors[0], self.origins.get(tensors[0])
        if name in ("__getitem__", "index_select") and len(tensors) == 2:
            index = tensors[1]
            if source.ndim == 2 and index.ndim == 1 and index.dtype == torch.int64 and result.shape == (len(index), source.shape[1]):
                self.origins[result] = (index, len(source)) if before is None else (before[0][index], before[1])
        elif before is not None and name in _KEEPS_ROWS and result.shape == source.shape:
            self.origins[result] = before
        return result

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


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], old: torch.Tensor, new: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def swap(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(swap(item) for item in value) if any(item is old for item in value) else value
        return new if value is old else value

    return tuple(swap(value) for value in args), {key: swap(value) for key, value in kwargs.items()}
