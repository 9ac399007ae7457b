"""Matching by gradients: soft permutations by Sinkhorn's algorithm, and hard ones with straight-through gradients.

Both aim at the loss of the model half-way between A and B permuted; what they keep is the best permutation that they met,
the match of the weights that they start from included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.alignment import Alignment, Element, assigned, taken
from circuitlab.analysis.alignment_arrays import State, axes_of, outer_first, pieces, terms, wired
from circuitlab.analysis.states import single
from circuitlab.analysis.symmetry import Symmetry
from circuitlab.errors import InputError

Found = tuple[float, Element, tuple[tuple[float, ...], ...]]

CHECKS = 10
"""How often soft permutations are rounded to see whether that is the best up to now."""
SEEN = 8
"""Batches that the loss half-way is judged by."""
ITERATIONS = 100
"""Of Sinkhorn's algorithm, at most."""


@dataclass(frozen=True)
class Options:
    """What the user asked for, see `circuitlab.analysis.matching.match`."""

    batches: Any
    loss: Any
    steps: int | None
    rate: float | None
    progress: bool


def sinkhorn(symmetry: Symmetry, made: Alignment, state: State, model: torch.nn.Module, options: Options) -> Found:
    """Descend over soft permutations by Adam: for the distance to A, or with batches for the loss half-way.

    For the loss it goes on from the match of the weights. That is where a descent of the distance ends, so for the distance it
    starts from the mean of all permutations.
    """
    steps, rate = options.steps or 200, options.rate or 0.1
    start = made.best([None, {}], None)[1]
    logits = {name: _sharp(index, state, 0.0 if options.batches is None else 1.0) for name, index in start.items()}
    optimiser = torch.optim.Adam(logits.values(), lr=rate)
    with walked.evaluated(model) as copied:
        half = _Half(copied, options) if options.batches is not None else None

        def judge(element: Element) -> float:
            made.reset(element)
            return made.distance() if half is None else half.seen(_middle(state, _hard(symmetry, state, element)))

        best, history = (judge(start), start), list[float]()
        history.append(best[0])
        for step in _steps(steps, "sinkhorn", options.progress):
            with torch.enable_grad():
                soft = {name: Sinkhorn.apply(values) for name, values in logits.items()}
                if half is None:
                    # for permutations that is the distance, up to a constant; blurring B does not make it smaller
                    loss = -sum((term.a * _softened(b, term.axes, soft, symmetry.within)).sum()
                                for term, b in zip(made.terms, made.start, strict=True))
                else:
                    loss = half.next(_middle(state, _changed(symmetry, state, lambda b, axes: _softened(b, axes, soft, symmetry.within))))
                _give(logits, loss)
            optimiser.step()
            if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
                element = {name: _rounded(values) for name, values in logits.items()}
                history.append(judge(element))
                if history[-1] < best[0]:
                    best = history[-1], element
    return _kept(best, history)


def straight_through(symmetry: Symmetry, made: Alignment, state: State, model: torch.nn.Module, options: Options) -> Found:
    """Move a copy of A down the gradient of the loss half-way to B, permuted to be nearest to that copy."""
    steps, rate = options.steps or 100, options.rate or 0.01
    element = made.best([None, {}], None)[1]
    latent = {name: single(a).detach().clone().requires_grad_() for name, (a, _) in state.items()}
    groups = [{"params": [values], "lr": rate * float(values.detach().abs().square().mean().sqrt())} for values in latent.values()]
    optimiser = torch.optim.Adam(groups, lr=rate)
    with walked.evaluated(model) as copied:
        half = _Half(copied, options)
        best, history = (half.seen(_middle(state, _hard(symmetry, state, element))), element), list[float]()
        history.append(best[0])
        for step in _steps(steps, "straight-through", options.progress):
            near = Alignment(terms(symmetry, {name: (latent[name].detach(), b) for name, (_, b) in state.items()}), *wired(symmetry))
            near.reset(element)
            *_, _ = near.descend(None)
            moved = any(not torch.equal(near.element[name], element[name]) for name in element)
            element = near.element
            permuted = {name: values.detach().requires_grad_(values.is_floating_point()) for name, values in _hard(symmetry, state, element).items()}
            with torch.enable_grad():
                _give(latent, half.next(_middle(state, permuted)), permuted)
            optimiser.step()
            if moved or step + 1 == steps:
                history.append(half.seen(_middle(state, permuted)))
                if history[-1] < best[0]:
                    best = history[-1], element
    return _kept(best, history)


def _give(leaves: Mapping[str, torch.Tensor], loss: Any, of: Mapping[str, torch.Tensor] | None = None) -> None:
    """Gradients for an optimiser, of a loss for tensors of the same names; no others are touched, as ``backward`` would."""
    if not math.isfinite(float(loss.detach())):
        raise InputError(f"the loss half-way between the models is {float(loss.detach())}, which has no gradient: try a smaller rate, or "
                         "method='weights'")
    wanted = {name: values for name, values in (of or leaves).items() if values.requires_grad}
    try:
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"the loss has no gradient for the model's parameters ({error}); method='weights' and 'activations' need none") from error
    for name, grad in zip(wanted, grads, strict=True):
        leaves[name].grad = None if grad is None else grad.to(leaves[name].dtype)


def _kept(best: tuple[float, Element], history: list[float]) -> Found:
    """What is returned; the history ends with the best."""
    return best[0], best[1], ((*history, best[0]) if history[-1] != best[0] else tuple(history),)


def _steps(steps: int, what: str, progress: bool) -> Iterator[int]:
    from tqdm.auto import tqdm

    yield from tqdm(range(steps), desc=what, disable=not progress, delay=1, leave=False)


# half-way ---------------------------------------------------------------------------------------------


class _Half:
    """The loss of a model with other parameters. Batch norms take the statistics of the batch.

    Half-way between two models, those that were averaged fit neither (Jordan et al., *REPAIR*, 2023).
    """

    def __init__(self, model: torch.nn.Module, options: Options) -> None:
        self.model, self.loss, self.name = model, walked.loss_of(options.loss), options.loss
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.train()
        self.device = walked.device_of(model)
        self.least = 2 if any(module.training for module in model.modules()) else 1  # of one example there is no variance
        self.batches = options.batches
        self.again = self._walk()
        self.first = [walked.to_device(batch, self.device) for batch in itertools.islice(self._walk(), SEEN)]
        if not self.first:
            raise InputError("batches is empty: there is nothing to run the model on" if self.least == 1 else
                             "no batch has 2 examples, which BatchNorm needs half-way between the models; give larger batches")

    def _walk(self) -> Iterator[Any]:
        return (batch for batch in self.batches if walked.examples(batch) >= self.least)

    def at(self, state: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
        """The loss on one batch."""
        args, kwargs = walked.inputs_of(self.model, batch)
        buffers = {name: state.get(name, buffer).detach().clone() for name, buffer in self.model.named_buffers()}
        with walked.running(self.model, batch):
            output = torch.func.functional_call(self.model, {**state, **buffers}, args, kwargs)
        return self.loss(output, batch)

    def next(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss on the next batch, from the first again after the last."""
        batch = next(self.again, None)
        if batch is None:
            self.again = self._walk()
            batch = next(self.again)
        return self.at(state, walked.to_device(batch, self.device))

    def seen(self, state: Mapping[str, torch.Tensor]) -> float:
        """The mean loss over the first batches."""
        total = weight = 0.0
        with torch.no_grad():
            for batch in self.first:
                n = walked.weight_of(self.name, batch) if self.name is not None else walked.examples(batch)
                total += float(self.at(state, batch)) * n
                weight += n
        return total / max(weight, 1)


def _middle(state: State, other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (a + other[name].to(a.dtype)) / 2 for name, (a, _) in state.items()}


def _changed(symmetry: Symmetry, state: State, change: Any) -> dict[str, torch.Tensor]:
    """B's parameters and buffers with a function of (array, its wires) applied to each plain part."""
    found: dict[str, torch.Tensor] = {}
    for name, (_, b) in state.items():
        found[name] = b
        if name in symmetry.actions:
            made = b.clone()
            for cut, names in pieces(symmetry.circuit, symmetry.circuit.tensor(name)):
                axes = axes_of(symmetry, names)
                if any(axes):
                    part = b[cut].reshape([symmetry.circuit.wires[wire].size for wire in names])
                    made[cut] = change(part, axes).reshape(b[cut].shape).to(b.dtype)
            found[name] = made
    return found


def _hard(symmetry: Symmetry, state: State, element: Element) -> dict[str, torch.Tensor]:
    def change(part: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
        for n in outer_first(axes, symmetry.within):
            part = taken(part, axes, n, element[axes[n]], symmetry.within[axes[n]])
        return part

    return _changed(symmetry, state, change)


# soft permutations ------------------------------------------------------------------------------------


class Sinkhorn(torch.autograd.Function):
    """Doubly stochastic matrices from logits, with the gradient of the fixed point.

    The matrix is exp(logits) scaled by rows and columns until both sum to 1. Its gradient is found without going back through
    the iterations: with G the gradient for P, that for the logits is P∘(G − u1ᵀ − 1vᵀ), where u and v make its rows and columns
    sum to 0 (Luise et al., 2018; Eisenberger et al., *A Unified Framework for Implicit Sinkhorn Differentiation*, 2022).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits (..., n, n) -> matrices (..., n, n)."""
        scaled = logits
        for _ in range(ITERATIONS):
            scaled = scaled - scaled.logsumexp(-1, keepdim=True)
            columns = scaled.logsumexp(-2, keepdim=True)
            scaled = scaled - columns
            if float(columns.abs().max()) < 1e-6:
                break
        matrix = scaled.exp()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient for the logits."""
        (p,) = ctx.saved_tensors
        n = p.shape[-1]
        weighed = p * grad
        by_row, by_column = weighed.sum(-1, keepdim=True), weighed.sum(-2).unsqueeze(-1)
        system = torch.eye(n, dtype=p.dtype, device=p.device) * (1 + 1e-6) - p.mT @ p + 1 / n
        v = torch.linalg.solve(system, by_column - p.mT @ by_row)
        return p * (grad - (by_row - p @ v) - v.mT)


def _sharp(index: torch.Tensor, state: State, sharpness: float) -> torch.Tensor:
    """Logits of a soft permutation that at sharpness 1 puts four fifths on a hard one, at 0 the same on all."""
    device = next(iter(state.values()))[0].device
    n = index.shape[-1]
    one_hot = torch.nn.functional.one_hot(index, n).to(device, torch.float32 if device.type == "mps" else torch.float64)
    return (one_hot * (sharpness * math.log(4 * max(n - 1, 1)))).requires_grad_()


def _rounded(logits: torch.Tensor) -> torch.Tensor:
    """The hard permutation that is nearest to a soft one."""
    scores = logits.detach().cpu().double().numpy()
    return torch.from_numpy(assigned(scores.reshape(-1, *scores.shape[-2:]))).reshape(scores.shape[:-1])


def _softened(
    values: torch.Tensor, axes: tuple[str, ...], soft: Mapping[str, torch.Tensor], within: Mapping[str, tuple[str, ...]]
) -> torch.Tensor:
    """An array with soft permutations applied to its wires; within others, by the new index of those."""
    for n in outer_first(axes, within):
        around = [axes.index(other) for other in within[axes[n]]]
        rest = [m for m in range(values.ndim) if m != n and m not in around]
        order = [*around, *rest, n]
        turned = values.permute(order)
        flat = turned.reshape(*turned.shape[: len(around)], -1, turned.shape[-1])
        mixed = (flat @ soft[axes[n]].to(values.dtype).mT).reshape(turned.shape)
        values = mixed.permute([order.index(m) for m in range(values.ndim)])
    return values
