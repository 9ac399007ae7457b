"""Matching by what wires hold: correlations of the entries of two models over the same inputs.

A wire is read where a map makes it and where an op sums over it: before and after activations and norms. (After them alone,
units that never fire on the batches could not be told apart.) Correlations are streamed over batches; no activations are
kept beyond one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.alignment_arrays import axes_of, pieces
from circuitlab.analysis.symmetry import Symmetry
from circuitlab.circuit import Circuit
from circuitlab.errors import InputError
from circuitlab.trace.record import record, trace
from circuitlab.trace.watch import Recorder

Cut = tuple[tuple[slice, ...], tuple[tuple[str, ...], ...]]


@dataclass
class _Sums:
    """Sums over positions of the entries of A, of B, and of their products."""

    a: torch.Tensor
    b: torch.Tensor
    squares_a: torch.Tensor
    squares_b: torch.Tensor
    products: torch.Tensor
    n: int = 0

    def add(self, one: torch.Tensor, two: torch.Tensor) -> None:
        self.a += one.sum(0)
        self.b += two.sum(0)
        self.squares_a += (one**2).sum(0)
        self.squares_b += (two**2).sum(0)
        self.products += one.T @ two
        self.n += len(one)

    def correlation(self) -> torch.Tensor:
        """Pearson's, of each entry of A with each of B; 0 for an entry that never changes."""
        mean_a, mean_b = self.a / self.n, self.b / self.n
        spread_a, spread_b = (
            (squares / self.n - mean**2).clamp(min=0).sqrt() for squares, mean in ((self.squares_a, mean_a), (self.squares_b, mean_b))
        )
        size = spread_a[:, None] * spread_b
        together = self.products / self.n - mean_a[:, None] * mean_b
        floor = 1e-12 * (self.squares_a[:, None] * self.squares_b).sqrt() / self.n
        return torch.where(size > floor, together / size, 0.0)


def activations(
    symmetry: Symmetry, model_a: torch.nn.Module, model_b: torch.nn.Module, batches: Any, progress: bool
) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """Arrays for an alignment whose objective is the sum of correlations of entries that are matched.

    Raises:
        InputError: a wire that no tensor of the run has once, or batches on which the two models run differently.
    """
    with walked.evaluated(model_a) as one, walked.evaluated(model_b) as two:
        device = walked.device_of(one)
        sums: dict[tuple[str, str], _Sums] = {}
        plan: dict[str, list[tuple[str, Cut, tuple[str, ...]]]] = {}
        for number, batch in walked.walk(batches, device, what="correlating activations", progress=progress):
            args, kwargs = walked.inputs_of(one, batch)
            if not number:
                plan = _plan(trace(one, *args, **kwargs), symmetry)
            held = _read(one, args, kwargs, plan)
            for key, values in _read(two, args, kwargs, plan).items():
                if key not in held or held[key].shape != values.shape:
                    raise InputError(f"on batch {number} the models do not run alike: {key[0]} is computed by one of them alone, or in another shape")
                if key not in sums:
                    a, b, squares_a, squares_b = values.new_zeros(4, values.shape[1]).unbind()
                    sums[key] = _Sums(a, b, squares_a, squares_b, values.new_zeros(values.shape[1], values.shape[1]))
                sums[key].add(held[key], values)
    found: dict[tuple[str, ...], torch.Tensor] = {}
    for readings in plan.values():
        for tensor, cut, axes in readings:
            key = (tensor, str(cut))
            if key in sums:
                made = sums[key].correlation()
                found[axes] = found[axes] + made if axes in found else made
    terms: list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]] = []
    for axes, correlation in found.items():
        shape = [symmetry.circuit.wires[wire].size for wire in axes]
        eye = torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
        terms.append((eye.reshape(*shape, -1), correlation.T.reshape(*shape, -1), (*axes, "")))
    missing = [name for name in symmetry.wires if not any(name in axes for axes in found)]
    if missing:
        raise InputError(f"no tensor of the run has {', '.join(missing)} as an axis once, so its entries cannot be correlated; "
                         "match by method='weights'")
    return terms


def _plan(circuit: Circuit, symmetry: Symmetry) -> dict[str, list[tuple[str, Cut, tuple[str, ...]]]]:
    """Op -> what is read of its outputs: (tensor, where and as what axes, those that are wires to be matched)."""
    around = {other for name in symmetry.wires for other in (name, *symmetry.within[name])}
    names = {frozenset(wire.places): name for name, wire in symmetry.circuit.wires.items() if name in around}
    wires = {name: names[frozenset(w.places)] for name, w in circuit.wires.items() if w.places and frozenset(w.places) in names}
    read: dict[str, set[str]] = {}
    for op in circuit.ops:
        for axis in op.axes:
            made = [op.outputs[number] for number, _, _ in axis.outs] if op.kind in ("linear", "conv") and axis.role == "created" else []
            for tensor in [op.inputs[number] for number, _, _ in axis.ins] if axis.role == "contracted" else made:
                read.setdefault(tensor, set()).add(axis.wire)
    found: dict[str, list[tuple[str, Cut, tuple[str, ...]]]] = {}
    met: set[str] = set()
    for first in (True, False):
        for tensor in circuit.tensors:
            if not tensor.op or tensor.kind != "value" or (not first and circuit.op(tensor.op).kind == "reindex"):
                continue
            for cut, products in _cuts(circuit, tensor.name):
                inside = [wire for names in products for wire in names]
                counting = set(axes_of(symmetry, [wires.get(wire, "") for wire in inside])) - {""}
                axes = [wires[wire] for wire in inside if wires.get(wire, "") in counting]
                wanted = bool(read.get(tensor.name, set()) & set(inside)) if first else any(axis not in met for axis in axes)
                if axes and len(set(axes)) == len(axes) and wanted:
                    # as the caller names the wires; what it does not match is "" and counts as positions
                    named = tuple(tuple(wires[w] if wires.get(w, "") in counting else "" for w in names) for names in products)
                    found.setdefault(tensor.op, []).append((tensor.name, (cut, named), tuple(axes)))
        met |= {axis for readings in found.values() for *_, axes in readings for axis in axes}
    return {op: [(tensor, _sized(symmetry, cut), axes) for tensor, cut, axes in readings] for op, readings in found.items()}


def _sized(symmetry: Symmetry, cut: Cut) -> Any:
    """A cut whose axes are told by their sizes, -1 for positions."""
    where, products = cut
    return where, tuple(tuple(symmetry.circuit.wires[name].size if name else -1 for name in names) for names in products)


def _cuts(circuit: Circuit, name: str) -> Iterator[tuple[tuple[slice, ...], tuple[tuple[str, ...], ...]]]:
    """The parts of a tensor that are plain products of wires: (slices, wires of each dimension)."""
    tensor = circuit.tensor(name)
    for cut, names in pieces(circuit, tensor):
        products, at = list[tuple[str, ...]](), 0
        for where in cut:
            size, start = 1, at
            while size < where.stop - where.start or (at < len(names) and circuit.wires[names[at]].size == 1):
                size *= circuit.wires[names[at]].size
                at += 1
            products.append(names[start:at])
        whole = [where.stop - where.start == size for where, size in zip(cut, tensor.shape, strict=True)]
        yield tuple(slice(None) if all_of else where for where, all_of in zip(cut, whole, strict=True)), tuple(products)


class _Reader(Recorder):
    """Keeps what is wanted of a run."""

    plan: Mapping[str, list[tuple[str, Any, tuple[str, ...]]]]
    held: dict[tuple[str, str], torch.Tensor]

    def after(self, event: Any, func: Any, before: Any, results: list[torch.Tensor]) -> None:
        wanted = {out.name: result for out, result in zip(event.outs, results, strict=False)}
        for tensor, (where, products), _ in self.plan.get(event.name, ()):
            if tensor in wanted:
                self.held[tensor, str((where, products))] = _positions(wanted[tensor].detach()[where], products)


def _positions(values: torch.Tensor, products: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """An array as (positions, entries of its wires), in double precision, or single where there is no double."""
    shape: list[int] = []
    wired: list[bool] = []
    for size, factors in zip(values.shape, products, strict=True):
        known = 1
        for factor in factors:
            known *= max(factor, 1)
        spare = size // known
        for factor in factors or (-1,):
            shape.append(factor if factor > 0 else spare)
            wired.append(factor > 0)
            spare = spare if factor > 0 else 1
    turned = values.reshape(shape)
    order = [n for n, is_wire in enumerate(wired) if not is_wire] + [n for n, is_wire in enumerate(wired) if is_wire]
    entries = 1
    for size, is_wire in zip(shape, wired, strict=True):
        entries *= size if is_wire else 1
    turned = turned.permute(order).reshape(-1, entries)
    return turned.float() if turned.device.type == "mps" else turned.double()


def _read(model: torch.nn.Module, args: Any, kwargs: Any, plan: Any) -> dict[tuple[str, str], torch.Tensor]:
    reader = type("Reader", (_Reader,), {"plan": plan, "held": {}})
    with walked.running(model, (*args, kwargs) if kwargs else args):
        record(model, args, kwargs, meta=False, recorder_class=reader)
    held = dict(reader.held)
    reader.held.clear()  # a class waits for the garbage collector
    return held
