"""Circuit -> readable Python: the run written as functions of tensors, and a module that runs it.

Each block of the circuit becomes a function, or one line where it is one; blocks that say the same become one
function, and a chain of them a loop. What only re-indexes is written as einops patterns, products of data as einsums,
both read off the wires; everything else is the call that the author made. ``m`` is where a function's parameters are.
"""

from __future__ import annotations

import inspect
import linecache
import re
import weakref
from typing import Any

import torch

from circuitlab.circuit import Circuit
from circuitlab.errors import InputError
from circuitlab.trace.code import Writer
from circuitlab.trace.record import forward_of, named_inputs

_HEADER = """import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
"""
_EXPECT = '''

def expect(now, traced):
    """Python code was steered by these numbers: with others it may do something else."""
    if now != traced:
        raise ValueError(f"the traced run branched on {traced}, and these inputs give {now}: trace with these inputs")
'''


class _Holder(torch.nn.Module):
    """Holds parameters and buffers, and is indexed like a list."""

    def __getitem__(self, key: int) -> Any:
        return getattr(self, str(key))


class Compiled(_Holder):
    """A module made from a circuit: what a run did, as straight code.

    It shares the traced module's parameters and buffers, under the same names. It takes the same inputs, and gives
    what ``forward`` gave: a tensor, or tuples and dicts of them. Sizes that the circuit knows as wires of an input
    (batch, positions) may differ from the traced ones; numbers that Python code computed from sizes are as traced.

    Attributes:
        code: the source, readable and complete.
    """

    code: str

    def __init__(self, circuit: Circuit, model: torch.nn.Module) -> None:
        super().__init__()
        self.title = circuit.title
        self._inputs = circuit.inputs
        self._shapes = {name: circuit.tensor(name).shape for name in circuit.inputs}
        self._returns = circuit.returns or ("",) * len(circuit.outputs)
        self._signature = model._signature if isinstance(model, Compiled) else _signature(model)
        self._whole = circuit.root.kind == "root"
        state = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
        for tensor in circuit.tensors:
            if tensor.kind in ("parameter", "buffer", "constant"):
                self._hold(tensor.name, tensor.kind, state, model)
        self.code = source(circuit)
        self._load()

    def _load(self) -> None:
        """Make functions of the code."""
        names: dict[str, Any] = {}
        file = f"<circuit of {self.title} {id(self)}>"
        linecache.cache[file] = (len(self.code), None, self.code.splitlines(keepends=True), file)
        weakref.finalize(self, linecache.cache.pop, file, None)
        exec(compile(self.code, file, "exec"), names)  # noqa: S102
        self._run = (names["forward"],)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._load()

    def _hold(self, name: str, kind: str, state: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
        """The tensor at the same path as in the module, on holders of our own."""
        *path, last = re.split(r"\.(?![^\[]*\])", name)
        if kind == "constant":
            held = _reached(model, name)
            if held is None:
                raise InputError(f"to_torch: the constant {name!r} cannot be found again in the module, so there is no "
                                 "way to write it; make it a buffer")
        elif name not in state:
            raise InputError(f"to_torch: the module has no {kind} {name!r}: it is not the one that was traced")
        else:
            held = state[name]
        at: torch.nn.Module = self
        for part in path:
            inner = at._modules.get(part)
            if inner is None:
                inner = at._modules[part] = _Holder()
            at = inner
        if isinstance(held, torch.nn.Parameter):
            at._parameters[last] = held
        elif kind == "buffer":
            at.register_buffer(last, held)
        else:
            at.__dict__[re.split(r"[.\[]", last)[0]] = held if "[" not in last else _reached(model, name.split("[", maxsplit=1)[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the traced module's forward."""
        given = self._bound(args, kwargs)
        try:
            found = self._outputs(*(given[name] for name in self._inputs))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            now = {name: tuple(given[name].shape) for name in self._inputs}
            if now == self._shapes:
                raise
            raise InputError(f"the circuit of {self.title} was traced with inputs of the shapes {self._shapes}, and does not "
                             f"run with {now}: {error}\nSome size is a number in the code; trace with these shapes") from error
        return _nested(dict(zip(self._returns, found, strict=True)))

    def _bound(self, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
        """The tensors among arguments of ``forward``, by the names of the circuit's inputs."""
        given = dict(named_inputs(self._signature, args, kwargs) if self._whole else zip(self._inputs, args, strict=False))
        missing = [name for name in self._inputs if name not in given]
        if missing or len(given) > len(self._inputs):
            raise InputError(f"{self.title} was traced with the tensors {list(self._inputs)}, and is given {list(given)}")
        return given

    def _outputs(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The circuit's outputs, of its inputs in their order."""
        return self._run[0](self, *inputs)


def _signature(model: torch.nn.Module) -> inspect.Signature | None:
    """The parameters of a module's forward, without what is written of their types."""
    try:
        found = inspect.signature(forward_of(model))
    except (TypeError, ValueError):
        return None
    plain = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
    return inspect.Signature(plain)


def _reached(model: Any, path: str) -> Any:
    """What stands at a path such as "blocks.0.shifts[1]" of a module."""
    for step in re.findall(r"[^.\[\]]+", path):
        if isinstance(model, (list, tuple)):
            model = model[int(step)] if step.isdigit() and int(step) < len(model) else None
        else:
            model = getattr(model, step, None)
    return model


def _nested(found: dict[str, torch.Tensor]) -> Any:
    """Tensors by path ("logits", "[1][0]") in tuples and dicts as their paths say; what was no tensor is None."""
    if list(found) == [""]:
        return found[""]
    whole: dict[str, Any] = {}
    for path, tensor in found.items():
        *steps, last = re.findall(r"\[\d+\]|[^.\[]+", path)
        at = whole
        for step in steps:
            at = at.setdefault(step, {})
        at[last] = tensor

    def closed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        inner = {key: closed(item) for key, item in value.items()}
        if not all(key[0] == "[" for key in inner):
            return inner
        numbered = {int(key[1:-1]): item for key, item in inner.items()}
        return tuple(numbered.get(number) for number in range(max(numbered) + 1))

    return closed(whole)


def to_torch(circuit: Circuit, model: torch.nn.Module) -> Compiled:
    """The circuit compiled back to a module, sharing the model's parameters.

    Args:
        circuit: traced from this model; or a part of it, whose module then takes `Circuit.inputs` in their order.
        model: is not changed.

    Returns:
        a `Compiled` module; its ``code`` is the source.

    Raises:
        InputError: an op that cannot be written as a call of torch (an opaque function of another library, numbers
            that came from NumPy), or another model than the traced one.
    """
    return Compiled(circuit, model)


def source(circuit: Circuit) -> str:
    """Python source of a circuit: its functions, the last of which is ``forward(m, *inputs)`` -> list of outputs."""
    for op in circuit.ops:
        if not op.call:
            raise InputError(
                f"to_torch: {op.fn} in {op.name!r}{f' ({op.source})' if op.source else ''} cannot be written as a call of "
                "torch: its arguments, or what it is, are known to Python alone"
            )
    functions = Writer(circuit).functions()
    code = "\n\n".join(functions)
    header = _HEADER + (_EXPECT if "expect(" in code else "")
    used = [name for name in ("einsum", "rearrange", "repeat") if re.search(rf"\b{name}\(", code)]
    header = header.replace("from einops import einsum, rearrange, repeat\n",
                            f"from einops import {', '.join(used)}\n" if used else "")
    return f"{header}\n\n{code}"
