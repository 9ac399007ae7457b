"""One forward of a live module -> a flat list of events, and `trace`, which makes a circuit of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from circuitlab.circuit import Circuit
from circuitlab.errors import InputError, TraceError
from circuitlab.trace import nest, rules, transforms
from circuitlab.trace.build import build
from circuitlab.trace.events import tensors_in
from circuitlab.trace.guard import copy_model, device_of, forget, no_collection, random_state, with_numbers
from circuitlab.trace.watch import LARGE, Recorder


def trace(
    model: torch.nn.Module,
    *args: Any,
    names: Mapping[str, str] | None = None,
    device: str = "auto",
    **kwargs: Any,
) -> Circuit:
    """Run a module once on inputs and read its wires.

    The run is on a copy that shares the parameters, without gradients: the module, its buffers, hooks and mode, the
    inputs and the random state stay as they are.

    Args:
        model: any ``nn.Module`` that runs eagerly.
        *args, **kwargs: inputs as its ``forward`` takes them.
        names: names for the axes of inputs, ``{"x": "batch seq"}``; "_" leaves one unnamed.
        device: "meta" computes shapes only, without numbers or memory; "live" runs on the model's own device, and
            probes ops without a rule in a second run; "auto" tries meta first, and runs live where that fails, or to
            probe ops without a rule if the model and the inputs are small. `Circuit.device` says which it was.

    Returns:
        the `Circuit`.

    Raises:
        InputError: not a module, no tensors among the inputs, an unknown device, or names that do not fit.
        TraceError: the module is compiled or scripted, or its forward raised; the error carries the module path,
            the source line and the circuit up to there.
    """
    _check(model, args, kwargs, device)
    tensors = [tensor for _, tensor in tensors_in((args, kwargs), torch.Tensor)]
    reason = ""
    if device != "live":
        try:
            with no_collection():
                recorder = record(model, args, kwargs, meta=True)[0]
                forget(recorder.kept)
                circuit = build(recorder.recording, model, names)
            if device == "auto" and _unknown(recorder, circuit) and _small([*model.parameters(), *model.buffers(), *tensors]):
                with suppress(RunError, InputError):
                    return _probed(circuit, model, args, kwargs, names)
            return circuit
        except InputError:
            raise
        except RunError as failure:
            forget(failure.recorder.kept)
            if device == "meta":
                raise failure.to_user(model, "on the meta device; try device='live'", names) from failure.cause
            reason = f"{type(failure.cause).__name__}: {failure.cause}"
        except Exception as error:
            if device == "meta":
                raise TraceError(
                    f"{type(model).__name__} cannot be copied to the meta device "
                    f"({type(error).__name__}: {error}); try device='live'"
                ) from error
            reason = f"{type(error).__name__}: {error}"
    state = [*model.parameters(), *model.buffers(), *tensors]
    missing = TraceError(
        f"{type(model).__name__} holds meta tensors, which have no values, and its forward needs values "
        f"({reason}); give the module its weights with model.to_empty(device='cpu') or load them, then trace again"
    )
    if state and all(tensor.is_meta for tensor in state):
        raise missing
    try:
        recorder, _ = record(model, args, kwargs, meta=False)
        with no_collection():
            circuit = build(recorder.recording, model, names)
        return _probed(circuit, model, args, kwargs, names) if circuit.opaque else circuit
    except RunError as failure:
        if any(tensor.is_meta for tensor in state):
            raise missing from failure.cause
        raise failure.to_user(model, "", names) from failure.cause


_SMALL = 1 << 24
"""With no more numbers than this, a model is run live to probe what a meta run leaves opaque."""


def _small(tensors: list[torch.Tensor]) -> bool:
    return not any(tensor.is_meta for tensor in tensors) and sum(tensor.numel() for tensor in tensors) <= _SMALL


def _unknown(recorder: Recorder, circuit: Circuit) -> bool:
    """Whether a circuit has ops that no rule is for, and not only calls that their rule does not cover."""
    names = {op.name for op in circuit.opaque}
    return any(event.rule is rules.opaque and event.operands and event.name in names for event in recorder.recording.events)


def _probed(circuit: Circuit, model: torch.nn.Module, args: Any, kwargs: Any, names: Mapping[str, str] | None) -> Circuit:
    """The circuit with what a second run finds out about its ops without a rule."""
    from circuitlab.trace.probe import Prober

    prober = type("Prober", (Prober,), {
        "wanted": frozenset(op.name for op in circuit.opaque),
        "functions": frozenset(op.fn for op in circuit.opaque),
    })
    recorder, _ = record(model, args, kwargs, meta=False, recorder_class=prober)
    if not any(event.probed for event in recorder.recording.events):
        return circuit
    with no_collection():
        return build(recorder.recording, model, names)


def _check(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> None:
    if device not in ("auto", "meta", "live"):
        raise InputError(f"device={device!r} is not one of 'auto', 'meta', 'live'")
    if not isinstance(model, torch.nn.Module):
        what = "a class: make an instance of it" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"trace needs a torch.nn.Module, and was given {what}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{type(model).__name__} is a scripted module: its Python code cannot be watched. "
            "Trace the module that it was scripted from"
        )
    for path, module in model.named_modules():
        if path and isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"the submodule {path!r} is a scripted module: its Python code cannot be watched. "
                "Put the module that it was scripted from in its place",
                module=path,
            )
    for path, tensor in (*tensors_in((args, kwargs), torch.Tensor), *model.named_parameters(), *model.named_buffers()):
        if tensor.is_nested:
            raise InputError(f"{path} is a nested tensor, whose rows differ in length, so that it has no axis to follow; "
                             "trace with torch.nested.to_padded_tensor(...) and a mask")
        if tensor.layout not in (torch.strided, torch._mkldnn):  # pyright: ignore[reportAttributeAccessIssue]
            raise InputError(f"{path} is a sparse tensor, and rules are for dense ones; trace with its to_dense()")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, torch.nn.UninitializedParameter)]
    if lazy:
        raise TraceError(
            f"the parameter {lazy[0]!r} has no shape yet (a lazy module); run the module once, then trace it"
        )
    found = [path for path, _ in tensors_in((args, kwargs), torch.Tensor)]
    if not found and (args or kwargs):
        given = ", ".join(type(item).__name__ for item in (*args, *kwargs.values()))
        raise InputError(
            f"there is no tensor among the inputs ({given}); give the inputs as {type(model).__name__}.forward takes "
            "them, e.g. trace(model, torch.zeros(1, 3, 224, 224))"
        )


class RunError(Exception):
    """The forward raised."""

    def __init__(self, recorder: Recorder, module: str, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.recorder = recorder
        self.module = module
        self.cause = cause

    def to_user(self, model: torch.nn.Module, hint: str, names: Mapping[str, str] | None) -> TraceError:
        """The error as the user gets it, with the partial circuit."""
        source = nest.error_source(self.cause)
        where = f"module {self.module!r}" if self.module else "the root module"
        message = (
            f"{type(model).__name__}.forward raised {type(self.cause).__name__} in {where}"
            f"{f' at {source}' if source else ''}: {self.cause}"
        )
        shapes = ", ".join(f"{v.name} {list(v.shape)} {v.dtype}" for v in self.recorder.recording.inputs)
        message += f"\ninputs were: {shapes or 'no tensors'}"
        message += f"\n{hint}" if hint else "\ncheck that the inputs are what its forward takes"
        circuit = None
        try:
            recording = self.recorder.recording
            recording.outputs = [event.outs[0] for event in recording.events[-1:]]
            circuit = build(recording, model, names, keep_all=True)
        except Exception:
            circuit = None
        return TraceError(message, module=self.module, source=source, circuit=circuit)


def record(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    meta: bool,
    recorder_class: type[Recorder] | None = None,
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    prepare: Callable[[torch.nn.Module], None] | None = None,
) -> tuple[Recorder, Any]:
    """Run a copy of the module, recording. The random state is put back, so that each run draws the same numbers.

    Args:
        model, args, kwargs: as `trace` got them.
        meta: on meta tensors.
        recorder_class: watches the run.
        convert: makes the copies of the module's and the inputs' tensors.
        prepare: changes the copied module before the run.

    Returns:
        the recorder, and the module's output.
    """
    copied, (args, kwargs), originals = copy_model(model, (args, kwargs), meta=meta, convert=convert)
    if prepare is not None:
        prepare(copied)
    constants = {
        id(tensor): f"{path}.{key}" if path else key
        for path, module in copied.named_modules()
        for key, value in vars(module).items()
        if key[:1] != "_" and not isinstance(value, torch.nn.Module) and not callable(value)
        for key, tensor in tensors_in(value, torch.Tensor, key)
    } | {
        id(value): f"{path}.{key}" if path else key
        for path, module in copied.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.ScriptObject)
    }
    real = {key: t for key, t in originals.items() if not t.is_meta and t.numel() <= LARGE and t.device.type == "cpu"}
    recorder = (recorder_class or Recorder)(copied, meta=meta, device=device_of(model), constants=constants, real=real)
    for name, tensor in named_inputs(forward_of(copied), args, kwargs):
        recorder.recording.inputs.append(recorder.add(tensor, recorder._name(name), "input"))
    hooks = (
        torch.nn.modules.module.register_module_forward_pre_hook(recorder.module_begins),
        torch.nn.modules.module.register_module_forward_hook(recorder.module_ends, always_call=True),
    )
    try:
        with random_state(), transforms.announced(), warnings.catch_warnings(), torch.no_grad(), with_numbers(model), recorder:
            # the hooks are ours, and gone after the run
            warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            output = copied(*args, **kwargs)
    except Exception as error:
        failure = recorder.failure
        path = failure[1] if failure is not None and failure[0] is error else ""
        raise RunError(recorder, path, error) from error
    finally:
        for hook in hooks:
            hook.remove()
        recorder.nest.over()
    for path, tensor in tensors_in(output, torch.Tensor):
        entry = recorder.entry(recorder._twin(tensor) if meta else tensor)
        recorder.recording.outputs.append(entry.value)
        recorder.recording.returns.append(path)
    if not recorder.recording.outputs:
        raise InputError(
            f"{type(model).__name__}.forward returned no tensor (a {type(output).__name__}); "
            "there is no wire to draw. Trace the part of it that computes"
        )
    return recorder, output


def forward_of(model: torch.nn.Module) -> Any:
    """A module's own forward: of one compiled by torch.compile, that of what was compiled."""
    return model._modules.get("_orig_mod", model).forward  # pyright: ignore[reportOptionalMemberAccess]


def named_inputs(forward: Any, args: Any, kwargs: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors among the inputs, named by the parameters of a module's forward, or of its signature."""
    try:
        signature = forward if isinstance(forward, inspect.Signature) else inspect.signature(forward)
        bound = dict(signature.bind(*args, **kwargs).arguments)
        for key, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(key, {}))
    except (TypeError, ValueError):
        bound = {**{f"input{n}": value for n, value in enumerate(args)}, **kwargs}
    found: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()
    for key, value in bound.items():
        for path, tensor in tensors_in(value, torch.Tensor, key):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append((path, tensor))
    return found
