"""The module of a cut: parameters with fewer entries, in a copy of the module or in code compiled from the circuit.

A copy of the user's own module is preferred: with smaller parameters, and with whole numbers that its modules hold
(``in_features``, a number of heads) changed where they were sizes. Whether that is right is not guessed: the copy is
traced, and has to do what the smaller circuit says, call by call. If it does not, the smaller circuit itself is compiled.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from circuitlab.circuit import Circuit, Op
from circuitlab.cut import Cut
from circuitlab.errors import CircuitlabError, InputError, VerificationError
from circuitlab.trace.compile import Compiled
from circuitlab.trace.events import tensors_in
from circuitlab.trace.guard import copy_model, own, random_state
from circuitlab.trace.record import trace


def apply(cut: Cut, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """The smaller module: every parameter and buffer that a cut wire sits in has fewer entries.

    Args:
        cut: of a circuit that was traced from this model.
        model: is not changed, and nothing is shared with it.
        *args, **kwargs: the inputs that it was traced with. The copy is tried on them; without them, on tensors of
            their shapes without numbers, which will not do if it takes other arguments too.

    Returns:
        a copy of the model, of its own class, if that does just what the smaller circuit says; otherwise a
        `circuitlab.trace.compile.Compiled`, the run of the smaller circuit as code, in the mode (training or not) that
        was traced. If all entries are kept, it is always the former.

    Raises:
        InputError: the smaller circuit cannot be run: sizes are in its code in a way that is not understood.
        VerificationError: another module than the circuit was traced from.
    """
    index = _index(cut, model)
    if not index:
        return copy_model(model, (), convert=own)[0]
    for others in (False, True):
        made = _sliced(model, index)
        _tell_sizes(cut, made, others=others)
        if _does(made, cut.circuit, args, kwargs):
            return made
    _check(cut)
    return Compiled(cut.circuit, _sliced(model, index)).train(model.training)


def state(cut: Cut, model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the smaller module as parts of the model's own: gradients go to the whole ones.

    With ``torch.func.functional_call(cut.apply(model), cut.state(model), inputs)`` the networks inside of one are
    trained together, each as the parameters are now. Where neighbouring entries are kept ("first"), they are views, so that
    running statistics are written to the model's too.

    Args:
        cut: of a circuit that was traced from this model.
        model: is not changed.
    """
    index = _index(cut, model)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _part(tensor, index.get(id(tensor), ())) for name, tensor in named.items()}


_Index = tuple["torch.Tensor | tuple[int, int] | None", ...]
"""For each dimension: entries, neighbouring entries as (start, number), or None for all."""


def _index(cut: Cut, model: nn.Module) -> dict[int, _Index]:
    """Id of a parameter or buffer that gets smaller -> which of its entries are kept."""
    named = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    found: dict[int, _Index] = {}
    for tensor in cut.source.tensors:
        if tensor.kind not in ("parameter", "buffer"):
            continue
        kept = cut._entries.tensor(tensor)
        if all(entries is None for entries in kept):
            continue
        held = named.get(tensor.name)
        if held is None or tuple(held.shape) != tensor.shape:
            got = "missing" if held is None else f"of shape {list(held.shape)}"
            raise VerificationError(f"the module is not the one that was traced: its {tensor.name!r} is {got}, and the "
                                    f"circuit has it with shape {list(tensor.shape)}")
        found[id(held)] = tuple(_neighbours(entries) for entries in kept)
    return found


def _neighbours(entries: np.ndarray | None) -> Any:
    if entries is None:
        return None
    if entries[-1] - entries[0] + 1 == len(entries):
        return (int(entries[0]), len(entries))
    return torch.from_numpy(entries)


def _part(tensor: torch.Tensor, index: _Index) -> torch.Tensor:
    for dim, entries in enumerate(index):
        if isinstance(entries, tuple):
            tensor = tensor.narrow(dim, *entries)
        elif entries is not None:
            tensor = tensor.index_select(dim, entries.to(tensor.device))
    return tensor


def _sliced(model: nn.Module, index: Mapping[int, _Index]) -> nn.Module:
    """A copy of the model with smaller parameters."""
    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in index:
            return own(tensor)
        made = _part(tensor.detach(), index[id(tensor)]).clone(memory_format=torch.contiguous_format)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    return copy_model(model, (), convert=convert)[0]


# sizes that modules hold ----------------------------------------------------------------------------------


def _tell_sizes(cut: Cut, made: nn.Module, *, others: bool) -> None:
    """Change whole numbers that modules hold, where they are sizes of what got smaller.

    Args:
        cut, made: the copy has its smaller parameters already.
        others: also the numbers that are no attributes of torch's own modules: those that equal an old size of an array
            that is at hand when the module runs.
    """
    for path, module in made.named_modules():
        ops = list(_ops_in(cut.circuit, path))
        groups = [op.attrs["groups"] for op in ops if "groups" in op.attrs]
        if groups and isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm)):
            setattr(module, "num_groups" if isinstance(module, nn.GroupNorm) else "groups", groups[0])
        known = dict(_known_sizes(module))
        for name, value in known.items():
            if getattr(module, name) != value:
                setattr(module, name, value)
        if others:
            sizes = {old: new for op in ops for old, new in _resized(cut, op)}
            for name, value in list(vars(module).items()):
                if name not in known and name not in _NO_SIZES and name[:1] != "_":
                    changed = _mapped(value, sizes)
                    if changed is not value:
                        module.__dict__[name] = changed


_NO_SIZES = frozenset("training kernel_size stride padding dilation output_padding groups num_groups".split())
"""Attributes of torch's own modules that are no sizes of what got smaller."""


def _known_sizes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of torch's own modules that are sizes of their parameters."""
    weight = getattr(module, "weight", None)
    shape = list(weight.shape) if isinstance(weight, torch.Tensor) else list[int]()
    if isinstance(module, nn.Linear):
        yield from (("out_features", shape[0]), ("in_features", shape[1]))
    elif isinstance(module, nn.Bilinear):
        yield from (("out_features", shape[0]), ("in1_features", shape[1]), ("in2_features", shape[2]))
    elif isinstance(module, nn.modules.conv._ConvNd):
        one, many = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        yield from ((one, shape[0]), (many, shape[1] * module.groups))
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield from (("num_embeddings", shape[0]), ("embedding_dim", shape[1]))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = weight if shape else module.running_mean
        if held is not None:
            yield ("num_features", held.shape[0])
    elif isinstance(module, nn.GroupNorm) and shape:
        yield ("num_channels", shape[0])
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and shape:
        yield ("normalized_shape", tuple(shape))
    elif isinstance(module, nn.RNNBase):
        hidden = module.get_parameter("weight_hr_l0" if module.proj_size else "weight_hh_l0")
        yield from (("input_size", module.get_parameter("weight_ih_l0").shape[1]), ("hidden_size", hidden.shape[1]))
        if module.proj_size:
            yield ("proj_size", hidden.shape[0])
    elif isinstance(module, nn.RNNCellBase):
        yield from (("input_size", module.weight_ih.shape[1]), ("hidden_size", module.weight_hh.shape[1]))
    elif isinstance(module, nn.PReLU):
        yield ("num_parameters", shape[0])


def _ops_in(circuit: Circuit, path: str) -> Iterator[Op]:
    """The ops that run in a module, in all of its calls."""
    for block in circuit.root.blocks():
        if block.name.split("#")[0] == path:
            yield from map(circuit.op, block.op_names())


def _resized(cut: Cut, op: Op) -> Iterator[tuple[int, int]]:
    for name in (*op.inputs, *op.outputs):
        for old, new in zip(cut.source.tensor(name).shape, cut.circuit.tensor(name).shape, strict=True):
            if old != new:
                yield old, new


def _mapped(value: Any, sizes: Mapping[int, int]) -> Any:
    """A number, or numbers in a tuple or list, with sizes changed; the same object where nothing is."""
    if type(value) is int:
        return sizes.get(value, value)
    if type(value) in (tuple, list) and all(type(item) is int for item in value):
        return type(value)(sizes.get(item, item) for item in value) if any(item in sizes for item in value) else value
    return value


# is it right? ---------------------------------------------------------------------------------------------


def _inputs(circuit: Circuit) -> list[torch.Tensor]:
    """Inputs of the traced shapes, without numbers."""
    held = [circuit.tensor(name) for name in circuit.inputs]
    return [torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta") for tensor in held]


def _does(module: nn.Module, circuit: Circuit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a run of the module is what the circuit says, call by call."""
    device = "auto"
    if not args and not kwargs:
        kwargs, device = dict(zip(circuit.inputs, _inputs(circuit), strict=True)), "meta"
    try:
        found = trace(module, *args, device=device, **kwargs)
    except (CircuitlabError, TypeError):
        return False
    return _told(found) == _told(circuit)


def _told(circuit: Circuit) -> Any:
    """What a run does, whatever its wires are called."""
    arrays = {tensor.name: (tensor.shape, tensor.dtype) for tensor in circuit.tensors}
    ops = [(op.name, op.fn, op.inputs, op.outputs, _written(op.call)) for op in circuit.ops]
    return arrays, ops, circuit.inputs, circuit.outputs, circuit.returns


def _written(call: str) -> str:
    """A call in one way of writing it."""
    try:
        return ast.unparse(ast.parse(call.replace("$", "_").replace("_[", "_size[")))
    except SyntaxError:
        return call


def _check(cut: Cut) -> None:
    """Run each call that is told of other sizes, on arrays without numbers, and compare the shapes of what it gives.

    A call that does not run so on the whole circuit's shapes either (it needs numbers) is not tested.
    """
    for op, whole in zip(cut.circuit.ops, cut.source.ops, strict=True):
        names = (*op.inputs, *op.outputs)
        if any(cut.circuit.tensor(name).shape != cut.source.tensor(name).shape for name in names) and op.fn not in _TOLD_BY_WIRES:
            wanted = [cut.circuit.tensor(name).shape for name in op.outputs]
            found = _shapes(cut.circuit, op)
            if found != wanted and _shapes(cut.source, whole) == [cut.source.tensor(name).shape for name in op.outputs]:
                got = f"gives shapes {found} where {wanted} are wanted" if isinstance(found, list) else f"does not run: {found}"
                raise InputError(f"{cut!r} cannot be run: {op.fn} in {op.name!r}{f' ({op.source})' if op.source else ''} {got}. Some size "
                                 "is a number in its call, which does not follow")


_TOLD_BY_WIRES = frozenset("view reshape flatten unflatten ravel squeeze unsqueeze permute transpose expand".split())
"""Re-indexing, which is compiled from wires, not from the call."""


def _shapes(circuit: Circuit, op: Op) -> list[tuple[int, ...]] | str:
    """Shapes of what a call gives, on the meta device; or why it does not run."""
    given = {
        f"_operand_{n}": torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        for n, tensor in enumerate(map(circuit.tensor, op.inputs))
    }
    text = re.sub(r"\$\[(\d+):(\d+)\]", lambda found: str(circuit.tensor(op.outputs[int(found[1])]).shape[int(found[2])]), op.call)
    text = re.sub(r"\$(\d+)", r"_operand_\1", text.replace("$device", "'meta'").replace("$out", "_out"))
    names: dict[str, Any] = {"torch": torch, "F": nn.functional, "expect": lambda now, traced: None, **given}
    try:
        with torch.no_grad(), random_state():
            exec(text if "_out" in text else f"_out = {text}", names)  # noqa: S102
    except Exception as error:
        return str(error)
    return [tuple(tensor.shape) for _, tensor in tensors_in(names.get("_out"), torch.Tensor)][: len(op.outputs)]
