"""The watcher: every torch function of a run becomes an event in single-assignment form.

Torch functions are seen by a `TorchFunctionMode`, at the level that the author wrote (``linear``, ``softmax``,
``Tensor.view``), and modules by global hooks. Composite functions written in Python are entered. In-place operations,
writes through views and ``out=`` become new values: everything after is single-assignment.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from circuitlab.trace import compose, nest, packed, rules, transforms
from circuitlab.trace.calls import writes
from circuitlab.trace.events import Event, Operand, Packed, Recording, Value, mapped, tensors_in
from circuitlab.trace.functions import BY_SHAPE, FACTORIES, KEEPS_PLACE, LEAVING, VIEWS, plan_of
from circuitlab.trace.guard import to_meta
from circuitlab.trace.shapes import quick

LARGE = 1 << 20
"""Numbers of more entries than this are not computed in a meta run."""
_PLAIN = getattr(torch.Tensor, "__torch_dispatch__", None)


@functools.cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


class Entry:
    """What is known of one live tensor object: its value now, what it is a view of (with no view: the same array), and
    on meta, where it depends on no input and no parameter, its numbers; and levels, see `circuitlab.trace.transforms`."""

    __slots__ = ("levels", "number", "parent", "real", "ref", "seen", "value", "version", "view")

    def __init__(self, ref: Any, value: Value) -> None:
        self.ref = ref
        self.value = value
        self.version = 0
        self.parent: Entry | None = None
        self.view: Event | None = None
        self.number = 0
        self.seen = 0
        self.real: torch.Tensor | None = None
        self.levels: transforms.Levels = ()


class Recorder(TorchFunctionMode):
    """Sees every torch function of a run."""

    def __init__(
        self,
        root: torch.nn.Module,
        *,
        meta: bool,
        device: torch.device,
        constants: dict[int, str],
        real: dict[int, torch.Tensor],
    ) -> None:
        super().__init__()
        self.real = real
        self.meta = meta
        self.device = device
        self.module_names = {id(module): name for name, module in root.named_modules()}
        title = type(root).__name__
        block = nest.Building("", title, "root", nest.class_source(type(root)))
        self.nest = nest.Nesting(block, nest.package_of(type(root)))
        self.recording = Recording(block, device="meta" if meta else "live")
        self.entries: dict[int, Entry] = {}
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.outside: set[int] = set()  # twins of tensors that were there before
        self.foreign: set[int] = set()  # tensors from where we cannot see
        self.constants = constants
        self.packs: dict[int, tuple[torch.ScriptObject, Packed | None]] = {}
        self.state: dict[int, tuple[str, str]] = {}
        for kind, named in (("buffer", root.named_buffers()), ("parameter", root.named_parameters())):
            for name, tensor in named:
                self.state[id(tensor)] = (name, kind)
        self.names: set[str] = set()
        self.depth = 0
        self.thread = threading.get_ident()
        self.failure: tuple[BaseException, str] | None = None

    # values -------------------------------------------------------------------------------------------

    def add(self, tensor: torch.Tensor, name: str, kind: str) -> Value:
        """A new value that this tensor object holds from now on."""
        value = Value(name, transforms.shape_of(tensor), str(tensor.dtype)[6:], kind)
        value.odd = "" if getattr(type(tensor), "__torch_dispatch__", None) is _PLAIN else type(tensor).__name__
        self.recording.values.append(value)
        self._bind(tensor, value)
        return value

    def _bind(self, tensor: torch.Tensor, value: Value) -> Entry:
        key = id(tensor)
        entry = Entry(weakref.ref(tensor, lambda _, key=key: self._gone(key)), value)
        self.entries[key] = entry
        return entry

    def _gone(self, key: int) -> None:
        """A tensor object has died."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            entry.value.gone = len(self.recording.events)

    def entry(self, tensor: torch.Tensor) -> Entry:
        """The entry of a tensor object, made now if it was never seen: a parameter, a buffer, a constant."""
        entry = self.entries.get(id(tensor))
        if entry is None or entry.ref() is not tensor:
            name, kind = self.state.get(id(tensor), ("", ""))
            inner = transforms.inner_of(tensor)
            if inner is not None:
                transforms.wrapped(self, tensor, *inner)
            elif not kind and id(tensor) in self.constants:
                name, kind = self.constants[id(tensor)], "constant"
            elif not kind and self.meta and id(tensor) in self.outside:
                name, kind = "constant", "constant"  # it was there with numbers, and the inputs have none
            if kind:
                self.add(tensor, self._name(name), kind)
            elif inner is None:
                self._untracked(tensor)
            entry = self.entries[id(tensor)]
        self._refresh(entry)
        return entry

    def _name(self, name: str) -> str:
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.names.add(unique)
        return unique

    def _untracked(self, tensor: torch.Tensor) -> None:
        """A tensor from where we cannot see (NumPy, a compiled kernel, a global): an opaque op without operands."""
        self.foreign.add(id(tensor))
        block = self.nest.here(sys._getframe(1))
        value = self.add(tensor, "", "value")
        self._event(Event("untracked", rules.opaque, (), {}, [], [value], block, self.nest.source()))

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor object was seen before, or is the module's."""
        entry = self.entries.get(id(tensor))
        return (entry is not None and entry.ref() is tensor) or id(tensor) in self.state or id(tensor) in self.constants

    def _event(self, event: Event) -> None:
        count = event.block.counts[event.fn] = event.block.counts.get(event.fn, 0) + 1
        name = f"{event.block.name}.{event.fn}" if event.block.name else event.fn
        event.name = self._name(name if count == 1 else f"{name}_{count}")
        static = bool(event.operands) or (event.rule is not rules.opaque and not _has_array(event.args))
        learned = False
        for operand in event.operands:
            static = static and operand.value.static
            learned = learned or operand.value.learned
        for number, out in enumerate(event.outs):
            out.name = event.name if number == 0 else f"{event.name}:{number}"
            out.event, out.static, out.learned = event, static, learned
        event.block.items.append(event.name)
        self.recording.events.append(event)

    # views and writes ---------------------------------------------------------------------------------

    def _refresh(self, entry: Entry) -> None:
        """Read a view anew if what it is a view of was written to since."""
        parent, view = entry.parent, entry.view
        if parent is None:
            return
        self._refresh(parent)
        if entry.seen == parent.version:
            return
        if view is None:
            entry.value = parent.value
        else:
            entry.view = self._replay(view, parent.value)
            entry.value = entry.view.outs[entry.number]
        entry.real = None
        entry.seen = parent.version
        entry.version += 1

    def _replay(self, view: Event, base: Value) -> Event:
        """The same view of another value."""
        swap = {operand.slot: Operand(operand.slot, operand.value, operand.levels) for operand in view.operands}
        swap[0] = Operand(0, base, swap[0].levels)
        args, kwargs = _swap(view.args, swap), _swap(view.kwargs, swap)
        outs = [Value("", out.shape, out.dtype, "value") for out in view.outs]
        self.recording.values.extend(outs)
        operands = [swap[slot] for slot in sorted(swap)]
        event = Event(view.fn, view.rule, args, kwargs, operands, outs, view.block, view.source, func=view.func, packed=view.packed,
                      levels=view.levels)
        self._event(event)
        return event

    def _written(self, entry: Entry, block: nest.Building) -> None:
        """A tensor object was written to: whatever it is a view of changes with it."""
        entry.version += 1
        parent = entry.parent
        if parent is None:
            return
        out = entry.value
        if entry.view is not None:
            out = Value("", parent.value.shape, parent.value.dtype, "value")
            self.recording.values.append(out)
            levels = entry.view.levels[entry.number : entry.number + 1]
            operands = [Operand(0, parent.value, entry.view.operands[0].levels), Operand(1, entry.value, *levels)]
            args = (entry.view, *operands)
            number = {"number": entry.number}
            event = Event("write", rules.write, args, number, operands, [out], block, self.nest.source())
            event.levels = (operands[0].levels,) if levels else ()
            self._event(event)
        parent.value = out
        parent.real = None
        self._written(parent, block)
        entry.seen = parent.version

    # the run ------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if type(func) is transforms.Told:
            if func.__name__ in compose.REPLACEMENTS:
                return self._composite(func.__name__, compose.REPLACEMENTS[func.__name__], args, kwargs)
            return transforms.left(self, args) if func.__name__ == transforms.LEAVES else transforms.box(self, func, args, kwargs)
        func, name, rule, replacement = plan_of(func)
        if name == "to" and len(args) == 2 and isinstance(args[1], torch.Tensor):
            name = "type_as"
        if name in BY_SHAPE:  # the other operand gives its shape or type and nothing else
            function, needed = BY_SHAPE[name]
            other = (args[1:] or (*kwargs.values(),))[0]
            return self.__torch_function__(function, types, (args[0], needed(other)))
        if name == "as_strided" and args:  # of memory: the axes in the order in which they lie there
            order = sorted(range(args[0].dim()), key=lambda dim: -args[0].stride(dim))
            if order != sorted(order):
                args = (self.__torch_function__(torch.Tensor.permute, types, (args[0], order)), *args[1:])
        if replacement is not None:
            return self._composite(name, replacement, args, kwargs)
        if name == "device" and self.meta:
            return self.device
        operands: list[Operand] = []
        if self.meta:
            if name in ("cuda", "cpu"):
                return args[0]
            args, kwargs = self._metaise(name, args, kwargs)
        if name == "data=":
            self.entry(args[0]).value = self.entry(args[1]).value
            return func(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        template = self._template(args, operands)
        named = self._template({k: v for k, v in kwargs.items() if k != "out"}, operands) if kwargs else {}
        packed.put_last(operands)
        real: list[torch.Tensor] | None = None
        before: Any = None
        under = transforms.running() and any(operand.levels for operand in operands)
        if self.meta:
            result, real = self._on_meta(name, func, args, kwargs, operands if under else None)
        else:
            before, result = self.call(name, func, args, kwargs)
        if name == "setitem":
            result = args[0]
        elif result is None or isinstance(result, (int, float, bool, str, torch.Size, torch.dtype, torch.device)):
            if name in LEAVING and not all(operand.value.static for operand in operands):
                self._left(name, template, operands, result)
            return result
        plain = isinstance(result, torch.Tensor)
        tensors = [result] if plain else [tensor for _, tensor in tensors_in(result, torch.Tensor)]
        if not tensors:
            if name in LEAVING and not all(operand.value.static for operand in operands):
                self._left(name, template, operands, result)
            return result
        if self.meta and not all(tensor.is_meta for tensor in tensors):
            result = mapped(result, self._twin)
            tensors = [tensor for _, tensor in tensors_in(result, torch.Tensor)]
        if name in KEEPS_PLACE:
            return result
        event = self._record(func, name, rule, template, named, operands, args, kwargs, tensors)
        event.packed = not plain and name != "setitem"
        if transforms.running():
            with transforms.outside():
                self.after(event, transforms.mapped_of(event) if event.levels else func, *transforms.wholes((before, tensors)))
        else:
            self.after(event, func, before, tensors)
        if real is not None and len(real) == len(tensors):
            for tensor, out, number in zip(tensors, event.outs, real, strict=True):
                self.entries[id(tensor)].real = number if number.shape == out.shape else None
        return result if name != "setitem" else None

    def _record(
        self,
        func: Any,
        name: str,
        rule: Any,
        template: tuple[Any, ...],
        named: dict[str, Any],
        operands: list[Operand],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
    ) -> Event:
        block = self.nest.here(sys._getframe(2))
        running = transforms.running()
        shapes = [transforms.shape_of(tensor) if running else tuple(tensor.shape) for tensor in tensors]
        outs = [Value("", shape, _dtype(tensor.dtype), "value") for shape, tensor in zip(shapes, tensors, strict=True)]
        self.recording.values.extend(outs)
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "as_strided" and (first is None or not first.is_contiguous() or first.storage_offset()):
            rule = rules.opaque  # it reads memory that is not all of this array
        event = Event(name, rule, template, named, operands, outs, block, self.nest.source(), func=func)
        if running:
            levels = tuple(transforms.levels_of(tensor) for tensor in tensors)
            under = any(levels) or any(operand.levels for operand in operands)
            event.levels = levels if under else ()
        self._event(event)
        for number, (tensor, out) in enumerate(zip(tensors, outs, strict=True)):
            known = self.entries.get(id(tensor))
            if known is not None and known.ref() is tensor:
                known.value = out
                known.real = None
                wrote = tensor is first and name not in VIEWS and (rules.in_place(name) or writes(func, args, kwargs))
                if kwargs.get("out") is not None or wrote:
                    self._written(known, block)
                continue
            entry = self._bind(tensor, out)
            entry.levels = event.levels[number] if event.levels else ()
            if first is not None and name in VIEWS and _same_memory(tensor, first):
                entry.parent = self.entries.get(id(first))
                entry.view = event
                entry.number = number
                entry.seen = entry.parent.version if entry.parent else 0
        return event

    def _left(self, name: str, template: tuple[Any, ...], operands: list[Operand], result: Any) -> None:
        """Numbers went to Python: an op without results, so that it is seen where they went out of sight."""
        block = self.nest.here(sys._getframe(2))
        fn = name if name in ("tolist", "numpy", "equal", "allclose") else "item"
        kept = {"result": result} if isinstance(result, (bool, int, float, list)) else {}
        self._event(Event(fn, rules.leave, template, kept, operands, [], block, self.nest.source()))

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Run the function; what `after` shall know of its arguments, and its result."""
        return None, func(*args, **kwargs)

    def after(self, event: Event, func: Any, before: Any, results: list[torch.Tensor]) -> None:
        """A function has run and was recorded."""

    def _composite(self, name: str, replacement: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        self.nest.enter(self._inside(name), name, "function", "torch", "", sys._getframe(1))
        try:
            with self:
                return replacement(*args, **kwargs)
        finally:
            self.nest.leave()

    def _inside(self, name: str) -> str:
        here = self.nest.levels[-1].block.name
        return f"{here}/{name}" if here else f"/{name}"

    def _template(self, value: Any, operands: list[Operand]) -> Any:
        """The same structure with an `Operand` for each tensor."""
        if isinstance(value, torch.Tensor):
            entry = self.entry(value)
            operand = Operand(len(operands), entry.value, entry.levels)
            operands.append(operand)
            return operand
        if type(value) in (tuple, list, torch.Size):
            return type(value)(self._template(item, operands) for item in value) if value else value
        if isinstance(value, torch.ScriptObject):
            return packed.operand(self, value, operands)
        if type(value) is dict:
            return {key: self._template(item, operands) for key, item in value.items()}
        if type(value) is slice and any(isinstance(v, torch.Tensor) for v in (value.start, value.stop, value.step)):
            return slice(*(self._template(v, operands) for v in (value.start, value.stop, value.step)))
        return value

    # meta ---------------------------------------------------------------------------------------------

    def _metaise(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if any(isinstance(a, torch.Tensor) and not a.is_meta or isinstance(a, (tuple, list)) for a in args) or kwargs:
            args = tuple(mapped(a, self._twin) for a in args)
            kwargs = {key: mapped(item, self._twin) for key, item in kwargs.items()}
        if name in FACTORIES or (kwargs and kwargs.get("device") is not None):
            kwargs = {**kwargs, "device": "meta"}
        elif name == "to":
            args = tuple("meta" if isinstance(a, torch.device) or _is_device(a) else a for a in args)
        return args, kwargs

    def _on_meta(
        self, name: str, func: Any, args: Any, kwargs: Any, under: list[Operand] | None
    ) -> tuple[Any, list[torch.Tensor] | None]:
        """The call on meta tensors, and its numbers where it depends on no input and no parameter.

        Control flow over positions, masks and the like needs such numbers; they are small, and computed on the CPU.
        ``under`` are the operands of a call under ``vmap``.
        """
        numbers = self._numbers(name, args, kwargs)
        if under is not None:
            result = func(*args, **kwargs)
            return result, None if numbers is None else transforms.numbers(func, under, numbers, args[0] if result is None else result)
        known = None if transforms.running() else quick(name, args, kwargs)
        if numbers is None:
            return func(*args, **kwargs) if known is None else known, None
        try:
            result = func(*args, **kwargs) if known is None else known
            if any(t.numel() > LARGE for _, t in tensors_in(result, torch.Tensor)):
                return result, None
            real = func(*numbers[0], **numbers[1])
        except (RuntimeError, NotImplementedError):
            real = func(*numbers[0], **numbers[1])
            result = mapped(real, to_meta)
        if name == "setitem":
            return None, [numbers[0][0]]
        return result, [tensor for _, tensor in tensors_in(real, torch.Tensor)]

    def _numbers(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The call's arguments with numbers for tensors; None where one has none."""
        for item in args:  # most calls have such an operand: look no further
            if isinstance(item, torch.Tensor) and self._known(item) is None:
                return None
        writes = rules.in_place(name)
        tensors = 0
        for _, tensor in tensors_in((args, kwargs), torch.Tensor):
            tensors += 1
            if self._known(tensor) is None:
                return None
        if not tensors and (name not in FACTORIES or name.startswith(("rand", "normal", "empty"))):
            return None

        def number(tensor: torch.Tensor) -> torch.Tensor:
            known = self._known(tensor)
            assert known is not None
            return known.clone() if writes and tensor is args[0] else known

        numbers = mapped(tuple(args), number), mapped(dict(kwargs), number)
        if numbers[1].get("device") is not None:
            numbers[1]["device"] = "cpu"
        if name == "to":
            numbers = tuple("cpu" if isinstance(a, str) and a == "meta" else a for a in numbers[0]), numbers[1]
        return numbers

    def _known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        entry = self.entries.get(id(tensor))
        if entry is not None and entry.ref() is tensor:
            self._refresh(entry)
            return entry.real
        known = self.real.get(id(tensor))
        if known is not None:
            self.entry(tensor).real = known
        return known

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        known = self.twins.get(id(tensor))
        if known is None:
            twin = to_meta(tensor)
            known = self.twins[id(tensor)] = (tensor, twin)
            self.outside.add(id(twin))
            if tensor.numel() <= LARGE and tensor.device.type == "cpu" and transforms.inner_of(tensor) is None:
                self.real[id(twin)] = tensor
            if id(tensor) in self.entries:
                self._bind(twin, self.entries[id(tensor)].value)
            elif id(tensor) in self.constants:
                self.constants[id(twin)] = self.constants[id(tensor)]
            elif tensor.numel() == 1 and tensor.dim() == 0:
                # a number in tensor's clothing has no axes to be wrong about
                self.add(twin, self._name("number"), "constant")
        return known[1]

    def kept(self) -> list[torch.Tensor]:
        """The tensors made in this run that are still alive, though it is over."""
        self.twins.clear()
        self.real.clear()
        found = [entry.ref() for key, entry in list(self.entries.items()) if key not in {*self.state, *self.foreign}]
        return [tensor for tensor in found if tensor is not None]

    # modules ------------------------------------------------------------------------------------------

    def module_begins(self, module: torch.nn.Module, args: Any) -> None:
        """Global hook before a module's forward."""
        name = self.module_names.get(id(module))
        if name is None:
            name = self._inside(type(module).__name__)
        if threading.get_ident() != self.thread:
            return
        self.depth += 1
        if self.depth > 1:
            kind = type(module)
            caller = nest.caller_of_module(sys._getframe(1))
            self.nest.enter(name, kind.__name__, "module", nest.package_of(kind), nest.class_source(kind), caller)

    def module_ends(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Global hook after a module's forward, also after one that raised."""
        if threading.get_ident() != self.thread:
            return
        error = sys.exc_info()[1]
        if output is None and error is not None and (self.failure is None or self.failure[0] is not error):
            self.failure = (error, self.module_names.get(id(module), ""))
        self.depth -= 1
        if self.depth:
            self.nest.leave()


def _has_array(value: Any) -> bool:
    """Whether a NumPy array is among arguments: nobody knows what it was computed from."""
    if isinstance(value, (tuple, list)):
        return any(_has_array(item) for item in value[:16])
    return type(value).__module__ == "numpy"


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        a, b = transforms.bare(a), transforms.bare(b)
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return False


def _is_device(value: Any) -> bool:
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "mps", "xpu", "meta")


def _swap(value: Any, swap: dict[int, Operand]) -> Any:
    if isinstance(value, Operand):
        return swap[value.slot]
    if type(value) in (tuple, list):
        return type(value)(_swap(item, swap) for item in value)
    if type(value) is dict:
        return {key: _swap(item, swap) for key, item in value.items()}
    return value


nest.BOUNDARIES.add(Recorder._composite.__code__)
