"""Code under ``torch.func``: what is mapped by ``vmap`` is recorded with the mapped axes in front; derivatives are boxes.

In ``vmap`` a function gets tensors that hide an axis. An array that hides some is known here by all its axes: the
mapped ones first, the outermost first, then those that the function sees. An op does the same to each index of a
mapped axis, by the definition of ``vmap``, so that its rule is asked about the rest alone.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode, handle_torch_function

from circuitlab.trace import rules
from circuitlab.trace.events import Event, Operand, Value, mapped, tensors_in

if TYPE_CHECKING:
    from circuitlab.trace.watch import Entry, Recorder

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

Levels = tuple[int, ...]
"""Numbers of the running ``vmap``s that an array hides an axis for, the outermost first."""

LEAVES = "_remove_batch_dim"
_PATCHED: dict[tuple[str, str], str | bool] = {
    ("torch._functorch.vmap", LEAVES): LEAVES,
    ("torch._functorch.eager_transforms", "grad_impl"): "grad",
    ("torch._functorch.eager_transforms", "grad_and_value_impl"): "grad_and_value",
    ("torch._functorch.eager_transforms", "_vjp_with_argnums"): "vjp",
    ("torch._functorch.eager_transforms", "_jvp_with_argnums"): "jvp",
    ("torch.func", "linearize"): "linearize",
    ("torch.nn.attention.flex_attention", "flex_attention_hop"): "flex_attention",
    ("torch.nn.attention.flex_attention", "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"): True,
}
"""Functions that torch does not tell function modes of -> the name of their event; and a switch to get at one."""


def running() -> bool:
    """Whether code under a transform is running."""
    return _C.peek_interpreter_stack() is not None


def outside() -> AbstractContextManager[Any]:
    """For code that is not to be transformed itself."""
    return temporarily_clear_interpreter_stack()


def inner_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int | None, int] | None:
    """What a wrapper of a transform wraps, the dimension of it that is hidden (None: none is), and the level."""
    if not _C.is_functorch_wrapped_tensor(tensor):
        return None
    dim = _C.maybe_get_bdim(tensor) if _C.is_batchedtensor(tensor) else None
    return _C.get_unwrapped(tensor), dim, _C.maybe_get_level(tensor)


def levels_of(tensor: torch.Tensor) -> Levels:
    """The levels that a tensor hides an axis for."""
    inner = inner_of(tensor)
    if inner is None:
        return ()
    return levels_of(inner[0]) + (() if inner[1] is None else (inner[2],))


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """All sizes, those of hidden axes first."""
    sizes: list[int] = []
    at, inner = tensor, inner_of(tensor)
    while inner is not None:
        at, dim, _ = inner
        if dim is not None:
            sizes.insert(0, at.shape[dim])
        inner = inner_of(at)
    return (*sizes, *tensor.shape)


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at the bottom of all wrappers."""
    inner = inner_of(tensor)
    return tensor if inner is None else bare(inner[0])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all its axes, those that it hides first. To be called `outside`."""
    inner = inner_of(tensor)
    if inner is None:
        return tensor
    found, dim, _ = inner
    front = len(levels_of(found))
    return whole(found) if dim is None else whole(found).movedim(front + dim, front)


def randomness() -> str:
    """What the innermost running ``vmap`` says of random numbers."""
    for each in reversed(_C.get_interpreter_stack() or []):
        if each.key() == _C.TransformType.Vmap:
            return _C.CVmapInterpreterPtr(each).randomness().name.lower()
    return "error"


@dataclass(frozen=True)
class Mapped:
    """A function as it works on arrays with all their axes.

    Attributes:
        func: what was called on arrays that hide some.
        ins, outs: levels of each operand, and of each result.
        randomness: as `torch.vmap` has it.
    """

    func: Callable[..., Any]
    ins: tuple[Levels, ...]
    outs: tuple[Levels, ...]
    randomness: str

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        def once(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = iter(tensors)
            inner, named = mapped((args, kwargs), lambda _: next(given))
            result = self.func(*inner, **named)
            return tuple(tensor for _, tensor in tensors_in(inner[0] if result is None else result, torch.Tensor))

        function: Callable[..., Any] = once
        running = sorted({level for levels in self.ins for level in levels}, reverse=True)
        for level in running:
            in_dims = tuple(0 if level in levels else None for levels in self.ins)
            function = torch.vmap(function, in_dims, 0, self.randomness)
        made = function(*(tensor for _, tensor in tensors_in((args, kwargs), torch.Tensor)))
        return tuple(self._shown(tensor, levels, running) for tensor, levels in zip(made, self.outs, strict=True))

    @staticmethod
    def _shown(tensor: torch.Tensor, levels: Levels, running: list[int]) -> torch.Tensor:
        """A result without the axes that it is the same along."""
        for number, level in enumerate(running):
            if level not in levels:
                tensor = tensor.select(len(running) - 1 - number, 0)
        return tensor


_lock = threading.Lock()
_put: dict[tuple[str, str], Any] = {}
_users: set[object] = set()


@contextmanager
def announced() -> Iterator[None]:
    """While active, function modes are told of what torch does not tell them of. Others see no difference."""
    me = object()
    with _lock:
        _users.add(me)
        for (module, name), title in _PATCHED.items() if len(_users) == 1 else ():
            place = importlib.import_module(module)
            if hasattr(place, name):  # not part of torch's promises: where it is missing, its results are of unknown origin
                _put[module, name] = getattr(place, name)
                setattr(place, name, title if isinstance(title, bool) else Told(_put[module, name], title))
    try:
        # what torch.compile has made runs the Python code it was made of
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        with _lock:
            _users.remove(me)
            while _put and not _users:
                (module, name), function = _put.popitem()
                setattr(importlib.import_module(module), name, function)


class Told:
    """A function that function modes are told of.

    Attributes:
        closed: tensors that it closes over.
    """

    def __init__(self, function: Callable[..., Any], name: str, closed: tuple[torch.Tensor, ...] = ()) -> None:
        self.function, self.__name__, self.closed = function, name, closed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_function_stack():
            tensors = [tensor for _, tensor in tensors_in((args, kwargs), torch.Tensor)]
            return handle_torch_function(self, tensors, *args, **kwargs)
        return self.function(*args, **kwargs)


def mapped_of(event: Event, operands: Sequence[Operand] = ()) -> Mapped:
    """What an event under ``vmap`` called, as it works on arrays with all their axes."""
    return Mapped(event.func, tuple(o.levels for o in operands or event.operands), event.levels, randomness())


def wholes(value: Any) -> Any:
    """Tensors in a structure, with all their axes. To be called `outside`."""
    return mapped(value, whole)


def numbers(func: Any, operands: list[Operand], call: Any, result: Any) -> list[torch.Tensor]:
    """What a call under ``vmap`` gives on arrays with all their axes; ``result`` is what it gave on meta."""
    made = [tensor for _, tensor in tensors_in(result, torch.Tensor)]
    function = Mapped(func, tuple(o.levels for o in operands), tuple(map(levels_of, made)), randomness())
    with outside():
        return list(function(*call[0], **call[1]))


class Listener(TorchFunctionMode):
    """Notes what a function reads that it did not make itself.

    Attributes:
        read: those tensors, at the bottom of their wrappers if it has wrapped them, each with its version.
        directly: ids of what it computes with as it is, unwrapped.
    """

    def __init__(self, known: Callable[[torch.Tensor], bool], prepare: Callable[..., tuple[Any, Any]]) -> None:
        super().__init__()
        self.known, self.prepare = known, prepare
        self.made: dict[int, torch.Tensor] = {}
        self.read: dict[int, tuple[torch.Tensor, int]] = {}
        self.directly: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inner, named = self.prepare(getattr(func, "__name__", ""), args, kwargs or {})
        given = [tensor for _, tensor in tensors_in((inner, named), torch.Tensor)]
        for tensor in given:
            self._see(tensor)
        function: Callable[..., Any] = self.heard(func.function) if type(func) is Told else func
        result = function(*inner, **named)
        made = [tensor for _, tensor in tensors_in(result, torch.Tensor)]
        self.directly |= {id(tensor) for tensor in given} if made else set()
        self.made |= {id(tensor): tensor for tensor in made if id(tensor) not in self.read}
        return result

    def heard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, listened to."""
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return call

    def _see(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self.made:
            return
        inner = inner_of(tensor)
        if inner is None or self.known(tensor):
            self.read.setdefault(id(tensor), (tensor, bare(tensor)._version))
        else:
            self._see(inner[0])

    def written(self) -> list[torch.Tensor]:
        """Those that were written to."""
        return [tensor for tensor, version in self.read.values() if bare(tensor)._version != version]


def wrapped(recorder: Recorder, tensor: torch.Tensor, inner: torch.Tensor, dim: int | None, level: int) -> None:
    """A tensor that a transform has wrapped: the same array, with a hidden axis moved to the front."""
    source = recorder.entry(inner)
    levels = source.levels if dim is None else (*source.levels, level)
    moved(recorder, source, source.levels, tensor, levels, dim or 0, 0)


def moved(
    recorder: Recorder, source: Entry, seen: Levels, made: torch.Tensor, levels: Levels, start: int, target: int
) -> None:
    """A tensor is another one, with one axis moved: of those that it has when it hides some, as seen there."""
    value, event = source.value, None
    if start != target:
        shape = list(value.shape)
        shape.insert(len(seen) + target, shape.pop(len(seen) + start))
        operand, value = Operand(0, value, seen), Value("", tuple(shape), value.dtype, "value")
        recorder.recording.values.append(value)
        event = Event("movedim", rules.TABLE["movedim"], (operand, start, target), {}, [operand], [value],
                      recorder.nest.here(sys._getframe(1)), recorder.nest.source(), func=torch.movedim,
                      levels=(seen,) if seen else ())
        recorder._event(event)
    entry = recorder._bind(made, value)
    entry.parent, entry.view, entry.seen, entry.levels = source, event, source.version, levels
    if source.real is not None:
        entry.real = source.real.movedim(len(seen) + start, len(seen) + target)


def _not_again(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("it reads arrays that it was not given")


def left(recorder: Recorder, args: Any) -> torch.Tensor:
    """A result leaves a ``vmap``: its mapped axis goes to where it is wanted."""
    tensor, level, size, target = args
    if recorder.meta:
        tensor = recorder._twin(tensor)
    entry = recorder.entry(tensor)
    made = _C._remove_batch_dim(tensor, level, size, target)
    if level not in entry.levels:  # it is the same for all, and repeated
        with recorder:
            return tensor.expand(made.shape)
    moved(recorder, entry, entry.levels[:-1], made, entry.levels[:-1], 0, target % made.dim())
    return made


def box(recorder: Recorder, func: Told, args: Any, kwargs: Any) -> Any:
    """A derivative: one event without a rule, which reads whatever the function reads."""
    name = func.__name__
    if recorder.meta:
        args, kwargs = recorder._metaise(name, args, kwargs)
    given = [tensor for _, tensor in tensors_in((args, kwargs), torch.Tensor)]
    operands: list[Operand] = []
    template: tuple[Any, ...] = recorder._template(tuple(args), operands)
    named: dict[str, Any] = recorder._template(dict(kwargs), operands)
    listener = Listener(recorder.is_known, recorder._metaise if recorder.meta else lambda _, *call: call)
    drawn = torch.get_rng_state()
    before, result = recorder.call(name, listener.heard(func.function), args, kwargs)
    tensors = [tensor for _, tensor in tensors_in(result, torch.Tensor)]
    if not tensors:
        return result
    closed = [*func.closed, *(tensor for tensor, _ in listener.read.values())]
    closed = [*{id(t): t for t in closed if not any(t is other for other in given)}.values()]
    explicit = len(operands)
    template = (*template, recorder._template(tuple(closed), operands))
    written = listener.written()
    event = recorder._record(func, name, rules.opaque, template, named, operands, args, kwargs, [*tensors, *written])
    event.packed = True
    for tensor in written:
        recorder._written(recorder.entries[id(tensor)], event.block)
    if not recorder.meta:
        # to run it again on other numbers, it must read them where they are put
        again = not written and not any(o.levels for o in operands[explicit:]) and torch.equal(drawn, torch.get_rng_state())
        again = again and (bool(func.closed) or not any(id(tensor) in listener.directly for tensor in given))
        with outside():
            function = mapped_of(event, operands[:explicit]) if event.levels else func
            recorder.after(event, function if again else _not_again, *wholes((before, tensors)))
    if name in ("vjp", "linearize") and len(result) > 1 and callable(result[1]):
        pull = Told(result[1], name, (*given, *closed))
        return (result[0], pull, *result[2:])
    return result
