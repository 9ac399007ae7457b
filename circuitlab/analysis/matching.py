"""Matching two models: a permutation for each wire that brings the second near to the first, its function unchanged.

Networks trained from different seeds differ by a permutation of their hidden units, and by more. What can be permuted is
read off the circuit, so there is no specification to write.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from circuitlab.analysis import alignment_arrays as arrays
from circuitlab.analysis import batches as walked
from circuitlab.analysis.alignment import Alignment, Element
from circuitlab.analysis.results import Result
from circuitlab.analysis.symmetry import Symmetry
from circuitlab.circuit import Circuit
from circuitlab.errors import InputError

METHODS = ("weights", "activations", "sinkhorn", "straight-through")


@dataclass(frozen=True, eq=False)
class Match(Result):
    """A permutation for each wire, that brings one model near to another.

    Attributes:
        method: how it was found.
        permutations: wire name -> int64 permutation: entry i of the new wire is entry ``permutation[i]`` of the old one.
            A wire within others (the entries of each head) has one for each index of those, by the new index.
        frozen: the other wires, each with the reason why it cannot be permuted.
        unread: parameters that the run did not read: they stay as they are.
        distance: Euclidean distance between the models' permutable parameters, as they were and matched.
        similarity: wire name -> cosine of all that has the wire, in one model and the other, as they were and matched.
        objective: for each start, the objective at the start and after each sweep or step. What it is depends on the method:
            Σ⟨A, B⟩ over permutable parameters ("weights"), the sum of correlations ("activations"), or the loss, which falls.
        best: the start that gave the permutations.
        circuit: that the permutations are of.
    """

    method: str
    permutations: dict[str, torch.Tensor]
    frozen: dict[str, str]
    unread: tuple[str, ...]
    distance: tuple[float, float]
    similarity: dict[str, tuple[float, float]]
    objective: tuple[tuple[float, ...], ...]
    best: int
    circuit: Circuit

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """A copy of the second model with the permutations applied: the same function.

        Raises:
            VerificationError: another module than was matched.
        """
        return self.circuit.permute(model, self.permutations)

    def to_frame(self) -> Any:
        """One row for each wire, as a pandas DataFrame: wire, size, within, moved (a share), similarity before and after, why frozen."""
        import pandas as pd

        symmetry = Symmetry(self.circuit)
        rows: list[dict[str, Any]] = []
        for name, wire in symmetry.circuit.wires.items():
            before, after = self.similarity.get(name, (math.nan, math.nan))
            rows.append({"wire": name, "size": wire.size, "within": ", ".join(symmetry.within.get(name, ())), "moved": self.moved(name),
                         "before": before, "after": after, "frozen": self.frozen.get(name, "")})
        return pd.DataFrame(rows, columns=["wire", "size", "within", "moved", "before", "after", "frozen"])

    def moved(self, name: str) -> float:
        """Share of a wire's entries that are elsewhere now; NaN for a frozen one."""
        index = self.permutations.get(name)
        if index is None:
            return math.nan
        return float((index != torch.arange(index.shape[-1], device="cpu")).double().mean())

    def plot(self) -> Any:
        """Similarity of each wire before and after, and the objective, as a plotly Figure. See `circuitlab.plots.match`."""
        return importlib.import_module("circuitlab.plots").match(self)

    def __repr__(self) -> str:
        before, after = self.distance
        count = f"{len(self.permutations)} wires permuted, {len(self.frozen)} frozen"
        lines = [f"Match by {self.method}: {count}; distance {before:.4g} as they were, {after:.4g} matched"]
        for name, index in self.permutations.items():
            one, two = self.similarity[name]
            lines.append(f"  {name} {tuple(index.shape)}: {self.moved(name):.0%} moved, similarity {one:.2f} → {two:.2f}")
        lines += [f"  {name} is frozen: {why}" for name, why in self.frozen.items()]
        if self.unread:
            lines.append(f"  not read by this run, left as they are: {', '.join(self.unread)}")
        return "\n".join(lines)


def match(
    model_a: torch.nn.Module,
    model_b: torch.nn.Module,
    *inputs: Any,
    method: str = "weights",
    restarts: int = 3,
    seed: int = 0,
    batches: Any = None,
    loss: Any = None,
    steps: int | None = None,
    rate: float | None = None,
    tolerance: float = 1e-7,
    progress: bool = True,
) -> Match:
    """Find the permutation of each wire of the second model that aligns it with the first.

    Args:
        model_a: the model to align with.
        model_b: the model to be permuted, of the same architecture. Neither is changed.
        *inputs: as their ``forward`` takes them, to trace the circuit with; by default those of the first batch.
        method: "weights" maximises Σ⟨A, B⟩ over all permutable parameters by coordinate descent over wires (Ainsworth et al.,
            *Git Re-Basin*, 2023, Algorithm 1); "activations" the correlation of what the wires hold over batches (ibid.,
            section 3.1; Li et al., *Convergent Learning*, 2016); "sinkhorn" descends over soft permutations by implicit
            gradients (Peña et al., *Re-basin via implicit Sinkhorn differentiation*, 2023) for the distance, or with
            batches for the loss half-way; "straight-through" permutes B by what is nearest to a moving copy of A, and moves
            that down the gradient of the loss half-way (*Git Re-Basin*, section 3.3). The last two start from the match of
            the weights, keep the best permutation that they meet, and draw nothing at random.
        restarts: number of further starts after the first, of which the best is kept: one from the identity, the
            rest from random permutations.
        seed: of random starts and orders. The same seed gives the same answer; no global random state is touched.
        batches: what can be walked again; for "activations", "straight-through", and "sinkhorn" with a loss.
        loss: "cross_entropy", "mse", a function of (output, batch), or None for the output's own; with batches.
        steps: of gradient descent; by default 200 for "sinkhorn", 100 for "straight-through". A step takes one batch.
        rate: of gradient descent (Adam); by default 0.1 for "sinkhorn", and for "straight-through" 0.01 times the root mean
            square of each parameter.
        tolerance: coordinate descent ends when no wire gains more than this share of what it could.
        progress: show a progress bar.

    Returns:
        the `Match`.

    Raises:
        InputError: models whose wires or parameters differ (the message tells where), one module given twice, parameters that
            are not finite, that have no values, or that are on different devices; an unknown method; missing batches.
        TraceError: a model cannot be traced on these inputs.
    """
    _check(model_a, model_b, method, restarts, batches, steps, rate)
    if batches is not None:
        walked.check(batches)
    if not inputs and batches is not None:
        args, kwargs = walked.inputs_of(model_a, walked.first(batches))
    else:
        args, kwargs = inputs, {}
    symmetry = arrays.common(model_a, model_b, args, kwargs)
    state = arrays.states(model_a, model_b, symmetry)
    generator = torch.Generator().manual_seed(seed)
    made = Alignment(arrays.terms(symmetry, state), *arrays.wired(symmetry), tolerance)
    if method == "weights":
        value, element, history = made.best(_starts(symmetry, restarts, seed), generator, progress=progress)
    elif method == "activations":
        from circuitlab.analysis.alignment_activations import activations

        found = Alignment(activations(symmetry, model_a, model_b, batches, progress), *arrays.wired(symmetry), tolerance)
        value, element, history = found.best(_starts(symmetry, restarts, seed), generator, progress=progress)
    else:
        from circuitlab.analysis import alignment_soft as soft

        search = soft.sinkhorn if method == "sinkhorn" else soft.straight_through
        value, element, history = search(symmetry, made, state, model_a, soft.Options(batches, loss, steps, rate, progress))
    arrays.settle(symmetry, state, element)
    return _told(symmetry, made, method, element, history, value, arrays.unread(model_a, symmetry.circuit))


def _check(model_a: Any, model_b: Any, method: str, restarts: Any, batches: Any, steps: Any, rate: Any) -> None:
    if method not in METHODS:
        raise InputError(f"method={method!r} is not known; give one of {', '.join(map(repr, METHODS))}")
    for which, model in (("model_a", model_a), ("model_b", model_b)):
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"{which} must be a torch.nn.Module, and is a {type(model).__name__}")
    if model_a is model_b:
        raise InputError("model_a and model_b are the same module: there is nothing to match; give two, such as copy.deepcopy(model)")
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise InputError(f"restarts={restarts!r} must be a whole number, 0 or more")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps={steps!r} must be a whole number, 1 or more, or None for the default")
    if rate is not None and not rate > 0:
        raise InputError(f"rate={rate!r} must be above 0, or None for the default")
    if batches is None and method in ("activations", "straight-through"):
        raise InputError(f"method={method!r} looks at what the models compute: give batches=, a list of batches or a DataLoader"
                         "; method='weights' needs none")


def _starts(symmetry: Symmetry, restarts: int, seed: int) -> list[Mapping[str, torch.Tensor] | None]:
    """The sorted start, the identity, then random elements."""
    return [None, {}, *(symmetry.random(seed + n) for n in range(restarts - 1))][: restarts + 1]


def _told(
    symmetry: Symmetry, made: Alignment, method: str, element: Element, history: tuple[tuple[float, ...], ...], value: float,
    unread: tuple[str, ...],
) -> Match:
    made.reset()
    before = made.distance(), made.similarities()
    made.reset(element)
    after = made.distance(), made.similarities()
    best = next((n for n, row in enumerate(history) if row and row[-1] == value), 0)
    return Match(
        method, {name: element[name].contiguous() for name in symmetry.wires}, dict(symmetry.frozen), unread,
        (before[0], after[0]), {name: (before[1][name], after[1][name]) for name in symmetry.wires}, history, best,
        symmetry.circuit,
    )
