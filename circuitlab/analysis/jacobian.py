"""Derivatives of what a model computes between a hidden wire and a later one, streamed over batches.

The hidden values are put in from outside, where the map that reads them reads them (see `tap`), so that a derivative is
with respect to them alone, the rest of the run being as on the data. Derivatives are taken of each example separately
where examples do not mix, which is tested in each run, and of the whole batch where they do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.feedforward import FeedForward, blocks
from circuitlab.analysis.maps import Maps, NoMapError
from circuitlab.analysis.neurons import _alone, _mask
from circuitlab.analysis.tap import Tap
from circuitlab.circuit import Circuit, Wire
from circuitlab.errors import InputError
from circuitlab.trace.guard import copy_model, random_state

PULLED = 2**28
"""Bytes that derivatives taken at once may have, at the wire and at the target together."""


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A copy of a model in eval mode whose runs can be differentiated by their values, not by its parameters.

    Parameters have the same storage and need no gradient; everything else is copied. Random state is put back.
    """

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, torch.nn.Parameter) and not tensor.is_inference():
            return torch.nn.Parameter(tensor.detach(), requires_grad=False)
        made = tensor.detach().clone()
        return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made

    with torch.inference_mode(False), random_state(), torch.compiler.set_stance("force_eager"):
        copied, _, _ = copy_model(model, (), convert=convert)
        with torch.enable_grad():
            yield copied.eval()


# wires ------------------------------------------------------------------------------------------------


def reader(circuit: Circuit, wire: Wire | str) -> FeedForward:
    """The feed-forward block of a hidden wire, or a block of the one linear map that reads a wire and nothing else does.

    Args:
        circuit: of the model.
        wire: the wire, its name, or the path of its block.

    Raises:
        InputError: there is no such wire, or it is no block's and more than one thing reads its values.
    """
    found = blocks(circuit)
    what = wire.name if isinstance(wire, Wire) else wire
    if isinstance(wire, Wire):
        same = [w for w in circuit.wires.values() if w.places and frozenset(w.places) == frozenset(wire.places)]
        what = same[0].name if same else what
    for path, block in found.items():
        if what in (block.wire, path):
            if block.stacked > 1:
                raise InputError(f"neuron j of the {block.stacked} experts of {block.wire}, which share one parameter, is another in each "
                                 f"({block.values[0].parameter}); choose a wire of circuit.ffn of which there is one")
            return block
    if what not in circuit.wires:
        known = ", ".join(block.wire for block in found.values()) or "none"
        raise InputError(f"{what!r} is no wire of {circuit.title}; its feed-forward blocks have the wires {known}; see circuit.ffn")
    maps = Maps(circuit)
    readers: dict[str, FeedForward] = {}
    for op in circuit.ops:
        for axis in op.axes:
            data = maps.multiplied(op, axis) if axis.role == "contracted" and axis.wire == what else None
            if data is None:
                continue
            hidden, size = circuit.tensor(op.inputs[data]), circuit.wires[what].size
            at = [dim for slot, dim, *_ in axis.ins if slot == data]
            if len(at) != 1 or hidden.dims[at[0]] != (what,) or len(circuit.consumers.get(hidden.name, ())) != 1:
                continue
            try:
                value = maps.weight(op, (what,), (0, size, 1), makes=False)
            except NoMapError:
                continue
            others = tuple(dim for n, dim in enumerate(hidden.dims) if n != at[0])
            batch = next((n for n, dim in enumerate(others) if dim and circuit.wires[dim[0]].kind == "batch"), None)
            readers[op.name] = FeedForward(maps.module_of(op.name), what, size, (), (), (value,), positions=others, batch=batch)
    if len(readers) != 1:
        state = f"is read by {len(readers)} linear maps" if readers else "has no linear map that alone reads its values"
        raise InputError(f"the wire {what!r} {state}; there must be one, whose input can be put in from outside; "
                         "choose a hidden wire of circuit.ffn, or the input of a layer that nothing else reads")
    return next(iter(readers.values()))


def between(circuit: Circuit, source: FeedForward, target: FeedForward | None) -> tuple[str, ...]:
    """Names of the weights (parameters of two or more dimensions) of the ops from where a wire is read to where the next is."""
    maps = Maps(circuit)
    start = circuit.op(source.values[0].op)
    reached = set(start.outputs)
    ahead = [start]
    for op in circuit.ops[maps.number[start.name] + 1 :]:
        if any(name in reached for name in op.inputs):
            reached.update(op.outputs)
            ahead.append(op)
    wanted = {circuit.op(target.values[0].op).inputs[target.values[0].operand]} if target else set(circuit.outputs)
    names: dict[str, None] = {}
    for op in reversed(ahead):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
            roots = [root for name in op.inputs for root in maps.roots.get(name, ())]
            names.update(dict.fromkeys(r for r in roots if circuit.tensor(r).kind == "parameter" and len(circuit.tensor(r).dims) > 1))
    return tuple(reversed(names))


# runs -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of the model, from values put in at the source to the target.

    Attributes:
        leaf: what was put in, as the source is read. target: what came out, with its graph; None if it was not reached.
        leads: number of the dimension that counts examples, in the values and in the target; None if none does.
        examples: in the batch, or 1 where they are not kept apart.
        mask: positions to count, (examples, positions), or None.
    """

    leaf: torch.Tensor
    target: torch.Tensor | None
    leads: tuple[int | None, int | None]
    examples: int
    mask: torch.Tensor | None

    def __post_init__(self) -> None:
        self.batch = self.examples
        shapes = [(tensor.shape, lead) for tensor, lead in zip((self.leaf, self.target), self.leads, strict=True) if tensor is not None]
        if any(lead is None or len(shape) < 2 or shape[lead] % self.examples for shape, lead in shapes):
            self.examples = 1

    def units(self, tensor: torch.Tensor, lead: int | None) -> torch.Tensor:
        """(examples, positions, features); leading dimensions before are kept."""
        if lead:
            tensor = tensor.movedim(lead - tensor.ndim, -tensor.ndim)
        return tensor.reshape(self.examples, -1, tensor.shape[-1])

    def hidden(self) -> torch.Tensor:
        """What was put in (examples, positions, neurons), detached."""
        return self.units(self.leaf.detach(), self.leads[0])

    def reached(self) -> torch.Tensor | None:
        """The target (examples, positions, features), None if the run did not come to it."""
        return None if self.target is None else self.units(self.target, self.leads[1])

    def kept(self, positions: int, number: int) -> torch.Tensor | None:
        """Which positions count, (examples, positions), at the source (0) or the target (1); None if all do."""
        mask, lead = self.mask, self.leads[number]
        total = positions * self.examples
        if mask is None or lead is None or len(mask) != self.batch or total % mask.numel():
            return None
        return mask.reshape(-1).repeat_interleave(total // mask.numel()).view(self.examples, positions)


class Section:
    """What a model computes between the place where a hidden wire is read and a target: where another is, or the output."""

    def __init__(
        self, model: torch.nn.Module, source: FeedForward, target: FeedForward | None, first: Any,
        output: Callable[[Any], torch.Tensor] | None = None, mask: Any = None,
    ) -> None:
        self.model, self.source, self.target, self.mask = model, source, target, mask
        self.output = output or walked.first_tensor
        examples = walked.examples(first)
        self.leads = (_alone(source, examples).batch, _alone(target, examples).batch if target else 0)
        self.exact = torch.float64 if walked.device_of(model).type != "mps" else torch.float32

    def run(self, batch: Any, place: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Run | None:
        """Run a batch, with ``place`` of the values put in; None if the source's values are not computed for it."""
        put: list[torch.Tensor] = []
        met: list[torch.Tensor] = []

        def visit(wire: str, hidden: torch.Tensor) -> torch.Tensor | None:
            if wire != self.source.wire:
                met.append(hidden)
                return None
            leaf = hidden.detach() if place is None else place(hidden.detach()).to(hidden.dtype)
            put.append(leaf.requires_grad_())
            return put[-1]

        args, kwargs = walked.inputs_of(self.model, batch)
        targets = {self.target.wire: self.target} if self.target else {}
        with walked.running(self.model, batch), Tap(self.model, {self.source.wire: self.source} | targets, visit):
            result = self.model(*args, **kwargs)
        for wire, seen in ((self.source.wire, put), (self.target.wire if self.target else "", met)):
            if len(seen) > 1:
                raise InputError(f"the values of {wire} are computed {len(seen)} times in one run (by parameters that are shared); "
                                 "an interaction is between values that are computed once")
        if not put:
            return None
        target = met[0] if met else None
        if self.target is None:
            target = self.output(result)
            if not isinstance(target, torch.Tensor) or not target.is_floating_point():
                raise InputError("the model's output holds no tensor of floating-point numbers first; give output=function that "
                                 "takes it and returns a tensor whose last dimension counts features")
        return Run(put[0], target if target is None or target.ndim > 1 else target[None], self.leads, walked.examples(batch),
                   _mask(self.mask, batch))


class Pull:
    """Derivatives of the target of a run, in a basis, by the values that were put in.

    Args:
        run: with a target.
        basis: (features, directions), float64.
        wires: names of source and target, for messages.
    """

    def __init__(self, run: Run, basis: torch.Tensor, wires: tuple[str, str]) -> None:
        self.run, self.basis = run, basis
        target = run.target
        if target is None or not target.requires_grad:
            raise InputError(f"{wires[1]} does not depend on the values of {wires[0]}, or is computed from them without gradients: "
                             "the later wire must come second, and nothing between may be under torch.no_grad or detached")
        self._prepare()
        if run.examples > 1 and self._mixed():
            self.together()

    def together(self) -> None:
        """Take derivatives of the whole batch, not of each example."""
        self.run.examples = 1
        self._prepare()

    def _prepare(self) -> None:
        reached = self.run.reached()
        assert reached is not None
        self.out = reached.to(self.basis.dtype) @ self.basis
        _, positions, directions = self.out.shape
        places = torch.arange(positions, device=self.out.device)
        self.kept = self.run.kept(positions, 1)
        if self.kept is not None:
            places = places[self.kept.any(0)]
        self.pairs = torch.cartesian_prod(places, torch.arange(directions, device=self.out.device)).view(-1, 2)
        self.chunk = max(1, PULLED // (8 * (self.run.leaf.numel() + self.out.numel())))

    def _mixed(self) -> bool:
        """Whether an example's target depends on the values of another: any two differ in a bit of their numbers."""
        number = torch.arange(self.run.examples, device=self.out.device)
        weights = torch.cos(torch.arange(self.out.numel(), device=self.out.device, dtype=self.out.dtype)).view_as(self.out)
        bits = (self.run.examples - 1).bit_length()
        chosen = torch.stack([(number >> bit) % 2 == value for bit in range(bits) for value in (0, 1)])
        parts = chosen.split(self.chunk)
        return any(bool(self.back(weights * part[:, :, None, None])[~part].any()) for part in parts)

    def back(self, cotangents: torch.Tensor) -> torch.Tensor:
        """(n, examples, positions, neurons) from cotangents (n, *target in the basis)."""
        leaf, lead = self.run.leaf, self.run.leads[0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of operations that are taken one by one
                found = torch.autograd.grad(self.out, leaf, cotangents, retain_graph=True, is_grads_batched=True)[0]
        except RuntimeError:
            found = torch.stack([torch.autograd.grad(self.out, leaf, one, retain_graph=True)[0] for one in cotangents])
        if lead:
            found = found.movedim(lead + 1, 1)
        return found.reshape(len(cotangents), self.run.examples, -1, leaf.shape[-1]).to(self.out.dtype)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Pairs (position, direction) of the target, some at once."""
        return iter(self.pairs.split(self.chunk))

    def rows(self, pairs: torch.Tensor) -> torch.Tensor:
        """Derivatives of these pairs of each example: (pairs, examples, positions, neurons)."""
        cotangents = torch.zeros(len(pairs), *self.out.shape, dtype=self.out.dtype, device=self.out.device)
        number = torch.arange(len(pairs), device=self.out.device)
        cotangents[number, :, pairs[:, 0], pairs[:, 1]] = 1
        if self.kept is not None:
            cotangents *= self.kept[:, :, None]
        found = self.back(cotangents)
        kept = self.run.kept(found.shape[2], 0)
        return found if kept is None else found * kept[:, :, None]
