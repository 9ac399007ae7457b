"""What is measured of a model on data: a loss, and metrics beside it, each a mean over all examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis import batches as walked
from circuitlab.errors import InputError

Metric = Callable[[Any, Any], Any]
"""``metric(output, batch)`` -> mean over the batch: a scalar tensor or a number."""


class Measures:
    """A loss and metrics.

    Attributes:
        names: "loss", and those of the metrics.
    """

    def __init__(self, loss: Any, metrics: Any = None) -> None:
        self.loss, self._loss = loss, walked.loss_of(loss)
        self.metrics = _named(metrics)
        self.names: tuple[str, ...] = ("loss", *self.metrics)
        self.shifts = False

    @property
    def kinds(self) -> str:
        """What is measured, to be compared: names of functions."""
        told = [self.loss, *self.metrics.values()]
        return ", ".join(str(given) if given is None or isinstance(given, str) else getattr(given, "__qualname__", type(given).__name__)
                         for given in told)

    def needs_output(self, batch: Any) -> bool:
        """Whether it takes an output to know what a mean is over."""
        target = walked.target_of(batch)
        return self.loss is None and isinstance(target, torch.Tensor) and target.ndim == 2 and not target.is_floating_point()

    def look(self, output: Any, batch: Any) -> None:
        """Learn from an output whether the model's own loss compares each position with the next target."""
        self.shifts = walked.shifted(output, walked.target_of(batch))

    def weights(self, batch: Any) -> list[int]:
        """What each batch mean weighs: the number of examples, or of targets."""
        found = [walked.weight_of(self.loss, batch, shifts=self.shifts)]
        for metric in self.metrics.values():
            found.append(_targets(batch, self.shifts) if metric == "accuracy" else walked.examples(batch))
        return found

    def __call__(self, output: Any, batch: Any) -> list[torch.Tensor]:
        """The batch's mean of each, as scalars on the device of the output."""
        found = [_scalar(self._loss(output, batch), "loss")]
        for name, metric in self.metrics.items():
            value = accuracy(output, batch, shifts=self.shifts) if isinstance(metric, str) else metric(output, batch)
            found.append(_scalar(value, f"metric {name!r}", found[0].device))
        return found


def _named(metrics: Any) -> dict[str, Any]:
    """Metrics by name, each "accuracy" or a function."""
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        named = {str(name): given for name, given in cast("Mapping[Any, Any]", metrics).items()}
    else:
        listed: list[Any] = [metrics] if isinstance(metrics, str) or callable(metrics) else list(cast("Sequence[Any]", metrics))
        named = {given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__): given for given in listed}
        if len(named) < len(listed):
            raise InputError("metrics has two of one name; give a dict: {'name': function}")
    for name, given in named.items():
        if name == "loss" or not (callable(given) or given == "accuracy"):
            raise InputError(f"metrics: {name!r} is {given!r}; give 'accuracy' or functions of (output, batch), under names other than 'loss'")
    return named


def _scalar(value: Any, what: str, device: torch.device | None = None) -> torch.Tensor:
    try:
        found = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"the {what} gives a {type(value).__name__}; give the mean over the batch, a scalar") from None
    if found.numel() != 1:
        raise InputError(f"the {what} gives a tensor of shape {list(found.shape)}; give the mean over the batch, a scalar")
    found = found.detach() if found.requires_grad else found
    return found.reshape(()) if found.ndim else found


def accuracy(output: Any, batch: Any, *, shifts: bool = False) -> torch.Tensor:
    """Share of the targets that have the largest output; targets of -100 are left out.

    Args:
        output: logits: (batch, class), (batch, class, ...) or (batch, ..., class).
        batch: with a target of class indices, or of class probabilities.
        shifts: each position is compared with the next target, as in a language model.

    Raises:
        InputError: no target, or shapes that do not fit.
    """
    logits, target = walked.first_tensor(output), walked.target_of(batch)
    if not isinstance(target, torch.Tensor):
        raise InputError(f"accuracy needs a target: the last of a tuple (inputs ..., target), or 'labels' of a dict; this batch is a {type(batch).__name__}")
    if shifts:
        logits, target = logits[:, :-1], target[:, 1:]
    if target.shape == logits.shape and target.is_floating_point() and logits.ndim > 1:
        target = target.argmax(1)
    if target.shape == logits.shape[:-1]:
        found = logits.argmax(-1)
    elif target.shape == logits.shape[:1] + logits.shape[2:] and logits.ndim > 1:
        found = logits.argmax(1)
    else:
        raise InputError(f"accuracy: outputs of shape {tuple(logits.shape)} and targets of shape {tuple(target.shape)} do not fit")
    counts = target != -100
    exact = torch.float32 if target.device.type == "mps" else torch.float64
    return ((found == target) & counts).sum().to(exact) / counts.sum().to(exact)


def _targets(batch: Any, shifts: bool) -> int:
    target = walked.target_of(batch)
    if not isinstance(target, torch.Tensor):
        return walked.examples(batch)
    if target.is_floating_point():
        return walked.examples(batch)
    return int(((target[:, 1:] if shifts else target) != -100).sum())


def picked(values: NDArray[np.float64], sets: Sequence[str], names: Sequence[str], name: str, on: str | None) -> NDArray[np.float64]:
    """A quantity on a set of data (the first, if none is named) of values (sets, ..., quantities).

    Raises:
        InputError: that was not measured.
    """
    on = sets[0] if on is None else on
    if name not in names or on not in sets:
        raise InputError(f"{name!r} on {on!r} was not measured; measured are {', '.join(names)} on {', '.join(sets)}"
                         + ("; give test= for a second set" if on == "test" else ""))
    return values[sets.index(on)][..., names.index(name)]
