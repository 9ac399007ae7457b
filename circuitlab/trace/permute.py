"""Permuting wires of a module: its parameters and buffers move, and its function stays.

A permutation of a wire is an index: entry i of the new wire is entry ``index[i]`` of the old one. Where a wire stands
within others everywhere (the entries of each head within the heads), each index of those may have a permutation of its
own: ``index[h]`` is then that of the new head h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from circuitlab.circuit import Circuit, unknown
from circuitlab.errors import InputError, VerificationError
from circuitlab.trace.claims import draw_index, product_of
from circuitlab.trace.guard import copy_model, own
from circuitlab.trace.permutable import Part, nesting


def permute(circuit: Circuit, model: torch.nn.Module, permutations: Mapping[str, Any]) -> torch.nn.Module:
    """A copy of a module with wires permuted everywhere they sit: the same function, other numbers.

    Args:
        circuit: traced from this module.
        model: is not changed.
        permutations: wire name -> permutation of its entries (``LongTensor`` of the wire's size): entry i of the
            copy's wire is entry ``permutation[i]`` of the module's. A wire that stands within others, such as the
            entries of each head, also takes one permutation for each index of those: see
            `circuitlab.analysis.symmetry.Symmetry`.

    Returns:
        the copy.

    Raises:
        InputError: an unknown or frozen wire, or not a permutation of its size.
        VerificationError: another module than the circuit was traced from.
    """
    within = nesting(circuit)
    checked = {name: check(circuit, within, name, given) for name, given in permutations.items()}
    copied, _, _ = copy_model(model, (), convert=own)
    move(circuit, copied, within, checked)
    return copied


def check(circuit: Circuit, within: Mapping[str, tuple[str, ...]], name: str, given: Any) -> torch.Tensor:
    """A permutation of a wire as a ``LongTensor`` on the CPU; what is none is an `InputError`."""
    wire = circuit.wires.get(name)
    if wire is None:
        raise unknown("permutable wire", name, [w.name for w in circuit.wires.values() if w.permutable])
    if not wire.permutable:
        raise InputError(f"the wire {name!r} is not permutable: {wire.why}")
    index = given if isinstance(given, torch.Tensor) else torch.as_tensor(given, device="cpu")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise InputError(f"a permutation of the wire {name!r} holds integers, and {index.dtype} was given")
    index = index.long().cpu()
    outer = tuple(circuit.wires[other].size for other in within.get(name, ()))
    ordered = torch.arange(wire.size, device="cpu").expand(index.shape[:-1] + (wire.size,))
    if index.shape not in ((wire.size,), (*outer, wire.size)) or not torch.equal(index.sort(-1)[0], ordered):
        shapes = f"[{wire.size}]" + (f" or {[*outer, wire.size]}" if outer else "")
        raise InputError(f"the wire {name!r} has {wire.size} entries; a permutation of 0..{wire.size - 1} is needed, of "
                         f"shape {shapes}, and one of shape {list(index.shape)} was given: {index.flatten()[:8].tolist()}")
    return index


def draw(
    circuit: Circuit, within: Mapping[str, tuple[str, ...]], name: str, generator: torch.Generator
) -> torch.Tensor:
    """A random permutation of a wire, one for each index of the wires that it stands within."""
    outer = [circuit.wires[other].size for other in within.get(name, ())]
    rows = [draw_index(circuit.wires[name].size, False, generator) for _ in range(math.prod(outer))]
    return torch.stack(rows).reshape(*outer, -1)


def move(
    circuit: Circuit,
    model: torch.nn.Module,
    within: Mapping[str, tuple[str, ...]],
    permutations: Mapping[str, torch.Tensor],
) -> None:
    """Permute parameters and buffers in place."""
    state = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    with torch.no_grad():
        # outer wires first: the permutations within are told by the new index
        for name in sorted(permutations, key=lambda name: len(within.get(name, ()))):
            for tensor, dim, factor, part in circuit.wires[name].places:
                shape = circuit.tensor(tensor).shape
                if tensor not in state or tuple(state[tensor].shape) != shape:
                    got = f"of shape {list(state[tensor].shape)}" if tensor in state else "missing"
                    raise VerificationError(f"the module is not the one that was traced: its {tensor!r} is {got}, and the "
                                            f"circuit has it with shape {list(shape)}")
                target = state[tensor]
                outer = within.get(name, ()) if permutations[name].ndim > 1 else ()
                target.copy_(_moved(circuit, target, (tensor, dim, factor, part), permutations[name], outer))


def _moved(
    circuit: Circuit, target: torch.Tensor, place: tuple[str, int, int, Part], index: torch.Tensor, outer: tuple[str, ...]
) -> torch.Tensor:
    """A tensor with one place of a wire permuted."""
    _, dim, _, part = place
    if part is None:
        return _inside(circuit, target, place, index, outer)
    start, stop = part
    made = target.clone()
    made.narrow(dim, start, stop - start).copy_(
        _inside(circuit, target.narrow(dim, start, stop - start), place, index, outer))
    return made


def _inside(
    circuit: Circuit, target: torch.Tensor, place: tuple[str, int, int, Part], index: torch.Tensor, outer: tuple[str, ...]
) -> torch.Tensor:
    name, dim, factor, part = place
    products = list(circuit.tensor(name).dims)
    products[dim] = product_of(circuit, name, dim, part)
    wires = [wire for product in products for wire in product]
    wide = target.reshape([circuit.wires[wire].size for wire in wires])
    axis = sum(len(product) for product in products[:dim]) + factor
    index = index.to(target.device)
    if not outer:
        return wide.index_select(axis, index).reshape(target.shape)
    # the index's axes, put where its wires stand
    at = {wires.index(other): n for n, other in enumerate(outer)} | {axis: len(outer)}
    turned = index.permute([at[where] for where in sorted(at)])
    shape = [turned.shape[sorted(at).index(n)] if n in at else 1 for n in range(len(wires))]
    return torch.take_along_dim(wide, turned.reshape(shape), axis).reshape(target.shape)
