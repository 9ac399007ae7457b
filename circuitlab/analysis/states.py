"""Models as points: what a module's numbers are, and weighted sums of those of several modules.

A path, a plane and a curve through models are all weighted sums of a few of them, θ(w) = Σ w_k θ_k; only the weights
differ from point to point. Sums are over all floating-point parameters and buffers. Integers, such as how many batches
a norm has seen, cannot be averaged: they are taken from the model with the largest weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from circuitlab.circuit import unknown
from circuitlab.errors import InputError
from circuitlab.trace.guard import copy_model, device_of, own

State = Mapping[str, torch.Tensor]
"""Name of a parameter or buffer -> its numbers."""

_SHOWN = 6


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, detached and not copied; one that is tied stands under each of its names.

    Raises:
        InputError: parameters that have no numbers yet.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    empty = [name for name, tensor in named if is_lazy(tensor) or tensor.is_meta]
    if empty:
        raise InputError(f"{type(model).__name__} has no numbers in {_some(empty)}: give a model that was initialised, not a lazy or meta one")
    return {name: tensor.detach() for name, tensor in named}


def own_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their first name, each once: what is to be written to move a model."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def alike(models: Sequence[torch.nn.Module], names: Sequence[str]) -> None:
    """An `InputError` if models differ in the names, shapes or kinds of their parameters and buffers, or in their modules."""
    for name, model in zip(names, models, strict=True):
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"{name} must be a torch.nn.Module, and is a {type(model).__name__}")
    first, base = names[0], state_of(models[0])
    types = {path: type(module) for path, module in models[0].named_modules(remove_duplicate=False)}
    for name, model in zip(names[1:], models[1:], strict=True):
        state = state_of(model)
        missing, extra = [key for key in base if key not in state], [key for key in state if key not in base]
        if missing or extra:
            told = [*([f"{name} has no {_some(missing)}"] if missing else []), *([f"{first} has no {_some(extra)}"] if extra else [])]
            raise InputError(f"{first} ({type(models[0]).__name__}) and {name} ({type(model).__name__}) have different parameters: "
                             f"{'; '.join(told)}; only models of one architecture can be joined")
        shapes = [f"{key!r} {list(base[key].shape)} and {list(state[key].shape)}" for key in base if base[key].shape != state[key].shape]
        if shapes:
            raise InputError(f"{first} and {name} have parameters of different shapes: {_some(shapes, plain=True)}")
        kinds = [f"{key!r} {base[key].dtype} and {state[key].dtype}" for key in base if base[key].dtype != state[key].dtype]
        if kinds:
            raise InputError(f"{first} and {name} have parameters of different types: {_some(kinds, plain=True)}; convert one of the "
                             "models, e.g. with .float()")
        other = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
        if [kind.__qualname__ for kind in types.values()] != [kind.__qualname__ for kind in other.values()]:
            told = [f"{path or 'the model'!r} is a {types[path].__name__ if path in types else 'nothing'} and a "
                    f"{other[path].__name__ if path in other else 'nothing'}"
                    for path in {**types, **other} if getattr(types.get(path), "__qualname__", "") != getattr(other.get(path), "__qualname__", "")]
            raise InputError(f"{first} and {name} have parameters of the same names and compute differently: {_some(told, plain=True)}")
        for group in _tied(models[0]):
            apart = [key for key in group[1:] if not torch.equal(state[key], state[group[0]])]
            if apart:
                raise InputError(f"{first} ties {_some(group)}, and in {name} they hold different numbers: a point between the two cannot "
                                 f"be written into a copy of {first}; untie them in {first}, or tie them in {name}")


def _tied(model: torch.nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        groups.setdefault(id(tensor), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _some(names: Sequence[str], *, plain: bool = False) -> str:
    shown = ", ".join(name if plain else repr(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def within(model: torch.nn.Module, layers: Iterable[str]) -> frozenset[str]:
    """Names of the parameters and buffers of some modules.

    Args:
        model: of which they are.
        layers: paths of modules, such as ``"transformer.h.3"``, or of parameters.

    Raises:
        InputError: a path without parameters.
    """
    names = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))]
    paths = [layers] if isinstance(layers, str) else list(layers)
    found: set[str] = set()
    for path in paths:
        inside = {name for name in names if not path or name == path or name.startswith(path + ".")}
        if not inside:
            parts = [path for path, module in model.named_modules() if path and next(module.parameters(), None) is not None]
            raise InputError(f"layers: {str(unknown('layer', path, parts + names)).replace('this circuit', 'the model')}")
        found |= inside
    if not found:
        raise InputError("layers is empty: name the modules that move, such as {'fc1', 'block.0'}, or give None for all")
    return frozenset(found)


class Combination:
    """The weighted sums of some models.

    Attributes:
        states: the numbers of each model, not copied. One may lack names, as a direction that moves a part does.
        moving: names of what is summed; the rest is that of the first. None is all.
    """

    def __init__(self, states: Sequence[State], moving: frozenset[str] | None = None) -> None:
        device = {name: tensor.device for name, tensor in states[0].items()}
        self.states = tuple({name: t.to(device[name]) for name, t in state.items() if name in device} for state in states)
        self.moving = moving

    @classmethod
    def of(cls, models: Sequence[torch.nn.Module], layers: Iterable[str] | None = None, names: Sequence[str] | None = None) -> Combination:
        """That of models of one architecture. ``layers`` are paths of what moves; ``names`` is what errors call the models.

        Raises:
            InputError: the models differ, or a path is not there.
        """
        alike(models, names or [f"models[{number}]" for number in range(len(models))])
        return cls([state_of(model) for model in models], None if layers is None else within(models[0], layers))

    def write(self, target: Mapping[str, torch.Tensor], weights: Sequence[float]) -> None:
        """Write a sum into tensors, in place. Where one weight is 1 and the others are 0, it is that model, bit for bit."""
        weights = [float(weight) for weight in weights]
        with torch.no_grad():
            for name, out in target.items():
                if self.moving is not None and name not in self.moving:
                    out.copy_(self.states[0][name])
                    continue
                terms = [(w, state[name]) for w, state in zip(weights, self.states, strict=True) if name in state]
                _sum(out, terms)


def _sum(out: torch.Tensor, terms: list[tuple[float, torch.Tensor]]) -> None:
    if not (out.is_floating_point() or out.is_complex()):
        out.copy_(max(terms, key=lambda term: term[0])[1])
        return
    terms = [term for term in terms if term[0] != 0]  # what has no weight may hold NaN
    if not terms:
        out.zero_()
    elif len(terms) == 1 and terms[0][0] == 1:
        out.copy_(terms[0][1])
    elif len(terms) == 2 and math.isclose(terms[0][0] + terms[1][0], 1.0, rel_tol=0, abs_tol=1e-12):
        torch.lerp(terms[0][1], terms[1][1], terms[1][0], out=out)  # where both are equal, exactly that
    elif out.dtype in (torch.float16, torch.bfloat16):
        total = terms[0][1].float() * terms[0][0]
        for weight, tensor in terms[1:]:
            total.add_(tensor, alpha=weight)
        out.copy_(total)
    else:
        torch.mul(terms[0][1], terms[0][0], out=out)
        for weight, tensor in terms[1:]:
            out.add_(tensor, alpha=weight)


def merge(
    models: Sequence[torch.nn.Module], weights: Sequence[float] | None = None, *, layers: Iterable[str] | None = None
) -> torch.nn.Module:
    """A new model with the weighted sum of the numbers of several: a copy of the first, in its mode.

    Args:
        models: of one architecture. None is changed.
        weights: one for each model, which need not add up to 1; None is the mean.
        layers: paths of the modules that are summed, such as ``{"transformer.h.3"}``; the rest is that of the first.
            None is all.

    Raises:
        InputError: models that differ in names, shapes or types of their parameters, or not one weight for each.
    """
    models = list(models)
    if not models:
        raise InputError("merge needs at least one model")
    weights = [1 / len(models)] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(models) or not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weights={weights}: give one finite number for each of the {len(models)} models")
    family = Combination.of(models, layers)
    made = scratch(models[0])
    family.write(own_state(made), weights)
    return made


def single(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in single precision at least: what an optimiser moves by small steps is lost in half precision, or NaN."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def scratch(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares nothing with the model, in the same mode."""
    copied: Any = copy_model(model, (), convert=own)[0]
    return copied


__all__ = ["Combination", "State", "alike", "device_of", "merge", "own_state", "scratch", "single", "state_of", "within"]
