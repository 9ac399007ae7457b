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

Visit = Callable[[str, torch.Tensor], torch.Tensor | None]
"""(wire, hidden values of shape (..., neurons)) -> what to put in their place, or None to leave them."""


class Tap(TorchFunctionMode):
    """While active, hands the hidden values of blocks to a function, each time that a value map is about to read them."""

    def __init__(self, model: torch.nn.Module, blocks: Mapping[str, FeedForward], visit: Visit) -> None:
        super().__init__()
        self.visit = visit
        self.readers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        for wire, block in blocks.items():
            for value in block.values[:1]:  # each of several would read the same
                found = self.readers.get(named[value.parameter]) or ()
                self.readers[named[value.parameter]] = (*found, (wire, value, block))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        readers: tuple[tuple[str, Weight, FeedForward], ...] = ()
        for tensor in tensors:
            readers = readers or self.readers.get(tensor) or ()
        if not readers:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        for wire, value, block in readers:
            if name == value.fn and value.operand < len(tensors) and tensors[value.operand] not in self.readers:
                hidden = tensors[value.operand]
                if hidden.ndim >= -block.dim and hidden.shape[block.dim] == block.size:
                    changed = self.visit(wire, hidden.movedim(block.dim, -1))
                    if changed is not None:
                        args, kwargs = _replaced(args, kwargs, hidden, changed.movedim(-1, block.dim))
                    return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and not any(result is tensor for tensor in tensors):
            self.readers[result] = readers  # a cast or a view of the parameter, or one expert of many
        return result


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
