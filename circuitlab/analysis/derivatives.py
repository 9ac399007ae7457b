"""First and second derivatives of a model's mean loss over all examples, at numbers that are written into a copy of it.

The copy is in double precision where it runs in it. Numbers are written in place and batches are streamed, so memory is
that of one batch's graph. Attention and recurrent layers are computed in ways that can be derived twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from circuitlab.analysis import batches as walked
from circuitlab.analysis.shards import shards
from circuitlab.analysis.states import own_state, scratch
from circuitlab.errors import InputError
from circuitlab.trace.guard import copy_model, doubled, random_state

Floats = NDArray[np.float64]
Numbers = Mapping[str, Tensor]
"""Name of a parameter or buffer -> a tensor of its shape."""

STEP = 1e-7
"""As a share of a direction: slopes that far apart give curvature to about 1e-6."""


class NoSecondDerivativeError(InputError):
    """A part of the model can be derived once, and not twice."""


class Derivatives:
    """Derivatives of the mean loss with respect to some parameters and buffers.

    Args:
        model: is copied.
        batches: what can be walked again.
        loss: see `circuitlab.analysis.batches.loss_of`.
        names: of what is derived by, each tied tensor by its first name; None is all parameters that require gradients.
        seed: of the chance that a forward draws.
        double: compute in double precision, if the model runs in it.

    Attributes:
        target: name -> tensor of the copy, to be written to.
        variables: name -> what is derived by.
        kind: the precision.

    Raises:
        InputError: batches that cannot be walked again.
    """

    def __init__(self, model: torch.nn.Module, batches: Any, loss: Any, names: Sequence[str] | None = None, *, seed: int = 0, double: bool = True) -> None:
        walked.check(batches)
        self.given, self.loss, self.measure, self.seed = batches, loss, walked.loss_of(loss), seed
        self.device = walked.device_of(model)
        self.held: list[Any] | None = None
        if names is None:
            names = [name for name, tensor in model.named_parameters() if tensor.requires_grad and _real(tensor)]
        if not names:
            raise InputError(f"{type(model).__name__} has no parameters that require gradients: there is nothing to derive by")
        self.names = tuple(names)
        self.kind = next((tensor.dtype for name, tensor in own_state(model).items() if name in set(names)), torch.float32)
        self._take(scratch(model))
        if double and self.kind != torch.float64 and self.device.type != "mps" and self._runs_double(model):
            self.kind = torch.float64
            self._take(copy_model(model, (), convert=doubled)[0])

    def _take(self, model: torch.nn.Module) -> None:
        """Set up a copy of the model."""
        self.model = model.eval()
        self.target = own_state(self.model)
        parameters = dict(self.model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self.variables: dict[str, Tensor] = {}
        self.buffers: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []  # where, its key, the buffer, and what is derived by
        for name in self.names:
            self.variables[name] = parameters[name].requires_grad_() if name in parameters else self.target[name].detach().requires_grad_()
        leaves = {id(buffer): self.variables[name] for name, buffer in self.model.named_buffers() if name in self.variables}
        for module in self.model.modules():
            self.buffers += [(module._buffers, key, held, leaves[id(held)]) for key, held in module._buffers.items() if held is not None and id(held) in leaves]

    def _runs_double(self, model: torch.nn.Module) -> bool:
        try:
            copied, _, _ = copy_model(model, (), convert=doubled)
            batch = walked.mapped(walked.to_device(walked.first(self.given), self.device), _doubled)
            with random_state(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                args, kwargs = walked.inputs_of(copied, batch)
                self.measure(copied.eval()(*args, **kwargs), batch)
        except InputError:
            raise
        except Exception:  # parts that are written for one precision
            return False
        return True

    def write(self, numbers: Numbers) -> None:
        """Write numbers into the copy; what is not named stays."""
        with torch.no_grad():
            for name, tensor in numbers.items():
                self.target[name].copy_(tensor)

    # walking ------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Any]:
        if self.held is not None:
            yield from self.held
            return
        for shard in shards({"train": self.given}, self.device):
            if shard.last and not shard.number:
                self.held = shard.batches
            yield from shard.batches

    def _losses(self, *, few: bool = False) -> Iterator[tuple[int, Tensor]]:
        """What each batch weighs, and its loss with a graph; of the first one alone, if a few are enough."""
        derived = False
        for number, batch in enumerate(self._batches()):
            batch = walked.mapped(batch, _doubled) if self.kind == torch.float64 else batch
            torch.default_generator.manual_seed(self.seed + number)
            if self.device.type == "cuda":
                torch.cuda.default_generators[self.device.index or 0].manual_seed(self.seed + number)
            args, kwargs = walked.inputs_of(self.model, batch)
            with self._moving_buffers(), walked.running(self.model, batch):
                output = self.model(*args, **kwargs)
            value = self.measure(output, batch)
            weight = walked.weight_of(self.loss, batch, output)
            if weight:
                derived |= value.requires_grad
                yield weight, value.reshape(())
            if few and derived:
                return
        if not derived:
            raise InputError(f"the loss of {type(self.model).__name__} has no gradient: its forward or the loss runs without gradients "
                             "(torch.no_grad, .detach(), .item(), .numpy()), or does not use the parameters")

    @contextmanager
    def _moving_buffers(self) -> Iterator[None]:
        """A forward sees what buffers are derived by as plain tensors, which it may write to."""
        for where, key, _, leaf in self.buffers:
            where[key] = leaf.clone()
        try:
            with _Written() if self.buffers else ExitStack():
                yield
        finally:
            for where, key, held, _ in self.buffers:
                where[key] = held

    # derivatives --------------------------------------------------------------------------------------

    def along(self, directions: Sequence[Numbers], *, second: bool = True, few: bool = False) -> tuple[float, Floats, Floats | None]:
        """The mean loss, its slope along each direction, and its curvature along each two.

        Args:
            directions: may lack names.
            second: with curvature.
            few: of one batch alone.

        Returns:
            loss; float64 (directions,); float64 (directions, directions) or None.

        Raises:
            NoSecondDerivativeError: with ``second``, if the model has none.
        """
        n, weights, total = len(directions), 0, 0.0
        slopes, curvature = np.zeros(n), np.zeros((n, n))
        with derivable():
            for weight, value in self._losses(few=few):
                gradient = self._gradient(value, graph=second)
                ones = [_dot(gradient, direction) for direction in directions]
                weights, total = weights + weight, total + weight * float(value.detach())
                slopes += weight * np.array([float(one.detach()) for one in ones])
                for at, one in enumerate(ones if second else ()):
                    row = self._second(one, last=at == n - 1)
                    curvature[at] += weight * np.array([float(_dot(row, direction)) for direction in directions])
        weights = max(weights, 1)
        return total / weights, slopes / weights, (curvature + curvature.T) / (2 * weights) if second else None

    def is_right(self, direction: Numbers) -> bool:
        """Whether curvature along a direction is what slopes say on one batch: a function may hide that it was derived once.

        Slopes are those a tiny step to both sides, between which there is hardly a kink; or longer ones, where parts of the model
        round to single precision (logits that are cast for the loss). Only double precision can tell.
        """
        if self.kind != torch.float64:
            return True
        here = {name: self.target[name].clone() for name in direction}
        _, slope, found = self.along([direction], few=True)
        assert found is not None
        for length in (STEP, 100 * STEP, 1e4 * STEP):
            sides = []
            try:
                for step in (length, -length):
                    self.write({name: tensor + step * direction[name] for name, tensor in here.items()})
                    sides.append(self.along([direction], second=False, few=True)[1][0])
            finally:
                self.write(here)
            other = (sides[0] - sides[1]) / (2 * length)
            if bool(abs(other - found[0, 0]) <= 1e-3 * max(abs(other), abs(found[0, 0])) + 1e-6 * abs(slope[0]) + 1e-9):
                return True
        return False

    def gradient(self) -> tuple[float, dict[str, Tensor]]:
        """The mean loss and its gradient."""
        weights, total, found = 0, 0.0, {name: torch.zeros_like(tensor) for name, tensor in self.variables.items()}
        with derivable():
            for weight, value in self._losses():
                weights, total = weights + weight, total + weight * float(value.detach())
                for name, tensor in self._gradient(value, graph=False).items():
                    found[name].add_(tensor, alpha=weight)
        return total / max(weights, 1), {name: tensor / max(weights, 1) for name, tensor in found.items()}

    def times_hessian(self, vector: Numbers) -> dict[str, Tensor]:
        """The Hessian of the mean loss times a vector.

        Raises:
            NoSecondDerivativeError: the model has none.
        """
        weights, found = 0, {name: torch.zeros_like(tensor) for name, tensor in self.variables.items()}
        with derivable():
            for weight, value in self._losses():
                weights += weight
                for name, tensor in self._second(_dot(self._gradient(value, graph=True), vector), last=True).items():
                    found[name].add_(tensor, alpha=weight)
        return {name: tensor / max(weights, 1) for name, tensor in found.items()}

    def _gradient(self, value: Tensor, *, graph: bool) -> dict[str, Tensor]:
        if not value.requires_grad:
            return {}
        found = torch.autograd.grad(value, list(self.variables.values()), create_graph=graph, allow_unused=True)
        return {name: tensor for name, tensor in zip(self.variables, found, strict=True) if tensor is not None}

    def _second(self, slope: Tensor, *, last: bool) -> dict[str, Tensor]:
        if not slope.requires_grad:  # the loss is linear here
            return {}
        try:
            found = torch.autograd.grad(slope, list(self.variables.values()), retain_graph=not last, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NoSecondDerivativeError(f"{type(self.model).__name__} cannot be derived twice: {error}") from error
        return {name: tensor for name, tensor in zip(self.variables, found, strict=True) if tensor is not None}


def _dot(one: Numbers, other: Numbers) -> Tensor:
    """Inner product over the names that both have."""
    terms = [(one[name].conj() * other[name]).sum().real for name in one if name in other]
    return torch.stack(terms).sum() if terms else torch.zeros((), device="cpu")


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.to(torch.complex128) if tensor.is_complex() else tensor


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def derivable() -> Iterator[None]:
    """Gradients are on, kernels are those that have second derivatives, and random state is put back."""
    with random_state(), torch.enable_grad(), torch.compiler.set_stance("force_eager"), \
            sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


class _Written(TorchFunctionMode):
    """While active, norms with running statistics are computed from their formula: torch's kernel has no gradient by these."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        written = isinstance(func, FunctionType) and func.__name__ == "batch_norm"  # by name: F.batch_norm may be wrapped
        if written and not given.get("training", args[5] if len(args) > 5 else False):
            return _normed(*args, **given)
        return func(*args, **given)


def _normed(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:
    shape = [1, -1, *[1] * (x.ndim - 2)]
    found = (x - running_mean.reshape(shape)) * (running_var + eps).rsqrt().reshape(shape)
    found = found if weight is None else found * weight.reshape(shape)
    return found if bias is None else found + bias.reshape(shape)
