"""What the middle of a path lacks, put right: statistics of activations that no longer are those of trained models.

Between two networks activations have less variance than in either, layer after layer: variance collapse (Jordan et al.,
*REPAIR*, 2023). Networks with BatchNorm need their running statistics reset on training data. In others each channel's mean
and standard deviation are set to those between the two networks', and that is fused back into the weights. Models that a
path starts and ends with are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from circuitlab.analysis import batches as walked
from circuitlab.analysis.states import Combination, own_state, scratch, state_of
from circuitlab.circuit import Circuit, Op
from circuitlab.errors import InputError
from circuitlab.trace.functions import plan_of
from circuitlab.trace.record import trace

KINDS = ("batchnorm", "repair")
Moments = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Weight -> mean and standard deviation of each of its output channels."""


def correction(kind: str | None, models: Sequence[nn.Module], family: Combination, batches: Any) -> Correction | None:
    """A correction by name.

    Args:
        kind: "batchnorm", "repair", or None for none.
        models: that points lie between.
        family: of the points.
        batches: training data.

    Raises:
        InputError: an unknown name, or models that it cannot be done to.
    """
    if kind is None:
        return None
    if kind == "batchnorm":
        return Reset(models[0], family)
    if kind == "repair":
        return Repair(models, family, batches)
    raise InputError(f"correct={kind!r} is not known; give 'batchnorm', 'repair' or None")


class Correction:
    """Changes a model between models. An instance is called with each point: see `circuitlab.analysis.bench.Prepare`."""

    def __init__(self, family: Combination) -> None:
        self.partial = family.moving is not None

    def is_end(self, weights: Sequence[float]) -> bool:
        """Whether a point is one of the models themselves."""
        ones = [number for number, weight in enumerate(weights) if weight]
        return len(ones) == 1 and weights[ones[0]] == 1 and not (self.partial and ones[0])

    def __call__(self, model: nn.Module, weights: Sequence[float], batches: Any) -> None:
        """Correct a model in eval mode, in place."""
        if not self.is_end(weights):
            self.correct(model, weights, batches)

    def correct(self, model: nn.Module, weights: Sequence[float], batches: Any) -> None:
        """Correct a point between the models."""
        raise NotImplementedError

    def at(self, model: nn.Module, weights: Sequence[float], batches: Any) -> None:
        """Correct a model in any mode, and leave it in that."""
        modes = {module: module.training for module in model.modules()}
        try:
            with torch.no_grad():
                self(model.eval(), weights, batches)
        finally:
            for module, mode in modes.items():
                module.training = mode


def _forward(model: nn.Module, batches: Any, least: int = 1) -> None:
    """Run a model on batches of at least so many examples."""
    device = walked.device_of(model)
    for batch in batches:
        if walked.examples(batch) >= least:
            args, kwargs = walked.inputs_of(model, walked.to_device(batch, device))
            with walked.running(model, batch):
                model(*args, **kwargs)


# BatchNorm --------------------------------------------------------------------------------------------


class Reset(Correction):
    """Running means and variances are forgotten, and found anew: averages over training batches, each with equal weight."""

    def __init__(self, model: nn.Module, family: Combination) -> None:
        super().__init__(family)
        if not _norms(model):
            raise InputError(f"correct='batchnorm': {type(model).__name__} has no BatchNorm with running statistics; try correct='repair', "
                             "which is for networks without it")

    def correct(self, model: nn.Module, weights: Sequence[float], batches: Any) -> None:
        """Reset the statistics."""
        norms = _norms(model)
        before = [(norm, norm.momentum) for norm in norms]
        least = 2 if any(walked.examples(batch) > 1 for batch in batches) else 1  # of one example there is no variance
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # all batches count alike
                norm.training = True
            _forward(model, batches, least)
        finally:
            for norm, momentum in before:
                norm.momentum, norm.training = momentum, False


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


# REPAIR -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A product whose channels can be rescaled, and shifted where it has a bias.

    Attributes:
        weight, bias: their names, "" where it has no bias. fn: the function that computes it.
        rows: dimension of the weight that holds the channels. channels: that of the output.
    """

    weight: str
    bias: str
    fn: str
    rows: int
    channels: int


class Repair(Correction):
    """Each channel before a nonlinearity gets a mean and standard deviation between those of the models (REPAIR, section 3);
    where there is no bias to shift it by, the standard deviation alone.

    The statistics are found in one pass over training data, in which each layer's outputs are already corrected, with the
    statistics of the batch, for the layers after it.
    """

    def __init__(self, models: Sequence[nn.Module], family: Combination, batches: Any) -> None:
        super().__init__(family)
        first = walked.first(batches)
        args, kwargs = walked.inputs_of(models[0], first)
        self.layers = layers_of(trace(models[0], *args, **kwargs))
        moving = family.moving
        self.still = frozenset(layer.weight for layer in self.layers if moving is not None and layer.weight not in moving)
        self.ends: list[Moments] = []
        copied = scratch(models[0]).eval()
        for model in models:
            Combination([state_of(model)]).write(own_state(copied), [1.0])
            with torch.no_grad():
                self.ends.append(self._measured(copied, batches, None))

    def target(self, weights: Sequence[float]) -> Moments:
        """Means and standard deviations between those of the models; of what does not move, those of the first."""
        found: Moments = {}
        for weight, (mean, std) in self.ends[0].items():
            shares = [1.0, *[0.0] * (len(weights) - 1)] if weight in self.still else weights
            found[weight] = torch.zeros_like(mean), torch.zeros_like(std)
            for share, end in zip(shares, self.ends, strict=True):
                for total, moment in zip(found[weight], end[weight], strict=True):
                    total.add_(moment, alpha=share)
        return found

    def correct(self, model: nn.Module, weights: Sequence[float], batches: Any) -> None:
        """Rescale and shift each channel, in its weight and its bias, if it has one."""
        target = self.target(weights)
        found = self._measured(model, batches, target)
        named = dict(model.named_parameters(remove_duplicate=False))
        for layer in self.layers:
            (mean, std), (wanted, spread) = found[layer.weight], target[layer.weight]
            scale = _ratio(spread, std)
            weight = named[layer.weight]
            shape = [-1 if dim == layer.rows else 1 for dim in range(weight.ndim)]
            weight.mul_(scale.to(weight.dtype).reshape(shape))
            if layer.bias:
                bias = named[layer.bias]
                bias.copy_((bias - mean) * scale + wanted)

    def _measured(self, model: nn.Module, batches: Any, target: Moments | None) -> Moments:
        with _unfused(), _Watch(model, self.layers, target) as watch:
            _forward(model, batches)
        missed = [layer.weight for layer in self.layers if not watch.n[layer.weight]]
        if missed:
            raise InputError(f"correct='repair': the products with {missed} were found when the model was traced, and not when it ran: "
                             "it computes in another way in eval mode")
        return {weight: (watch.mean[weight], (watch.square[weight] / watch.n[weight]).clamp(min=0).sqrt()) for weight in watch.n}


def _ratio(spread: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Wanted over found standard deviation; 1 where a channel is constant."""
    flat = std <= 1e-6 * std.max()
    return torch.where(flat, 1.0, spread.clamp(min=0) / std.masked_fill(flat, 1.0))


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention computes its products one by one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Watch(TorchFunctionMode):
    """While active, adds up the moments of what layers compute, and corrects it if there is a target."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], target: Moments | None) -> None:
        super().__init__()
        named = dict(model.named_parameters(remove_duplicate=False))
        self.layers = {id(named[layer.weight]): layer for layer in layers}
        self.target = target
        self.n = {layer.weight: 0 for layer in layers}
        self.mean: dict[str, torch.Tensor] = {}
        self.square: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        met = [self.layers[id(value)] for value in (*args, *kwargs.values()) if id(value) in self.layers]
        if not met:
            return func(*args, **kwargs)
        layer = next((layer for layer in met if layer.fn == getattr(func, "__name__", "")), None)
        if layer is not None:
            return self._seen(layer, func(*args, **kwargs))
        entered = plan_of(func)[3]
        if entered is None:
            return func(*args, **kwargs)
        with self:  # a function that computes the product within
            return entered(*args, **kwargs)

    def _seen(self, layer: Layer, result: torch.Tensor) -> torch.Tensor:
        rest = [dim for dim in range(result.ndim) if dim != layer.channels % result.ndim]
        count = math.prod(result.shape[dim] for dim in rest)
        exact = result if result.dtype == torch.float64 else result.float()
        variance, mean = torch.var_mean(exact, rest, correction=0)
        self._add(layer.weight, count, mean, variance)
        if self.target is None or count < 2:
            return result
        wanted, spread = self.target[layer.weight]
        shape = [-1 if dim == layer.channels % result.ndim else 1 for dim in range(result.ndim)]
        scale = _ratio(spread, variance.sqrt())
        shift = wanted - mean * scale if layer.bias else torch.zeros_like(mean)
        return (exact * scale.reshape(shape) + shift.reshape(shape)).to(result.dtype)

    def _add(self, weight: str, count: int, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Chan's update of mean and sum of squares."""
        n = self.n[weight]
        if not n:
            self.mean[weight], self.square[weight] = mean, variance * count
        else:
            step = mean - self.mean[weight]
            self.mean[weight] = self.mean[weight] + step * (count / (n + count))
            self.square[weight] = self.square[weight] + variance * count + step.square() * (n * count / (n + count))
        self.n[weight] = n + count


def layers_of(circuit: Circuit) -> tuple[Layer, ...]:
    """The products of a circuit whose channels can be corrected: those that more is computed from than a function of each entry.

    Raises:
        InputError: there are none; or one is used more than once, or has its channels in several dimensions.
    """
    if any(op.fn == "batch_norm" for op in circuit.ops):
        raise InputError(f"correct='repair' is for networks without BatchNorm, and {circuit.title} has it: give correct='batchnorm'")
    users: dict[str, int] = {}
    for op in circuit.ops:
        for name in op.inputs:
            users[name] = users.get(name, 0) + 1
    found, bad = [], []
    for op in circuit.ops:
        weights = [name for name in op.inputs if circuit.tensor(name).kind == "parameter" and len(circuit.tensor(name).shape) > 1]
        if op.kind not in ("linear", "conv") or len(weights) != 1 or _ends(circuit, op):
            continue
        layer = _layer(circuit, op, weights[0])
        if isinstance(layer, str):
            bad.append(f"{weights[0]!r} {layer}")
        elif (times := max(users[layer.weight], users.get(layer.bias, 1))) > 1:
            bad.append(f"{weights[0]!r} is used {times} times")
        else:
            found.append(layer)
    if bad:
        raise InputError(f"correct='repair' cannot put statistics back into all layers of {circuit.title}: {'; '.join(bad[:6])}"
                         + (f"; and {len(bad) - 6} more" if len(bad) > 6 else "")
                         + ". It needs products with one weight of their own; try correct=None")
    if not found:
        raise InputError(f"correct='repair': {circuit.title} has no linear map or convolution before its last one, "
                         "so there is nothing to correct")
    return tuple(found)


def _layer(circuit: Circuit, op: Op, weight: str) -> Layer | str:
    """A product whose channels are one dimension of its weight, its output, and its bias if it has one; or why it is none."""
    at, shape = op.inputs.index(weight), circuit.tensor(weight).shape
    biases = [name for name in op.inputs if circuit.tensor(name).kind == "parameter" and len(circuit.tensor(name).shape) == 1]
    out = circuit.tensor(op.outputs[0])
    for rows in range(len(shape)):
        inside = [axis for axis in op.axes if any(place[:2] == (at, rows) for place in axis.ins)]
        where = {place[1] for axis in inside for place in axis.outs}
        if len(where) != 1 or any(not axis.outs for axis in inside):
            continue
        (channels,) = where
        if out.shape[channels] != shape[rows]:
            return "has its channels in several dimensions"
        for bias in biases:
            if circuit.tensor(bias).dims[0] == circuit.tensor(weight).dims[rows]:
                return Layer(weight, bias, op.fn, rows, channels - len(out.shape))
        return "has a bias of other channels" if biases else Layer(weight, "", op.fn, rows, channels - len(out.shape))
    return "has no dimension of channels"


def _ends(circuit: Circuit, op: Op) -> bool:
    """Whether an output of the circuit is nothing but a function of an op's entries: it is the model's last layer."""
    pending, outputs = list(op.outputs), set(circuit.outputs)
    while pending:
        name = pending.pop()
        if name in outputs:
            return True
        for reader in map(circuit.op, circuit.consumers.get(name, ())):
            others = [other for other in reader.inputs if other != name and circuit.tensor(other).kind == "value"]
            if reader.kind in ("reindex", "elementwise", "softmax") and not others:
                pending.extend(reader.outputs)
    return False


__all__ = ["KINDS", "Correction", "Layer", "Repair", "Reset", "correction", "layers_of"]
