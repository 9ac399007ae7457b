"""The local interaction basis of a hidden wire: directions that do something, and which of them act on which.

Bushnaq et al., *Using Degeneracy in the Loss Landscape for Mechanistic Interpretability* and *The Local Interaction
Basis* (2024). With activations f of a wire (neurons), f' those of the next, and means over all positions:

- **G** = E[(f - μ)(f - μ)ᵀ] = U D Uᵀ, the Gram matrix. Activations are taken about their mean by default, which is our choice: a
  direction of large mean that never varies would come first otherwise. With ``centred=False`` μ is 0. Eigenvalues up to tolerance times the largest are
  dropped, and R = U D^-½ makes activations orthonormal.
- **M'** = E[JᵀJ] with J = ∂f̂'/∂f, of the next wire's values in its own interaction basis. At the output, the last of the
  chain, that basis is the principal components, without scale. Where a value acts on several positions, all count.
- **V**, **Λ**: R⁺ M' R⁺ᵀ = V Λ Vᵀ with R⁺ = D^½ Uᵀ. Directions of eigenvalue up to tolerance times the largest are dropped: the
  next wire does not depend on them.
- **C** = R V Λ^½ and C⁺ = Λ^-½ Vᵀ R⁺: values f̂ = Cᵀ (f - μ). Then CᵀGC = Λ, C⁺M'C⁺ᵀ = 1 and C⁺C = 1: directions are
  uncorrelated, act on the next wire with equal strength per unit, and are as large as they matter. C⁺ is the Moore-Penrose
  inverse of C if no eigenvalue of Λ was dropped.
- **E_ij**, how strongly direction j acts on direction i of the next wire: the root mean square, over positions, of the
  integrated gradient A_ij = f̂_j ∫₀¹ ∂f̂'_i/∂f̂_j (α f̂) dα, from the mean (``edges="integrated"``); or of ∂f̂'_i/∂f̂_j, times the size
  of direction j, √λ_j (``edges="jacobian"``): then Σ_i E_ij² = λ_j. For a linear section both are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.jacobian import Pull, Run, Section, between, differentiable, reader
from circuitlab.analysis.neurons import _traced
from circuitlab.analysis.results import Result
from circuitlab.circuit import Wire
from circuitlab.errors import InputError

OUTPUT = "output"
"""Name of the model's output among wires."""
MATRICES = 8
"""How many float64 matrices (neurons, neurons) are held at once, with the workspace of the eigendecomposition."""


@dataclass(frozen=True, eq=False, repr=False)
class InteractionBasis(Result):
    """The interaction basis of a hidden wire with respect to the next.

    Attributes:
        wire: name of the wire, and next: of the wire that its directions act on, or "output".
        n: number of positions that means are over.
        centred: whether G is about the mean, and mean: (neurons,), zero if not.
        gram: G, and moment: M' (neurons, neurons).
        gram_vectors: U (neurons, rank), and gram_values: D (rank,), without what was dropped.
        vectors: V (rank, directions).
        eigenvalues: Λ (directions,), falling.
        C: (neurons, directions). C_pinv: C⁺ (directions, neurons).
        edges: E (directions of the next wire, directions), non-negative, and kind: how they were measured.
        tolerance: part of the largest eigenvalue, up to which an eigenvalue counts as zero.
        controls: the same of as many control networks as were asked for; see `interaction_basis`.

        All tensors are float64, on the CPU.
    """

    wire: str
    next: str
    n: int
    centred: bool
    mean: torch.Tensor
    gram: torch.Tensor
    moment: torch.Tensor
    gram_vectors: torch.Tensor
    gram_values: torch.Tensor
    vectors: torch.Tensor
    eigenvalues: torch.Tensor
    C: torch.Tensor
    C_pinv: torch.Tensor
    edges: torch.Tensor
    kind: str
    tolerance: float
    controls: tuple[InteractionBasis, ...] = ()

    @property
    def size(self) -> int:
        """Number of neurons."""
        return len(self.C)

    @property
    def rank(self) -> int:
        """Number of linearly independent directions that the activations have."""
        return len(self.gram_values)

    @property
    def directions(self) -> int:
        """Number of directions of the basis: those of the rank that the next wire depends on."""
        return len(self.eigenvalues)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """Activations (..., neurons) in the basis: f̂ (..., directions)."""
        return (hidden.to(self.C) - self.mean) @ self.C

    def inverse(self, values: torch.Tensor) -> torch.Tensor:
        """Activations (..., neurons) of values in the basis (..., directions); what was dropped is at its mean."""
        return values.to(self.C) @ self.C_pinv + self.mean

    def to_frame(self) -> Any:
        """One row for each edge, the strongest first, as a pandas DataFrame: from, to, edge, eigenvalue (of "from")."""
        import pandas as pd

        to, start = np.indices(tuple(self.edges.shape))
        frame = pd.DataFrame({"from": start.ravel(), "to": to.ravel(), "edge": self.edges.numpy().ravel()})
        frame["eigenvalue"] = self.eigenvalues.numpy()[frame["from"]]
        return frame.sort_values("edge", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        return (f"InteractionBasis({self.wire} to {self.next}: {self.size} neurons, of which activations span {self.rank} directions and "
                f"{self.directions} act on {self.next}; over {self.n} positions, edges {self.kind})")


def interaction_basis(
    model: torch.nn.Module,
    batches: Any,
    wire_a: Wire | str,
    wire_b: Wire | str | InteractionBasis | None = None,
    *,
    centred: bool = True,
    edges: Literal["integrated", "jacobian"] = "integrated",
    steps: int = 8,
    tolerance: float | None = None,
    output: Callable[[Any], torch.Tensor] | None = None,
    mask: Any = "attention_mask",
    controls: int = 0,
    seed: int = 0,
    memory: int = 2**31,
    progress: bool = True,
) -> InteractionBasis:
    """The local interaction basis of a hidden wire with respect to a later one, or to the model's output.

    For small models: it takes a backward pass for each direction of the later wire at each position of an example, and
    ``steps`` of them for the edges. The model is run in eval mode on a copy without gradients for its parameters.
    Means are over all positions of all batches, whatever the batches are split into.

    Args:
        model: any module.
        batches: what can be walked again, of tuples (inputs ..., target), dicts or tensors.
        wire_a: a hidden wire of ``circuit.ffn``, its name or its block's path; or any wire whose values one linear map
            alone reads.
        wire_b: the same for a later wire, whose own basis with respect to the output is worked out first; its basis, if
            that is known, so that a chain of layers is done from the last to the first; None for the model's output.
        centred: take activations about their mean.
        edges: how edges are measured, "integrated" or "jacobian".
        steps: points (Gauss-Legendre) of the integral; 1 takes the middle.
        tolerance: part of the largest eigenvalue up to which others count as zero. By default 1e-10, more for types of
            less precision than float32.
        output: takes what the model returns and gives the tensor to explain, its last dimension counting features; by
            default the logits, or the first tensor.
        mask: positions to count, as for `observe`.
        controls: number of control networks to measure as well: the same model with the entries of each weight between
            the two wires dealt out anew. The basis makes edges sparse whatever the network, so that the edges of networks
            without modules are what modularity has to be compared with.
        seed: of the controls.
        memory: bytes that matrices may take.
        progress: show progress bars.

    Raises:
        InputError: a wire that cannot be measured or is too large, no dependence of the later wire on it, activations
            that are constant or not finite.
    """
    if edges not in ("integrated", "jacobian"):
        raise InputError(f"edges={edges!r} is not known; give 'integrated' or 'jacobian'")
    if steps < 1 or controls < 0 or (tolerance is not None and not 0 <= tolerance < 1):
        raise InputError(f"steps={steps} must be at least 1, controls={controls} at least 0, and tolerance={tolerance} from 0 to below 1")
    if controls and isinstance(wire_b, InteractionBasis):
        raise InputError("controls have a basis of the later wire of their own: give that wire, not its basis, or controls=0")
    first = walked.first(batches)
    with differentiable(model) as copied:
        with torch.no_grad():
            circuit = _traced(copied, walked.to_device(first, walked.device_of(copied)))
        source = reader(circuit, wire_a)
        after = wire_b if isinstance(wire_b, InteractionBasis) else None
        later = wire_b.wire if isinstance(wire_b, InteractionBasis) else wire_b
        target = None if later is None else reader(circuit, later)
        if target is not None and target.wire == source.wire:
            raise InputError(f"both wires are {source.wire}; give a later one as wire_b, or None for the model's output")
        coarse = [torch.finfo(parameter.dtype).eps for parameter in copied.parameters() if parameter.is_floating_point()]
        tolerance = max([1e-10, *(10 * eps**2 for eps in coarse)]) if tolerance is None else tolerance
        work = _Work(batches, first, centred, edges, steps, tolerance, output, mask, memory, progress)
        found = work.basis(copied, source, target, after)
        names = between(circuit, source, target) if controls else ()
        rng = torch.Generator().manual_seed(seed)
        drawn: list[InteractionBasis] = []
        for _ in range(controls):
            with dealt(copied, names, rng):
                drawn.append(work.basis(copied, source, target))
    return replace(found, controls=tuple(drawn))


def interaction_affinity(basis: InteractionBasis, nodes: Literal["both", "directions", "neurons"] = "both") -> torch.Tensor:
    """A symmetric affinity for `circuitlab.partition`, float64, zero on the diagonal.

    Its modularity is to be compared with that of the affinities of the basis's controls, as ``circuitlab.partition`` does if it is
    given the basis. Edges that are dealt out anew, or mixed, are no control: in the basis the edges of any network are
    sparse, and beat them.

    Args:
        basis: of a wire.
        nodes: "both", the graph of the papers: the directions of the wire, then those of the next, linked by edges E;
            "directions", those of the wire alone, as far as they act on the same directions of the next: EᵀE;
            "neurons", as far as they take part in such directions: W EᵀE Wᵀ, with W_kj the part of direction j's variance
            that is neuron k's, |C_kj| σ_k, rows of W having the sum 1.
    """
    edges = basis.edges
    if nodes == "both":
        out, own = edges.shape
        found = torch.zeros(own + out, own + out, dtype=edges.dtype, device=edges.device)
        found[own:, :own], found[:own, own:] = edges, edges.T
        return found
    if nodes not in ("directions", "neurons"):
        raise InputError(f"nodes={nodes!r} is not known; give 'both', 'directions' or 'neurons'")
    found = edges.T @ edges
    if nodes == "neurons":
        part = basis.C.abs() * basis.gram.diagonal().clamp(min=0).sqrt()[:, None]
        part = part / part.sum(1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
        found = part @ found @ part.T
    return ((found + found.T) / 2).fill_diagonal_(0)


@contextmanager
def dealt(model: torch.nn.Module, names: tuple[str, ...], rng: torch.Generator) -> Iterator[None]:
    """Inside, the entries of each of these parameters stand in another order, drawn by ``rng``; the tensors are others."""
    named = dict(model.named_parameters(remove_duplicate=False))
    before = [(named[name], named[name].data) for name in names]
    try:
        for parameter, data in before:
            order = torch.randperm(data.numel(), generator=rng, device="cpu").to(data.device)
            parameter.data = data.flatten()[order].view_as(data)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


# the work ---------------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """First and second moments of rows, summed."""

    n: int = 0
    total: Any = 0.0
    square: Any = 0.0

    def add(self, run: Run, values: torch.Tensor, number: int, exact: torch.dtype) -> None:
        kept = run.kept(values.shape[1], number)
        rows = (values.flatten(0, 1) if kept is None else values[kept]).to(exact)
        self.n += len(rows)
        self.total = self.total + rows.sum(0)
        self.square = self.square + rows.T @ rows

    def gram(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and Gram matrix."""
        mean = self.total / self.n if centred else torch.zeros_like(self.total)
        return mean, self.square / self.n - torch.outer(mean, mean)


@dataclass(frozen=True)
class _Turned:
    """A basis without edges, on the model's device, with the section that it is of, and the basis of what follows."""

    section: Section
    name: str
    following: torch.Tensor
    n: int
    mean: torch.Tensor
    gram: torch.Tensor
    moment: torch.Tensor
    gram_vectors: torch.Tensor
    gram_values: torch.Tensor
    vectors: torch.Tensor
    eigenvalues: torch.Tensor
    C: torch.Tensor
    C_pinv: torch.Tensor


_TENSORS = ("mean", "gram", "moment", "gram_vectors", "gram_values", "vectors", "eigenvalues", "C", "C_pinv")


@dataclass
class _Work:
    """What is asked for, and the passes over batches that it takes."""

    batches: Any
    first: Any
    centred: bool
    edges: str
    steps: int
    tolerance: float
    output: Callable[[Any], torch.Tensor] | None
    mask: Any
    memory: int
    progress: bool

    def basis(
        self, model: torch.nn.Module, source: FeedForward, target: FeedForward | None, after: InteractionBasis | None = None
    ) -> InteractionBasis:
        """The basis of a wire, with that of the next where it is known."""
        turned = self.turned(model, source, target, after)
        squares = self._squares(turned)
        if self.edges == "jacobian":
            squares = squares * turned.eigenvalues
        return InteractionBasis(
            wire=source.wire, next=turned.name, n=turned.n, centred=self.centred, kind=self.edges, tolerance=self.tolerance,
            edges=(squares / turned.n).sqrt().cpu().double(), **{name: getattr(turned, name).cpu().double() for name in _TENSORS},
        )

    def turned(
        self, model: torch.nn.Module, source: FeedForward, target: FeedForward | None, after: InteractionBasis | None = None
    ) -> _Turned:
        """The basis of a wire, without edges."""
        self._fits(source.wire, source.size)
        section = Section(model, source, target, self.first, self.output, self.mask)
        name = target.wire if target else OUTPUT
        following = after.C if after is not None else None if target is None else self.turned(model, target, None).C
        own, other = self._moments(section, name)
        mean, gram = own.gram(self.centred)
        gram_values, gram_vectors = self._decomposed(gram, source.wire, "activations are constant, or zero, at all positions")
        if following is None:
            following = self._decomposed(other.gram(self.centred)[1], name, "values are the same for all inputs")[1]
        following = following.to(gram)
        moment = self._moment(section, following, name) / own.n
        scale = gram_values.sqrt()
        inner = scale[:, None] * (gram_vectors.T @ moment @ gram_vectors) * scale
        eigenvalues, vectors = self._decomposed(inner, name, f"values do not depend on the activations of {source.wire}")
        size = eigenvalues.sqrt()
        return _Turned(
            section, name, following, own.n, mean, gram, moment, gram_vectors, gram_values, vectors, eigenvalues,
            C=(gram_vectors / scale) @ vectors * size, C_pinv=((gram_vectors * scale) @ vectors / size).T,
        )

    def _fits(self, wire: str, size: int) -> None:
        needed = MATRICES * 8 * size**2
        if needed > self.memory:
            largest = int((self.memory / MATRICES / 8) ** 0.5)
            raise InputError(
                f"{wire} has {size} directions: its matrices take {needed / 2**30:.3g} GiB, and memory={self.memory} allows "
                f"{self.memory / 2**30:.3g} GiB, which is {largest} directions; the interaction basis is for small models: give a larger "
                "memory=, choose a narrower wire, or (for the output) output=function that takes fewer of its features"
            )

    def _decomposed(self, matrix: torch.Tensor, wire: str, otherwise: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues of a symmetric matrix that are not zero, falling, and their vectors, signs set; an error if all are."""
        if not bool(matrix.isfinite().all()):
            raise InputError(f"values of {wire} or their derivatives are NaN or infinite; look at the weights and at the batches")
        values, vectors = torch.linalg.eigh(matrix.cpu())
        kept = values > self.tolerance * values[-1].clamp(min=0)
        if not bool(values[-1] > torch.finfo(values.dtype).tiny):
            raise InputError(f"{wire}: {otherwise}")
        values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return values.to(matrix.device), (vectors * largest.sign()).to(matrix.device)

    # passes over the batches ----------------------------------------------------------------------------

    def _walk(self, what: str, section: Section) -> Iterator[Any]:
        device = walked.device_of(section.model)
        for _, batch in walked.walk(self.batches, device, what=what, progress=self.progress):
            yield batch

    def _moments(self, section: Section, name: str) -> tuple[_Moments, _Moments]:
        """Of the wire, and of the output where that is what it acts on."""
        own, other = _Moments(), _Moments()
        for batch in self._walk(f"activations of {section.source.wire}", section):
            with torch.no_grad():
                run = section.run(batch)
                if run is None:
                    continue
                own.add(run, run.hidden(), 0, section.exact)
                reached = run.reached() if section.target is None else None
                if reached is not None:
                    self._fits(f"the {name}", reached.shape[-1])
                    other.add(run, reached, 1, section.exact)
        if not own.n:
            raise InputError(f"the values of {section.source.wire} are computed for no position of these batches")
        return own, other

    def _moment(self, section: Section, following: torch.Tensor, name: str) -> torch.Tensor:
        """M', summed over positions."""
        total = torch.zeros(section.source.size, section.source.size, dtype=following.dtype, device=following.device)
        for batch in self._walk(f"derivatives of {name} by {section.source.wire}", section):
            run = section.run(batch)
            if run is None or (run.target is None and section.target is not None):
                continue
            pull = Pull(run, following, (section.source.wire, name))
            for pairs in pull:
                rows = pull.rows(pairs).flatten(0, 2)
                total.addmm_(rows.T, rows)
        return total

    def _squares(self, turned: _Turned) -> torch.Tensor:
        """Squares of integrated gradients, or of derivatives, summed over positions: (next directions, directions)."""
        section, following, mean, back = turned.section, turned.following, turned.mean, turned.C_pinv.T
        wires = (section.source.wire, turned.name)
        total = torch.zeros(following.shape[1], back.shape[1], dtype=following.dtype, device=following.device)
        points, weights = np.polynomial.legendre.leggauss(self.steps)
        path = list(zip((points + 1) / 2, weights / 2, strict=True)) if self.edges == "integrated" else [(1.0, 1.0)]

        def put(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda hidden: mean + share * (hidden - mean)

        for batch in self._walk(f"edges from {wires[0]} to {wires[1]}", section):
            runs = [section.run(batch, put(share)) for share, _ in path]
            pulls = [Pull(run, following, wires) for run in runs if run is not None and run.target is not None]
            plain = section.run(batch) if pulls else None
            if plain is None:
                continue
            if len({pull.run.examples for pull in pulls}) > 1:
                for pull in pulls:
                    pull.together()
            plain.examples = pulls[0].run.examples
            values = (plain.hidden().to(mean) - mean) @ turned.C
            for pairs in pulls[0]:
                if self.edges == "jacobian":
                    found = (pulls[0].rows(pairs) @ back).square().sum((1, 2))
                else:
                    terms = [weight * (pull.rows(pairs) @ back) for pull, (_, weight) in zip(pulls, path, strict=True)]
                    found = torch.stack(terms).sum(0).mul(values).sum(2).square().sum(1)
                total.index_add_(0, pairs[:, 1], found)
        return total
