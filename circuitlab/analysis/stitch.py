"""Stitching: the front of one network joined to the back of another by a linear map.

If what one network computes at some layer is, up to a linear map, what another computes at one of its own, the two can be
joined there and still work (Lenc and Vedaldi, 2015; Bansal et al., *Revisiting Model Stitching*, 2021). The map is found by
least squares, without training, and what is joined is a network to be used or trained (Pan et al., *Stitchable Neural
Networks*, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from circuitlab.analysis import batches as walked
from circuitlab.analysis.places import Place, find
from circuitlab.analysis.results import Result
from circuitlab.circuit import Circuit
from circuitlab.edit import after, before
from circuitlab.errors import CircuitlabError, InputError
from circuitlab.trace.compile import Compiled
from circuitlab.trace.guard import copy_model, own, random_state
from circuitlab.trace.record import trace

_ROWS = 1 << 14
"""Positions that are taken into the fit at once."""


@dataclass(frozen=True)
class StitchReport(Result):
    """How well two networks fit together.

    Attributes:
        place_a, place_b: where they are joined.
        sizes: features before and after the stitch.
        positions: that it was fitted on.
        rank: of the features before the stitch (with the constant, if there is a bias).
        error: share of the variance of the second network's features that the stitch leaves unexplained, 1 - R².
        loss, loss_a, loss_b: of the stitched network and the two; None where no loss was asked for.
    """

    place_a: str
    place_b: str
    sizes: tuple[int, int]
    positions: int
    rank: int
    error: float
    loss: float | None = None
    loss_a: float | None = None
    loss_b: float | None = None


class Stitch(nn.Module):
    """A linear map along one axis, whose result stands at another.

    Attributes:
        weight: (features after, features before). bias: (features after,) or None.
        dims: the axis before, and after.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dims: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.dims = dims
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = nn.functional.linear(x.movedim(self.dims[0], -1), self.weight, self.bias)
        return made.movedim(-1, self.dims[1]).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}, axes={self.dims}"


class Stitched(nn.Module):
    """The front of one network, a `Stitch`, and the back of another. It takes the first one's inputs.

    Front and back are compiled from the circuits of the two in eval mode, and share nothing with them. What the back needs
    besides the stitched features (masks, paths around the place, other outputs) it computes from the inputs, as the second
    network does.

    Attributes:
        front, stitch, back: the parts.
        report: a `StitchReport`.
    """

    report: StitchReport

    def __init__(self, front: Compiled, stitch: Stitch, back: Compiled, extra: Sequence[int]) -> None:
        super().__init__()
        self.front, self.stitch, self.back = front, stitch, back
        self._extra = tuple(extra)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the first network's forward; the outputs of the second."""
        given = self.front._bound(args, kwargs)
        inputs = [given[name] for name in self.front._inputs]
        return self.back(self.stitch(self.front._outputs(*inputs)[0]), *(inputs[number] for number in self._extra))


@dataclass
class _Sums:
    """What is left of rows: a triangular factor of x, y in its terms, and squares."""

    factor: torch.Tensor  # (k, features before)
    image: torch.Tensor  # (k, features after)
    rest: torch.Tensor  # squares of y that no map can explain
    mean: torch.Tensor
    spread: torch.Tensor  # squares of y about the mean


class LeastSquares:
    """Linear maps from some features to others, by least squares over rows that come in batches.

    The rows are not kept, but a triangular factor of them (a QR decomposition, updated), in double precision: unlike normal
    equations, this loses nothing where features are nearly dependent.

    Attributes:
        rows: their number.
    """

    def __init__(self, bias: bool) -> None:
        self.bias = bias
        self.rows = 0
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sums: _Sums | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Rows (n, features before) and (n, features after)."""
        for pair in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            self._held.append(pair)
            if sum(len(held) for held, _ in self._held) >= max(2 * x.shape[1], _ROWS // 2):
                self._taken()

    def _taken(self) -> _Sums:
        """The sums, with the rows that were held taken in."""
        if not self._held:
            assert self._sums is not None
            return self._sums
        x, y = (torch.cat([pair[side] for pair in self._held]).to(torch.float64) for side in (0, 1))
        self._held = []
        if self.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        none = y.new_zeros(y.shape[1])
        old = self._sums or _Sums(x[:0], y[:0], none, none, none)
        before, self.rows = self.rows, self.rows + len(y)
        gap = y.mean(0) - old.mean
        spread = old.spread + (y - y.mean(0)).square().sum(0) + gap.square() * (before * len(y) / self.rows)
        mean = old.mean + gap * (len(y) / self.rows)
        x, y = torch.cat([old.factor, x]), torch.cat([old.image, y])
        q, factor = torch.linalg.qr(x)
        image = q.T @ y
        self._sums = _Sums(factor, image, old.rest + (y - q @ image).square().sum(0), mean, spread)
        return self._sums

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor | None, int, torch.Tensor, torch.Tensor]:
        """The map of the least mean square error, plus ridge times the squares of its weights; of several, the smallest.

        Returns:
            weight (features before, features after), bias, rank, and for each feature after, summed squares that are left
            and those about the mean.
        """
        sums = self._taken()
        factor, image = sums.factor, sums.image
        k = factor.shape[1] - self.bias
        if ridge:
            penalty = torch.eye(k, factor.shape[1], dtype=factor.dtype, device=factor.device) * math.sqrt(ridge * self.rows)
            factor, image = torch.cat([factor, penalty]), torch.cat([image, image.new_zeros(k, image.shape[1])])
        u, s, vh = torch.linalg.svd(factor, full_matrices=False)
        rank = int((s > s[0] * torch.finfo(s.dtype).eps * max(factor.shape)).sum()) if len(s) else 0
        whole = vh[:rank].T @ ((u[:, :rank].T @ image) / s[:rank, None])
        left = sums.rest + (sums.image - sums.factor @ whole).square().sum(0)
        return whole[:k], whole[k] if self.bias else None, rank, left, sums.spread


class Side:
    """One of two networks: a copy of it in eval mode, traced on a batch, and the front of it up to some places."""

    def __init__(self, model: nn.Module, batch: Any, which: str) -> None:
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{which} must be a torch.nn.Module, and is a {type(model).__name__}")
        self.model = copy_model(model, (), convert=own)[0].eval()
        args, kwargs = walked.inputs_of(self.model, batch)
        try:
            self.circuit: Circuit = trace(self.model, *args, **kwargs)
        except CircuitlabError as error:
            raise InputError(f"{which} ({type(model).__name__}) does not run on the batches that both networks must take: {error}") from error

    def front(self, places: Sequence[Place]) -> Compiled:
        """A module that computes the features at places, as the model does."""
        return Compiled(before(self.circuit, [place.tensor for place in places]), self.model)

    def back(self, place: Place) -> Compiled:
        """A module of the model's outputs from the features at a place, and some of its inputs."""
        return Compiled(after(self.circuit, place.tensor, whole=True), self.model)

    def run(self, front: Compiled, batch: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What a front gives of a batch, and the inputs in it."""
        args, kwargs = walked.inputs_of(self.model, batch)
        given = front._bound(args, kwargs)
        inputs = [given[name] for name in front._inputs]
        with walked.running(self.model, batch):
            return front._outputs(*inputs), inputs

    def features(self, front: Compiled, places: Sequence[Place], batch: Any) -> list[torch.Tensor]:
        """The features at places, as last axis."""
        return [tensor.movedim(place.dim, -1) for tensor, place in zip(self.run(front, batch)[0], places, strict=True)]

    def also(self, other: Side, back: Compiled) -> list[int]:
        """Which of this network's inputs another's back takes besides features: those of the same name, or number.

        Raises:
            InputError: there is none.
        """
        found: list[int] = []
        for name in back._inputs[1:]:
            mine = self.circuit.inputs
            number = mine.index(name) if name in mine else other.circuit.inputs.index(name)
            if number >= len(mine):
                raise InputError(f"what comes after the place in {other.circuit.title} needs the input {name!r}, and "
                                 f"{self.circuit.title} takes {list(mine)}")
            found.append(number)
        return found

    def stitch(
        self, other: Side, place_a: Place, place_b: Place, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> Stitch:
        """A map between two networks' features, of a weight (before, after) and a bias."""
        before, after = (
            getattr(torch, side.circuit.tensor(place.tensor).dtype) for side, place in ((self, place_a), (other, place_b))
        )
        moved = weight.T.to(walked.device_of(self.model), before).contiguous()
        return Stitch(moved, None if bias is None else bias.to(moved).clone(), (place_a.dim, place_b.dim), after)


def rows(features: torch.Tensor, place: Place) -> torch.Tensor:
    """(positions, features), on a device that has double precision."""
    flat = features.reshape(-1, features.shape[-1])
    if not bool(torch.isfinite(flat).all()):
        raise InputError(f"the features at {place.name!r} are not all finite numbers: nothing can be fitted to them")
    return flat.cpu() if flat.device.type == "mps" else flat


def misfit(a: torch.Tensor, b: torch.Tensor, place_a: Place, place_b: Place) -> str:
    """Why the positions of two places do not pair up; "" if they do."""
    if a.shape[:-1] == b.shape[:-1]:
        return ""
    return (f"the features at {place_a.name!r} have positions {tuple(a.shape[:-1])} and those at {place_b.name!r} {tuple(b.shape[:-1])} "
            "(examples, and where in them): a stitch maps features position by position, so these must be the same")


def mean_loss(model: nn.Module, loss: Any, batches: Any, *, like: nn.Module, progress: bool, what: str) -> float | None:
    """The loss over all examples of a network that takes what another does; None if no loss is asked for."""
    return None if loss is None else walked.mean_loss(model, batches, loss, like=like, progress=progress, what=what)


def sides(model_a: nn.Module, model_b: nn.Module, batches: Any, ridge: float) -> tuple[Side, Side]:
    """Both networks, traced on the first batch.

    Raises:
        InputError: they are on different devices, do not run on the batches, or the ridge is no number from 0.
    """
    walked.check(batches)
    if not (isinstance(ridge, (int, float)) and math.isfinite(ridge) and ridge >= 0):
        raise InputError(f"ridge={ridge!r} must be a number from 0")
    first = walked.first(batches)
    devices = [walked.device_of(model) if isinstance(model, nn.Module) else None for model in (model_a, model_b)]
    if None not in devices and devices[0] != devices[1]:
        raise InputError(f"model_a is on {devices[0]} and model_b on {devices[1]}: move one to the other's device")
    batch = walked.to_device(first, devices[0] or torch.device("cpu"))
    with random_state():
        return Side(model_a, batch, "model_a"), Side(model_b, batch, "model_b")


def stitch(
    model_a: nn.Module,
    model_b: nn.Module,
    wire_a: str,
    wire_b: str,
    batches: Any,
    *,
    loss: Any = None,
    bias: bool = True,
    ridge: float = 0.0,
    progress: bool = True,
) -> Stitched:
    """Join the front of one network to the back of another by a linear map that is fitted by least squares.

    The map takes each position's features in the first network to those in the second at the same position: of a
    convolutional net it is a 1x1 convolution.

    Args:
        model_a, model_b: take the same batches. They are not changed, and nothing is shared with them.
        wire_a, wire_b: where each is joined: the path of a module, whose output's features are meant ("layer1",
            "transformer.h.3"); "wire@path" where it has several axes of features; the name of a wire, if it is in one module's
            output; or the name of an array of the circuit.
        batches: what can be walked again; the map is fitted on them.
        loss: "cross_entropy", "mse" or a function of (output, batch), to be measured on the batches for the stitched network
            and the two; None measures none.
        bias: whether the map has one.
        ridge: times the squares of the weights is added to the mean square error.
        progress: show a progress bar.

    Returns:
        a `Stitched` module, which trains and saves as others do; ``report`` tells how well it fits.

    Raises:
        InputError: an unknown place, or one without an output after it; networks that do not take the same batches, or
            places whose positions differ.
    """
    a, b = sides(model_a, model_b, batches, ridge)
    place_a, place_b = find(a.circuit, wire_a), find(b.circuit, wire_b)
    after(b.circuit, place_b.tensor)  # there has to be something
    fit = LeastSquares(bias)
    with random_state(), torch.no_grad():
        front_a, front_b = a.front([place_a]), b.front([place_b])
        for _, batch in walked.walk(batches, walked.device_of(a.model), what="fitting the stitch", progress=progress):
            (x,), (y,) = a.features(front_a, [place_a], batch), b.features(front_b, [place_b], batch)
            why = misfit(x, y, place_a, place_b)
            if why:
                raise InputError(why)
            fit.add(rows(x, place_a), rows(y, place_b))
        weight, offset, rank, left, spread = fit.solve(ridge)
        back = b.back(place_b)
        made = Stitched(front_a, a.stitch(b, place_a, place_b, weight, offset), back, a.also(b, back))
        losses = [
            mean_loss(model, loss, batches, like=like, progress=progress, what="loss")
            for model, like in ((made, a.model), (a.model, a.model), (b.model, b.model))
        ]
    made.report = StitchReport(place_a.name, place_b.name, (place_a.size, place_b.size), fit.rows, rank, unexplained(left, spread), *losses)
    return made


def unexplained(left: torch.Tensor, spread: torch.Tensor) -> float:
    """Share of the variance that is left, 0 where there is none of either."""
    whole, rest = float(spread.sum()), float(left.sum())
    return rest / whole if whole > 0 else 0.0 if rest == 0 else math.inf
