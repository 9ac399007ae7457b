"""What recording yields: events in order, on values in single-assignment form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from circuitlab.trace.nest import Building
from circuitlab.trace.wires import Dim


class Value:
    """One array at one time.

    Attributes:
        name: unique. shape, dtype: as torch gave them.
        kind: "input", "parameter", "buffer", "constant" or "value".
        dims: filled in by `infer`: one list of atoms per dimension.
        static: does not depend on the inputs. learned: depends on a parameter.
        event: the event that made it, None for the first four kinds.
        gone: number of events when the array was let go; -1 if it was not, or nobody knows.
        read: an event that an output depends on, or the caller, gets it. Known once the run is over.
        odd: its class, where it is no plain array.
    """

    __slots__ = ("dims", "dtype", "event", "gone", "kind", "learned", "name", "odd", "read", "shape", "static")

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, kind: str) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.kind = kind
        self.dims: list[Dim] = []
        self.static = kind in ("parameter", "buffer", "constant")
        self.learned = kind == "parameter"
        self.event: Event | None = None
        self.gone = -1
        self.read = False
        self.odd = ""


class Operand:
    """A value at its place among an event's operands: what rules get for a tensor argument.

    Under ``vmap`` some axes of the value, the first ones, are hidden from the function; ``levels`` says of which.
    """

    __slots__ = ("levels", "slot", "value")

    def __init__(self, slot: int, value: Value, levels: tuple[int, ...] = ()) -> None:
        self.slot = slot
        self.value = value
        self.levels = levels

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.value.shape[len(self.levels) :]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.value.shape) - len(self.levels)

    @property
    def dims(self) -> list[Dim]:
        """Atoms of each dimension."""
        return self.value.dims[len(self.levels) :]


class Packed(Operand):
    """A weight in an object of torch's own, packed for a kernel: its axes are known, and it stands after the tensors.

    ``options`` are what is packed with it: whether there is a bias, strides and the like.
    """

    __slots__ = ("options",)

    def __init__(self, slot: int, value: Value, options: dict[str, Any]) -> None:
        super().__init__(slot, value)
        self.options = options


@dataclass(eq=False, slots=True)
class Event:
    """One torch function call.

    ``args`` and ``kwargs`` are the call's, with an `Operand` wherever a tensor stood; ``func`` is what was called, None
    where it is not a function of torch's; ``packed`` says that it gave its results in a tuple; ``probed`` are the axes
    that `circuitlab.trace.probe` found of an op without a rule. ``levels`` are, for each result, those that it hides an
    axis for, as `Operand` has them; () where the call was not under ``vmap``.
    """

    fn: str
    rule: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: list[Operand]
    outs: list[Value]
    block: Building
    source: str
    name: str = ""
    func: Any = None
    packed: bool = False
    probed: tuple[Any, ...] = ()
    levels: tuple[tuple[int, ...], ...] = ()


@dataclass(eq=False)
class Recording:
    """One run of a module."""

    root: Building
    events: list[Event] = field(default_factory=list[Event])
    values: list[Value] = field(default_factory=list[Value])
    inputs: list[Value] = field(default_factory=list[Value])
    outputs: list[Value] = field(default_factory=list[Value])
    returns: list[str] = field(default_factory=list[str])
    device: str = "live"


def tensors_in(value: Any, kind: type[Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All instances of ``kind`` in nested tuples, lists, dicts and dataclasses, with their path, such as "x[0].y"."""
    if isinstance(value, kind):
        yield path, value
    elif depth > 8 or value is None or isinstance(value, (str, int, float, bool)):
        return
    elif hasattr(value, "items") and hasattr(value, "keys"):
        for key, item in value.items():
            yield from tensors_in(item, kind, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:  # pyright: ignore[reportAttributeAccessIssue]
            yield from tensors_in(getattr(value, key), kind, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for number, item in enumerate(value):
            yield from tensors_in(item, kind, f"{path}[{number}]", depth + 1)
    elif isinstance(value, slice):
        for item in (value.start, value.stop, value.step):
            yield from tensors_in(item, kind, path, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        for key, item in vars(value).items():
            yield from tensors_in(item, kind, f"{path}.{key}" if path else key, depth + 1)


def mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same structure of tuples, lists, dicts and slices, with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if type(value) in (tuple, list, torch.Size):
        return type(value)(mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: mapped(item, change) for key, item in value.items()}
    if type(value) is slice:
        return slice(*(mapped(item, change) for item in (value.start, value.stop, value.step)))
    return value
