"""The Hessian of a model's mean loss: its largest eigenvalues, and how all of them are distributed.

The matrix is never there: products with it are streamed over all batches. The largest eigenvalues are found by Lanczos'
method (ARPACK, through SciPy); the density of all by stochastic Lanczos quadrature (Ghorbani et al., 2019): the spectrum
as seen from random vectors. At kinks, as ReLU has, it is the Hessian of the pieces.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis.derivatives import Derivatives, NoSecondDerivativeError
from circuitlab.analysis.results import Result
from circuitlab.errors import InputError

Floats = NDArray[np.float64]
WHICH = {"LA": "largest", "SA": "smallest", "LM": "largest in size", "BE": "largest and smallest"}
DENSE = 64
"""Up to so many parameters the matrix is made."""


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """Eigenvalues of a Hessian.

    Attributes:
        eigenvalues: float64 (top,), falling. residuals: float64 (top,), ‖Hv − λv‖ of each.
        vectors: of length 1, one for each eigenvalue, by names of parameters. They can be directions of a `surface`.
        which: "LA", the largest; "SA", the smallest; "LM", the largest in size; "BE", from both ends.
        nodes: float64 (probes, steps), weights: float64 (probes, steps): the spectrum seen by each random vector; weights add up to 1.
        parameters: how many there are: the size of the matrix.
        loss: the mean loss.
    """

    eigenvalues: Floats
    residuals: Floats
    vectors: tuple[dict[str, torch.Tensor], ...]
    which: str
    nodes: Floats
    weights: Floats
    parameters: int
    loss: float

    @property
    def trace(self) -> float:
        """Estimate of the sum of all eigenvalues, from the random vectors; NaN without any."""
        return float(self.parameters * (self.nodes * self.weights).sum() / len(self.nodes)) if len(self.nodes) else float("nan")

    def density(self, at: Any = None, width: float | None = None) -> tuple[Floats, Floats]:
        """Share of eigenvalues near each value: float64 (values,) twice, the values and the density there.

        Args:
            at: the values; None is 512 of them over all of the spectrum.
            width: standard deviation of the Gaussians that stand for single values; None is a hundredth of the range.

        Raises:
            InputError: there were no random vectors.
        """
        if not len(self.nodes):
            raise InputError("the density was not measured: give spectrum(..., probes=10)")
        seen = self.nodes[self.weights > 0]
        reach = float(np.ptp(seen)) or max(abs(float(seen[0])), 1.0)
        width = reach / 100 if width is None else width
        values = np.linspace(seen.min() - 4 * width, seen.max() + 4 * width, 512) if at is None else np.asarray(at, dtype=np.float64)
        bells = np.exp(-((values[:, None, None] - self.nodes) ** 2) / (2 * width**2)) / (width * np.sqrt(2 * np.pi))
        return values, (bells * self.weights).sum((1, 2)) / len(self.nodes)

    def to_frame(self) -> Any:
        """Eigenvalues and their residuals, as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame({"eigenvalue": self.eigenvalues, "residual": self.residuals})

    def plot(self, **options: Any) -> Any:
        """Density and eigenvalues as a plotly Figure. See `circuitlab.plots.spectrum`."""
        return importlib.import_module("circuitlab.plots").spectrum(self, **options)

    def __repr__(self) -> str:
        top = ", ".join(f"{value:.4g}" for value in self.eigenvalues[:5])
        extra = f"; trace about {self.trace:.4g}" if len(self.nodes) else ""
        return f"Spectrum(of {self.parameters} parameters: {WHICH[self.which]} {top}{' ...' if len(self.eigenvalues) > 5 else ''}{extra})"


def spectrum(
    model: torch.nn.Module, batches: Any, loss: Any = None, top: int = 5, *, which: str = "LA", probes: int = 0, steps: int = 60,
    tolerance: float = 1e-4, double: bool = True, seed: int = 0, progress: bool = True,
) -> Spectrum:
    """Find eigenvalues of the Hessian of a model's mean loss, by the parameters that require gradients.

    Args:
        model: is not changed, and evaluated in eval mode.
        batches: what can be walked again; each product with the Hessian walks all of them.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own.
        top: how many eigenvalues; 0 for none.
        which: "LA", the largest; "SA", the smallest; "LM", the largest in size; "BE", from both ends.
        probes: random vectors for the density; 0 for none. steps: products with the Hessian for each, which are all kept.
        tolerance: of the eigenvalues, as a share.
        double: compute in double precision, if the model runs in it.
        seed: of the random vectors, and of the chance within a forward.
        progress: show a progress bar.

    Raises:
        InputError: numbers out of range, batches that are empty, a loss without gradients or without second derivatives, or eigenvalues
            that are not found.
    """
    for name, value, least in (("top", top, 0), ("probes", probes, 0), ("steps", steps, 2)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r}: give a whole number of at least {least}")
    if which not in WHICH:
        raise InputError(f"which={which!r} is not among {', '.join(WHICH)}: {', '.join(WHICH.values())}")
    product = _Hessian(model, batches, loss, seed, double, progress)
    if top >= product.n:
        raise InputError(f"top={top}: the model has {product.n} parameters that require gradients, and fewer eigenvalues are found than that")
    chance = torch.Generator().manual_seed(seed)
    with product:
        product.check(chance)
        values, found = _top(product, top, which, tolerance, chance)
        residuals = [float(torch.linalg.vector_norm(product(vector) - value * vector)) for value, vector in zip(values, found, strict=True)]
        seen = [_lanczos(product, min(steps, product.n), chance) for _ in range(probes)]
    width = max((len(nodes) for nodes, _ in seen), default=0)
    nodes, weights = np.zeros((probes, width)), np.zeros((probes, width))
    for row, (places, shares) in enumerate(seen):
        nodes[row], weights[row] = places[0], 0
        nodes[row, : len(places)], weights[row, : len(places)] = places, shares
    vectors = tuple({name: tensor.float().cpu() for name, tensor in product.named(vector).items()} for vector in found)
    return Spectrum(values, np.array(residuals), vectors, which, nodes, weights, product.n, product.loss)


class _Hessian:
    """Products of the Hessian with flat vectors, and their progress bar."""

    def __init__(self, model: torch.nn.Module, batches: Any, loss: Any, seed: int, double: bool, progress: bool) -> None:
        from tqdm.auto import tqdm

        self.derived = Derivatives(model, batches, loss, seed=seed, double=double)
        if any(tensor.is_complex() for tensor in self.derived.variables.values()):
            raise InputError(f"{type(model).__name__} has complex parameters, of which no Hessian is made here")
        self.sizes = {name: tensor.shape for name, tensor in self.derived.variables.items()}
        self.n = sum(size.numel() for size in self.sizes.values())
        self.loss = float("nan")
        self.bar = tqdm(desc="products with the Hessian", disable=not progress, delay=1, leave=False)

    def __enter__(self) -> None:
        self.loss = self.derived.gradient()[0]

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def named(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector by names of parameters."""
        parts = vector.split([size.numel() for size in self.sizes.values()])
        return {name: part.view(size) for (name, size), part in zip(self.sizes.items(), parts, strict=True)}

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        found = self.derived.times_hessian(self.named(vector))
        self.bar.update()
        return torch.cat([found[name].flatten() for name in self.sizes])

    def random(self, chance: torch.Generator) -> torch.Tensor:
        """A random direction of length 1."""
        vector = torch.randn(self.n, generator=chance, dtype=torch.float64, device="cpu").to(self.derived.device, self.derived.kind)
        return vector / torch.linalg.vector_norm(vector)

    def check(self, chance: torch.Generator) -> None:
        """An error where second derivatives are not those of slopes, in several directions: of a few, kinks may be the reason."""
        directions: Iterator[torch.Tensor] = (10 * self.random(chance) for _ in range(4))
        if not any(self.derived.is_right(self.named(vector)) for vector in directions):
            raise NoSecondDerivativeError("second derivatives of the loss are not what its slopes say: a part of the model, such as a "
                                          "torch.autograd.Function, has a backward that cannot be derived")


def _top(product: _Hessian, top: int, which: str, tolerance: float, chance: torch.Generator) -> tuple[Floats, list[torch.Tensor]]:
    from scipy.sparse import linalg

    solver: Any = linalg

    if not top:
        return np.zeros(0), []
    kind, device = product.derived.kind, product.derived.device
    if product.n <= DENSE:
        matrix = torch.stack([product(row) for row in torch.eye(product.n, dtype=kind, device=device)]).double()
        found, columns = np.linalg.eigh(((matrix + matrix.T) / 2).cpu().numpy())
        places = {"LA": np.arange(product.n)[-top:], "SA": np.arange(top), "LM": np.argsort(np.abs(found))[-top:],
                  "BE": np.r_[np.arange(top // 2), np.arange(product.n - (top + 1) // 2, product.n)]}[which]
        values, columns = found[places], columns[:, places]
    else:
        def times(vector: Any) -> Any:
            return product(torch.from_numpy(np.ravel(vector)).to(device, kind)).double().cpu().numpy()

        operator = solver.LinearOperator((product.n, product.n), matvec=times, dtype=np.float64)
        start = product.random(chance).double().cpu().numpy()
        try:
            values, columns = solver.eigsh(operator, k=top, which=which, v0=start, tol=tolerance)
        except linalg.ArpackNoConvergence as error:
            raise InputError(f"only {len(error.eigenvalues)} of the {top} eigenvalues were found to a share of {tolerance:g}: give fewer, a "
                             "larger tolerance=, or which='LM'") from None
    order = np.argsort(-values)
    return values[order], [torch.from_numpy(columns[:, at].copy()).to(device, kind) for at in order]


def _lanczos(product: _Hessian, steps: int, chance: torch.Generator) -> tuple[Floats, Floats]:
    """The spectrum as a random vector sees it: nodes and weights of Gauss' quadrature. Vectors are made orthogonal to all before."""
    basis = [product.random(chance)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan)
            image = image - known.T @ (known @ image)
        length = float(torch.linalg.vector_norm(image))
        scale = max(map(abs, (*diagonal, *beside)))
        if len(basis) == steps or length <= 1e-10 * scale:
            break
        beside.append(length)
        basis.append(image / length)
    from scipy.linalg import eigh_tridiagonal

    nodes, columns = eigh_tridiagonal(diagonal, beside) if beside else (np.array(diagonal), np.ones((1, 1)))
    return nodes, columns[0] ** 2


__all__ = ["Spectrum", "spectrum"]
