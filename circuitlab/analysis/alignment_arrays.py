"""What of two models is aligned: their common circuit, and their parameters cut into arrays whose axes are wires."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import numpy as np
import torch

from circuitlab.analysis.alignment import Element, assigned, rows, taken
from circuitlab.analysis.symmetry import Symmetry
from circuitlab.circuit import Circuit, Tensor
from circuitlab.errors import InputError
from circuitlab.trace.guard import copy_model
from circuitlab.trace.record import trace

State = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Parameter or buffer of the circuit -> its values in both models."""
ALIKE = 1 << 27
"""Numbers up to which entries that a product cannot tell apart are told apart by their differences."""


# the circuit ------------------------------------------------------------------------------------------


def common(model_a: torch.nn.Module, model_b: torch.nn.Module, args: Any, kwargs: Any) -> Symmetry:
    """The symmetry of two models of one architecture, traced as the first is set to train or not.

    Raises:
        InputError: their parameters, ops or wires differ; the message tells where.
    """
    shapes = [{name: tuple(p.shape) for name, p in (*m.named_parameters(), *m.named_buffers())} for m in (model_a, model_b)]
    missing = [[name for name in one if name not in other] for one, other in (shapes, shapes[::-1])]
    if any(missing):
        told = [f"only {which} has {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
                for which, names in zip(("model_a", "model_b"), missing, strict=True) if names]
        raise InputError(f"the models are of different architectures: {'; '.join(told)}")
    circuit = trace(model_a, *args, **kwargs)
    if shapes[0] == shapes[1] and alike(model_a, model_b):
        return _symmetry(circuit)
    copied, _, _ = copy_model(model_b, ())
    for module, like in zip(copied.modules(), model_a.modules(), strict=False):
        module.training = like.training
    other = trace(copied, *args, **kwargs)
    if shapes[0] != shapes[1]:
        raise InputError(_sizes(circuit, other, *shapes))
    _same(circuit, other)
    return _symmetry(circuit)


def _symmetry(circuit: Circuit) -> Symmetry:
    symmetry = Symmetry(circuit)
    if not symmetry.wires:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(symmetry.frozen.items())[:4])
        raise InputError(f"{circuit.title} has no wire that can be permuted, so there is nothing to match. {why}")
    return symmetry


def alike(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    """Whether two modules surely run the same code: the same classes, with the same settings, all the way down.

    False means that it is not known.
    """
    first, second = list(one.named_modules()), list(two.named_modules())
    return [(path, type(m)) for path, m in first] == [(path, type(m)) for path, m in second] and all(
        _settings(m) == _settings(n) is not None for (_, m), (_, n) in zip(first, second, strict=True)
    )


def _settings(module: torch.nn.Module) -> dict[str, Any] | None:
    """A module's own attributes, if they are all plain values or functions; None if not. Whether it trains does not matter."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    own = {key: value for key, value in vars(module).items() if key not in _HELD}
    return own if all(_is_plain(value) for value in own.values()) else None


_HELD = frozenset(vars(torch.nn.Module()))
"""What torch keeps on every module."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, cast("list[Any]", value)))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType))


def _sizes(one: Circuit, two: Circuit, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The message for models of different width: the wires, with both sizes."""
    wires = [f"{name} ({wire.size} and {two.wires[name].size})" for name, wire in one.wires.items()
             if name in two.wires and wire.size != two.wires[name].size and wire.places]
    tensors = [f"{name} {list(shape)} and {list(second[name])}" for name, shape in first.items() if second[name] != shape]
    sizes = f"the wires {', '.join(wires[:6])} differ in size; " if wires else ""
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return f"the models are of different widths: {sizes}in shape differ {', '.join(tensors[:3])}{more}"


def _same(one: Circuit, two: Circuit) -> None:
    """An `InputError` where two circuits do not have the same wires at the same places, and the same ops between."""
    ops = [[op for op in circuit.ops if op.kind not in ("random", "reindex")] for circuit in (one, two)]
    for first, second in itertools.zip_longest(*ops):
        if first is None or second is None or first.fn != second.fn:
            what = [f"{op.fn} in {op.name!r} ({op.source})" if op is not None else "nothing more" for op in (first, second)]
            raise InputError(f"the models are of different architectures: where model_a computes {what[0]}, model_b computes {what[1]}")
    for name, wire in one.wires.items():
        other = two.wires.get(name)
        if wire.places and (other is None or (other.size, other.places, other.permutable) != (wire.size, wire.places, wire.permutable)):
            raise InputError(f"the models have the same parameters but not the same wires: {wire!r} of model_a is {other!r} in model_b; "
                             "do they have the same number of heads or groups?")


def unread(model: torch.nn.Module, circuit: Circuit) -> tuple[str, ...]:
    """The parameters that the run did not read."""
    return tuple(name for name, _ in model.named_parameters() if name not in circuit.parameters)


# values -----------------------------------------------------------------------------------------------


def states(model_a: torch.nn.Module, model_b: torch.nn.Module, symmetry: Symmetry) -> State:
    """Values of all parameters and buffers of the circuit that are numbers with a point.

    Raises:
        InputError: values that are not finite or not there, or models on different devices.
    """
    named = [{**dict(m.named_buffers(remove_duplicate=False)), **dict(m.named_parameters(remove_duplicate=False))} for m in (model_a, model_b)]
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in symmetry.circuit.parameters:
        pair = tuple(values[name].detach() for values in named)
        if not (pair[0].is_floating_point() or pair[0].is_complex()):
            continue
        for which, value in zip(("model_a", "model_b"), pair, strict=True):
            if value.is_meta:
                raise InputError(f"{name!r} of {which} is on the meta device and has no values; load weights before matching")
            if name in symmetry.actions and not bool(torch.isfinite(value).all()):
                raise InputError(f"{name!r} of {which} has values that are not finite (NaN or infinity), which nothing can be matched with")
        if pair[0].device != pair[1].device:
            raise InputError(f"the models are on different devices: {name!r} on {pair[0].device} and on {pair[1].device}; move one to the other's")
        found[name] = pair[0], pair[1]
    return found


def wired(symmetry: Symmetry) -> tuple[dict[str, int], Mapping[str, tuple[str, ...]], tuple[str, ...]]:
    """Sizes of wires, what each is within, and the names of those that can be permuted."""
    return {name: wire.size for name, wire in symmetry.circuit.wires.items()}, symmetry.within, tuple(symmetry.wires)


def axes_of(symmetry: Symmetry, names: Iterable[str]) -> tuple[str, ...]:
    """The wires of an array that count: those that can be permuted, and those that they stand within; "" for others."""
    names = tuple(names)
    counting = {other for name in names if name in symmetry.wires for other in (name, *symmetry.within[name])}
    return tuple(name if name in counting else "" for name in names)


def outer_first(axes: tuple[str, ...], within: Mapping[str, tuple[str, ...]]) -> list[int]:
    """The axes that can be permuted, in the order in which they have to be."""
    return sorted((n for n, wire in enumerate(axes) if wire in within), key=lambda n: len(within[axes[n]]))


def terms(symmetry: Symmetry, state: State, kinds: tuple[str, ...] = ("parameter",)) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """Pairs of arrays with their axes (see `axes_of`), of all that has a wire that can be permuted."""
    for name in symmetry.actions:
        tensor = symmetry.circuit.tensor(name)
        if name not in state or tensor.kind not in kinds:
            continue
        one, two = (_plain(value) for value in state[name])
        for cut, names in pieces(symmetry.circuit, tensor):
            axes = axes_of(symmetry, names)
            if any(axes):
                shape = [symmetry.circuit.wires[wire].size for wire in names] + list(one.shape[len(tensor.shape):])
                yield one[cut].reshape(shape), two[cut].reshape(shape), axes + ("",) * (len(shape) - len(axes))


def _plain(value: torch.Tensor) -> torch.Tensor:
    """In single precision at least; complex numbers have an axis for their two parts."""
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def pieces(circuit: Circuit, tensor: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[str, ...]]]:
    """A tensor cut into parts that are plain products of wires: (slices, wires)."""
    for chosen in itertools.product(*(list(_leaves(circuit, names, 0)) for names in tensor.dims)):
        yield tuple(slice(start, stop) for start, stop, _ in chosen), tuple(wire for *_, names in chosen for wire in names)


def _leaves(circuit: Circuit, names: tuple[str, ...], start: int) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """The parts of a dimension, down to those whose leading wire is no sum: (start, stop, wires)."""
    wires = circuit.wires
    parts = wires[names[0]].parts if names else ()
    whole = sum(last - first for first, last, _ in parts) == wires[names[0]].size if parts else False
    if not whole or any(math.prod(wires[n].size for n in inner) != last - first for first, last, inner in parts):
        yield start, start + math.prod(wires[name].size for name in names), names
        return
    each = math.prod(wires[name].size for name in names[1:])
    for first, _, inner in parts:
        yield from _leaves(circuit, (*inner, *names[1:]), start + first * each)


# entries that are nearly alike ------------------------------------------------------------------------


def settle(symmetry: Symmetry, state: State, element: Element) -> None:
    """Tell entries apart that are too much alike for a product: by differences in double precision, and by buffers.

    Units that weight decay has made zero, say, have scores below the rounding of others. Changes the element.
    """
    kinds = [list(terms(symmetry, state, (kind,))) for kind in ("parameter", "buffer")]
    sizes, within, names = wired(symmetry)
    permuted = [[_permuted(b, axes, element, within) for _, b, axes in some] for some in kinds]
    for name in sorted(names, key=lambda name: len(within[name])):
        outer = within[name]
        sides = [
            [(rows(a, axes, n, outer), rows(b, axes, n, outer)) for (a, _, axes), b in zip(some, moved, strict=True) for n, w in enumerate(axes) if w == name]
            for some, moved in zip(kinds, permuted, strict=True)
        ]
        groups = math.prod(sizes[o] for o in outer)
        differ = torch.stack([(a != b).any(-1) for a, b in sides[0] + sides[1]]).any(0)
        if not sides[0] or not bool(differ.any()):
            continue
        far, size = (torch.stack([made(a, b).square().sum(-1) for a, b in sides[0]]).sum(0) for made in (torch.sub, _larger))
        noise = 32 * max(torch.finfo(a.dtype).eps for a, _ in sides[0]) * size.amax(-1, keepdim=True)
        index = torch.arange(sizes[name], device="cpu").repeat(groups, 1)
        for group in range(groups):
            chosen = ((far[group] <= noise[group]) & differ[group]).nonzero()[:, 0]
            length = sum(a.shape[-1] for a, _ in sides[0] + sides[1])
            if len(chosen) < 2 or len(chosen) ** 2 * length > ALIKE:
                continue
            far_apart = sum(torch.cdist(a[group, chosen].double(), b[group, chosen].double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
                            for a, b in sides[0] + sides[1])
            assert isinstance(far_apart, torch.Tensor)
            order = assigned(-far_apart.cpu().numpy()[None])[0]
            if far_apart.cpu().numpy()[np.arange(len(order)), order].sum() < float(far_apart.trace()):
                index[group, chosen.cpu()] = chosen.cpu()[torch.from_numpy(order)]
        index = index.reshape(element[name].shape)
        element[name] = element[name].gather(-1, index)
        for child in (n for n in names if name in within[n]):
            around = (*within[child], child)
            element[child] = taken(element[child], around, around.index(name), index, outer)
        for some, moved in zip(kinds, permuted, strict=True):
            for at, (_, _, axes) in enumerate(some):
                for n, wire in enumerate(axes):
                    if wire == name:
                        moved[at] = taken(moved[at], axes, n, index, outer)


def _larger(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return torch.maximum(one.abs(), two.abs())


def _permuted(value: torch.Tensor, axes: tuple[str, ...], element: Element, within: Mapping[str, tuple[str, ...]]) -> torch.Tensor:
    """An array with an element applied."""
    for n in outer_first(axes, within):
        value = taken(value, axes, n, element[axes[n]], within[axes[n]])
    return value
