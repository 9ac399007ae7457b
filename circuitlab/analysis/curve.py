"""A curve of low loss between two models, found by training its bends (Garipov et al., *Loss surfaces, mode connectivity*, 2018).

θ(t) is a weighted sum of the two models and of the bends between them: Bernstein polynomials are the weights of a Bezier curve,
hats those of a polygon. The bends are trained on the loss at a random t for each batch; since θ(t) is linear in them, their
gradient is the model's own, times their weight, so any model will do as it is.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.analysis.correction import Reset, _norms
from circuitlab.analysis.landscape import Path
from circuitlab.analysis.results import Result
from circuitlab.analysis.states import Combination, State, own_state, scratch, single, state_of
from circuitlab.analysis.sweep import Sweep, Sweeper
from circuitlab.errors import InputError
from circuitlab.trace.guard import random_state

Floats = NDArray[np.float64]
KINDS = ("bezier", "polygon")


@dataclass(frozen=True, eq=False)
class Curve(Result):
    """A trained curve from a model A (t=0) to a model B (t=1), and the straight line beside it.

    Attributes:
        path: losses along the curve; its alphas are t. straight: those along the straight line, corrected alike.
        kind: "bezier" or "polygon".
        bends: the numbers of each bend, by the names of parameters and buffers.
        training: float64 (steps,), the loss at each step of training.
    """

    path: Path
    straight: Path
    kind: str
    bends: tuple[dict[str, torch.Tensor], ...]
    training: Floats
    _source: Any = field(default=None, init=False, repr=False)

    @property
    def loss(self) -> Floats:
        """The loss along the curve on the batches, float64 (points,)."""
        return self.path.loss

    def weights(self, t: float) -> Floats:
        """What A, the bends and B weigh at a point, float64 (2 + bends,)."""
        return weights(self.kind, len(self.bends), t)

    def barrier(self, kind: str = "chord", **options: Any) -> float:
        """The barrier on the curve. See `circuitlab.analysis.landscape.Path.barrier`; that of the line is ``straight.barrier``."""
        return self.path.barrier(kind, **options)

    def at(self, t: float, models: Sequence[torch.nn.Module] | None = None, batches: Any = None) -> torch.nn.Module:
        """The model at a point of the curve: a copy in A's mode, with statistics of BatchNorm of its own.

        Args:
            t: from 0, where it is A, to 1, where it is B.
            models: A and B; only a curve that was loaded from a file needs them.
            batches: to find the statistics of BatchNorm on; only a curve that was loaded needs them.

        Raises:
            InputError: a curve that was loaded, without models; t outside of 0 to 1.
        """
        if models is None and self._source is None:
            raise InputError(f"a curve that was loaded from a file has no models: give them, curve.at({t}, [a, b], batches)")
        a, b, given = (*models, batches) if models is not None else self._source
        family = _family(a, b, self.bends)
        made = scratch(a)
        row = self.weights(t).tolist()
        family.write(own_state(made), row)
        if self.path.correct is not None:
            if given is None:
                raise InputError(f"{type(a).__name__} has BatchNorm, whose statistics are found on batches: give curve.at({t}, [a, b], batches)")
            with random_state(), torch.compiler.set_stance("force_eager"):
                _Statistics(a, family).at(made, row, given)
        return made

    def to_frame(self) -> Any:
        """The losses on the curve, and on the straight line by names that start with straight, as a pandas DataFrame."""
        frame = self.path.to_frame().rename(columns={"alpha": "t"})
        other = self.straight.to_frame().drop(columns="alpha").add_prefix("straight_")
        return frame.join(other)

    def plot(self, **options: Any) -> Any:
        """Curve and straight line as a plotly Figure. See `circuitlab.plots.curve`."""
        return importlib.import_module("circuitlab.plots").curve(self, **options)

    def __repr__(self) -> str:
        try:
            told = ", ".join(f"{on} barrier {self.path.barrier(on=on):.4g} (straight {self.straight.barrier(on=on):.4g})" for on in self.path.sets)
        except InputError:
            told = "without both ends"
        extra = f", corrected by {self.path.correct}" if self.path.correct else ""
        return f"Curve({self.kind} of {len(self.bends)} bends, {len(self.training)} steps{extra}: {told})"


def curve(
    a: torch.nn.Module, b: torch.nn.Module, batches: Any, loss: Any = None, kind: str = "bezier", bends: int = 1, *,
    steps: int = 1000, lr: float = 3e-3, seed: int = 0, points: int = 25, correct: str | None = None, metrics: Any = None,
    test: Any = None, executor: Executor | None = None, seen: Callable[[int, float], None] | None = None, progress: bool = True,
) -> Curve:
    """Train a curve of low loss between two models.

    Args:
        a, b: of one architecture; the ends, which stay as they are. Parameters of a that require no gradient are not trained: in
            the bends they are those of the straight line.
        batches: what can be walked again: training data, as small batches as one trains on. They are taken in random order.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        kind: "bezier", or "polygon", of straight lines between the bends.
        bends: how many models there are between both ends.
        steps: of training, one batch at one random t each. lr: the learning rate of Adam at the start; it goes to 0 as a cosine.
        seed: of the order of batches, of t, and of dropout.
        points: how many are evaluated, evenly from t = 0 to 1, in eval mode.
        correct: None or "batchnorm": where there is BatchNorm, its statistics are found anew at every point between the ends, on the
            curve as on the straight line, as a bend has none.
        metrics: "accuracy", functions of (output, batch), or a dict of these by name.
        test: a second set of batches.
        executor: any `concurrent.futures.Executor` to evaluate on.
        seen: is called with the number and the loss of each step of training.
        progress: show a progress bar.

    Raises:
        InputError: models that differ in architecture, an unknown kind, numbers out of range, batches that are empty, or training
            that does not stay finite.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is not among {KINDS}")
    for name, value, least in (("bends", bends, 1), ("steps", steps, 1), ("points", points, 2)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r}: give a whole number of at least {least}")
    if not (math.isfinite(lr) and lr > 0):
        raise InputError(f"lr={lr!r} must be above 0")
    if correct not in (None, "batchnorm"):
        raise InputError(f"correct={correct!r}: along a curve it is 'batchnorm' or None")
    walked.check(batches)
    family = Combination.of([a, b], names=["a", "b"])
    made = tuple(_between(family, own_state(a), (at + 1) / (bends + 1)) for at in range(bends))
    training = _train(a, b, made, kind, batches, loss, (steps, lr, seed), seen, progress)
    whole = _family(a, b, made)
    corrected = _Statistics(a, whole) if correct or _norms(a) else None
    data = {"train": batches} if test is None else {"train": batches, "test": test}
    sweeper = Sweeper(a, whole, data, loss, metrics, prepare=corrected, executor=executor, seed=seed)
    t = np.linspace(0, 1, points)
    line = np.zeros((points, bends + 2))
    line[:, 0], line[:, -1] = 1 - t, t
    rows = [weights(kind, bends, float(at)) for at in t]
    told = None if corrected is None else "batchnorm"
    on, beside = (_path(sweeper.run(part, progress=progress, what=what), t, told) for part, what in ((rows, "curve"), (line, "straight line")))
    found = Curve(on, beside, kind, made, training)
    object.__setattr__(found, "_source", (a, b, batches))
    return found


def weights(kind: str, bends: int, t: float) -> Floats:
    """What the ends and the bends of a curve weigh at a point.

    Raises:
        InputError: t outside of 0 to 1.
    """
    if not 0 <= t <= 1:
        raise InputError(f"t={t}: a curve goes from 0 to 1")
    n = bends + 1
    if kind == "polygon":
        return np.maximum(0.0, 1 - np.abs(t * n - np.arange(n + 1)))
    return np.array([math.comb(n, k) * t**k * (1 - t) ** (n - k) for k in range(n + 1)])


class _Statistics(Reset):
    """Resets statistics of BatchNorm everywhere but at the ends: a bend has none of its own."""

    def is_end(self, weights: Sequence[float]) -> bool:
        return weights[0] == 1 or weights[-1] == 1


def _path(found: Sweep, t: Floats, correct: str | None) -> Path:
    return Path(t[found.done], found.sets, found.names, found.values[:, found.done], correct, None, found.complete)


def _between(family: Combination, like: State, share: float) -> dict[str, torch.Tensor]:
    """A point of the straight line, in tensors of its own."""
    made = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    family.write(made, [1 - share, share])
    return made


def _family(a: torch.nn.Module, b: torch.nn.Module, bends: Sequence[State]) -> Combination:
    names = own_state(a)
    first, last = state_of(a), state_of(b)
    return Combination([{name: first[name] for name in names}, *bends, {name: last[name] for name in names}])


def _train(
    a: torch.nn.Module, b: torch.nn.Module, bends: Sequence[State], kind: str, batches: Any, loss: Any,
    plan: tuple[int, float, int], seen: Callable[[int, float], None] | None, progress: bool,
) -> Floats:
    """Train bends in place, on copies of the models. Gives the loss at each step."""
    from tqdm.auto import tqdm

    steps, lr, seed = plan
    measure = walked.loss_of(loss)
    copied = scratch(a).train()
    device, target = walked.device_of(copied), own_state(copied)
    wanted = {name for name, tensor in a.named_parameters() if tensor.requires_grad}
    parameters = {name: tensor for name, tensor in copied.named_parameters() if name in wanted}
    if not parameters:
        raise InputError(f"{type(a).__name__} has no parameters that require gradients: there is nothing to train in a bend")
    trained = [[single(bend[name]) for name in parameters] for bend in bends]
    family = _family(a, b, bends)
    losses: list[float] = []
    chance = np.random.default_rng(seed)
    least = 2 if _norms(copied) else 1
    with random_state(), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam([tensor for bend in trained for tensor in bend], lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = _forever(batches, chance, least)
        try:
            for step in tqdm(range(steps), desc="training the curve", disable=not progress, delay=1, leave=False):
                batch = walked.to_device(next(order), device)
                shares = weights(kind, len(bends), float(chance.random())).tolist()
                family.write(target, shares)
                args, kwargs = walked.inputs_of(copied, batch)
                with walked.running(copied, batch):
                    output = copied(*args, **kwargs)
                value = measure(output, batch)
                losses.append(float(value.detach()))
                if not math.isfinite(losses[-1]):
                    raise InputError(f"training the curve: the loss is {losses[-1]} at step {step}; try a smaller lr than {lr}")
                if not value.requires_grad:
                    raise InputError(f"the loss of {type(a).__name__} has no gradient: its forward or the loss runs without gradients")
                gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
                for bend, share in zip(trained, shares[1:-1], strict=True):
                    for tensor, gradient in zip(bend, gradients, strict=True):
                        tensor.grad = None if gradient is None else gradient.to(tensor.dtype) * share
                optimizer.step()
                schedule.step()
                for bend, moved in zip(bends, trained, strict=True):
                    for name, tensor in zip(parameters, moved, strict=True):
                        if tensor is not bend[name]:
                            bend[name].copy_(tensor)
                if seen is not None:
                    seen(step, losses[-1])
        except KeyboardInterrupt:
            warnings.warn(f"interrupted after {len(losses)} of {steps} steps: the curve is what was trained so far")
        finally:
            for tensor in (tensor for bend in trained for tensor in bend):
                tensor.grad = None
    return np.array(losses)


def _forever(batches: Any, chance: np.random.Generator, least: int) -> Iterator[Any]:
    """Batches again and again, those of a list in random order; not those with fewer examples than a norm needs."""
    while True:
        none = True
        order = [batches[at] for at in chance.permutation(len(batches))] if isinstance(batches, (list, tuple)) else batches
        for batch in order:
            if walked.examples(batch) >= least:
                none = False
                yield batch
        if none:
            raise InputError("batches is empty: there is nothing to train the curve on" if least == 1 else
                             f"no batch has {least} examples, which BatchNorm needs to train the curve on")


__all__ = ["Curve", "curve", "weights"]
