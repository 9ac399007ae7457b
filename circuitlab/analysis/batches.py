"""Batches as users have them, walked again and again, and losses as means over all examples.

A batch is a tuple (inputs ..., target), a dict of what ``forward`` takes by name, or a tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F

from circuitlab.errors import CircuitlabError, InputError
from circuitlab.trace.events import tensors_in
from circuitlab.trace.guard import copy_model, random_state

Loss = Callable[[Any, Any], torch.Tensor]
"""``loss(output, batch)`` -> mean over the batch, a scalar."""


def check(batches: Any) -> None:
    """An `InputError` if batches cannot be walked, or only once."""
    if isinstance(batches, (torch.Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches must be something that yields batches, such as a list or a DataLoader, and is a {type(batches).__name__}; "
            "put a single batch into a list: [batch]"
        )
    if isinstance(batches, Iterator):
        raise InputError(
            f"batches is a {type(batches).__name__}, which can be walked only once; give a list of batches, or a DataLoader"
        )


def first(batches: Any) -> Any:
    """The first batch. A DataLoader draws a seed to give it: random state is put back.

    Raises:
        InputError: there are none, or they cannot be walked again.
    """
    check(batches)
    with random_state():
        for batch in batches:
            return batch
    raise InputError("batches is empty: there is nothing to run the model on")


def walk(batches: Any, device: torch.device, *, what: str, progress: bool, skip: int = 0) -> Iterator[tuple[int, Any]]:
    """Number and batch, on the device, with a progress bar.

    Raises:
        InputError: there are no batches.
    """
    from tqdm.auto import tqdm

    total = len(batches) if hasattr(batches, "__len__") else None
    none = True
    with tqdm(total=total, desc=what, disable=not progress, delay=1, leave=False) as bar:
        for number, batch in enumerate(batches):
            none = False
            if number >= skip:
                yield number, to_device(batch, device)
            bar.update()
    if none:
        raise InputError("batches is empty: there is nothing to run the model on")


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    return mapped(value, lambda tensor: tensor.to(device, non_blocking=True))


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A batch with each of its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        made = [mapped(item, change) for item in cast("list[Any]", value)]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


def inputs_of(model: torch.nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch ``forward`` takes: without the target of a tuple, and without what it has no name for of a dict."""
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        takes = inspect.signature(model.forward).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            return (), dict(named)
        return (), {key: value for key, value in named.items() if key in takes}
    if isinstance(batch, (list, tuple)):
        items = tuple(cast("list[Any]", batch))
        return (items[:-1] if len(items) > 1 else items), {}
    return (batch,), {}


@contextmanager
def running(model: torch.nn.Module, batch: Any) -> Iterator[None]:
    """While active, a model runs on a batch: what it raises then is an `InputError` that tells what it was given."""
    try:
        yield
    except (CircuitlabError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        given = ", ".join(f"{path or 'a tensor'} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for path, t in tensors_in(batch, torch.Tensor))
        raise InputError(f"{type(model).__name__} does not run on a batch: {type(error).__name__}: {error}\nthe batch is a {type(batch).__name__} "
                         f"of {given or 'no tensors'}; it must be (inputs ..., target), a dict of what forward takes, or a tensor") from error


def target_of(batch: Any) -> Any:
    """The target of a batch: the last of a tuple, or what a dict has as labels, label, target or y."""
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        return next((named[key] for key in ("labels", "label", "target", "targets", "y") if key in named), None)
    return batch[-1] if isinstance(batch, (list, tuple)) and len(cast("list[Any]", batch)) > 1 else None


def examples(batch: Any) -> int:
    """Number of examples of a batch: the first size of its first tensor with an axis."""
    return next((tensor.shape[0] for _, tensor in tensors_in(batch, torch.Tensor) if tensor.ndim), 1)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model is."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluated(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A copy of a model in eval mode, which shares its parameters: whatever its runs write, they write to the copy.

    Random state is put back, and code that torch.compile would compile runs eagerly.
    """
    copied, _, _ = copy_model(model, ())
    with random_state(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield copied.eval()


# losses -----------------------------------------------------------------------------------------------


def loss_of(loss: Any) -> Loss:
    """A loss by name, or as given; None takes what the model's output has as ``loss``.

    Raises:
        InputError: an unknown name.
    """
    if loss is None:
        return _own_loss
    if callable(loss):
        return cast("Loss", loss)
    if loss not in _LOSSES:
        raise InputError(f"loss={loss!r} is not known; give 'cross_entropy', 'mse', or a function of (output, batch)")
    return _LOSSES[loss]


def mean_loss(
    model: torch.nn.Module, batches: Any, loss: Any, *, what: str, progress: bool, like: torch.nn.Module | None = None
) -> float:
    """The loss over all examples, of a model that is run as it is.

    Args:
        model: or code compiled from one.
        batches: what can be walked again.
        loss: as `loss_of` takes it.
        what: for the progress bar. progress: show it.
        like: the model whose ``forward`` tells what of a batch it takes; None for the model itself.
    """
    measure, total, weight = loss_of(loss), 0.0, 0
    for _, batch in walk(batches, device_of(model), what=what, progress=progress):
        args, kwargs = inputs_of(model if like is None else like, batch)
        with running(model, batch):
            output = model(*args, **kwargs)
        n = weight_of(loss, batch, output)
        total, weight = total + float(measure(output, batch)) * n, weight + n
    return total / max(weight, 1)


def weight_of(loss: Any, batch: Any, output: Any = None, *, shifts: bool | None = None) -> int:
    """How many terms the batch's mean is over: what it weighs in the mean over all batches.

    For a loss of one's own that is the number of examples; for cross-entropy it is the number of targets that are not
    ignored (-100), and for the loss of a language model of those that are predicted, when it shifts them itself: that is
    found from the output, where ``shifts`` does not tell.
    """
    target = target_of(batch)
    if not isinstance(target, torch.Tensor):
        return examples(batch)
    if loss == "mse":
        return target.numel()
    if loss in (None, "cross_entropy") and not target.is_floating_point():
        if shifts is None:
            shifts = loss is None and target.ndim == 2 and shifted(output, target)
        return int(((target[:, 1:] if shifts else target) != -100).sum())
    return examples(batch)


def shifted(output: Any, target: torch.Tensor) -> bool:
    """Whether a model's own loss compares each position with the next target."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != target.shape:
        return False
    moved = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten())
    return bool(torch.isclose(moved, _own_loss(output, None).float(), rtol=1e-3))


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor that a model's output is about: its logits, or the first."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    found = next((tensor for _, tensor in tensors_in(output, torch.Tensor)), None)
    if found is None:
        raise InputError(f"the model's output ({type(output).__name__}) holds no tensor to take a loss of; give loss=function")
    return found


def _target(batch: Any, name: str) -> torch.Tensor:
    target = target_of(batch)
    if not isinstance(target, torch.Tensor):
        raise InputError(
            f"loss={name!r} needs a target: the last of a tuple (inputs ..., target), or 'labels' of a dict; "
            f"this batch is a {type(batch).__name__}"
        )
    return target


def _cross_entropy(output: Any, batch: Any) -> torch.Tensor:
    logits, target = first_tensor(output), _target(batch, "cross_entropy")
    if logits.ndim == 2 and target.ndim == 1 and target.dtype == torch.int64 and logits.shape[0] == target.shape[0]:
        return F.cross_entropy(logits, target)
    if target.is_floating_point() and target.shape == logits.shape:
        return F.cross_entropy(logits, target)
    if target.shape == logits.shape[:-1]:
        return F.cross_entropy(logits.flatten(0, -2), target.flatten().long())
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        raise InputError(
            f"loss='cross_entropy': outputs of shape {tuple(logits.shape)} and targets of shape {tuple(target.shape)} do not fit"
        )
    return F.cross_entropy(logits, target.long())


def _mse(output: Any, batch: Any) -> torch.Tensor:
    found, target = first_tensor(output), _target(batch, "mse")
    if found.shape != target.shape:
        raise InputError(f"loss='mse': outputs of shape {tuple(found.shape)} and targets of shape {tuple(target.shape)} differ")
    return F.mse_loss(found, target.to(found.dtype))


def _own_loss(output: Any, batch: Any) -> torch.Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, torch.Tensor):
        raise InputError(
            f"the model's output ({type(output).__name__}) has no loss of its own: give loss='cross_entropy', 'mse' or a function "
            "of (output, batch), or labels in the batch"
        )
    return found


_LOSSES: dict[str, Loss] = {"cross_entropy": _cross_entropy, "mse": _mse}
