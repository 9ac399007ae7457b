"""Functions of whole matrices, and of counts: leading dimensions pass, nothing is claimed of the rest."""

from __future__ import annotations

from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern, Slots, set_role
from circuitlab.trace.wires import Wires

MATRIX = (
    "linalg_inv linalg_pinv linalg_det linalg_slogdet linalg_cholesky linalg_qr linalg_svd linalg_svdvals linalg_eig "
    "linalg_eigh linalg_eigvals linalg_eigvalsh linalg_matrix_exp linalg_matrix_power linalg_matrix_rank linalg_lu "
    "inverse det logdet slogdet cholesky qr svd matrix_exp matrix_power pinverse"
)


def matrix(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Each matrix of a batch on its own: inverses, determinants, decompositions."""
    if input.ndim < 2 or len(event.operands) > 1:
        raise NoRuleError
    pattern = Pattern("box")
    slots = pattern.take(input)
    lead = input.ndim - 2
    set_role([letter for letters in slots[lead:] for letter in letters], "ordered")
    for out in event.outs:
        if out.shape[:lead] != input.shape[:lead]:
            raise NoRuleError
        rest = [pattern.new(w, size, "ordered", "matrix", event.name) for size in out.shape[lead:]]
        pattern.out([*slots[:lead], *rest])
    return pattern


def counts(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """How often each value occurs: histc, bincount."""
    pattern = Pattern("box")
    for operand in event.operands:
        set_role([letter for letters in pattern.take(operand) for letter in letters], "ordered")
    for out in event.outs:
        pattern.out([pattern.new(w, size, "ordered", "counts", event.name) for size in out.shape])
    return pattern


def buckets(w: Wires, event: Event, input: Operand, boundaries: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Entry by entry, the number of the interval that it lies in."""
    if boundaries.ndim != 1 or event.outs[0].shape != input.shape:
        raise NoRuleError
    pattern = Pattern("box")
    slots = pattern.take(input)
    set_role(pattern.take(boundaries)[0], "ordered")
    pattern.out(slots)
    return pattern


def grouped_mm(w: Wires, event: Event, input: Operand, weight: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Rows of one array, in runs, each run times the matrix of its group: ``n k, g k m -> n m``."""
    if (input.ndim, weight.ndim) != (2, 3) or kwargs.get("bias") is not None:
        raise NoRuleError
    pattern = Pattern("linear" if weight.value.learned and weight.value.static else "contract")
    for operand in event.operands:
        set_role([letter for letters in pattern.take(operand) for letter in letters], "ordered")
    rows: Slots = [[Letter("ordered", input.dims[0])] if input.dims[0] else []]
    inner = Letter("contracted", input.dims[1])
    w.unify(input.dims[1], weight.dims[1])
    made = [Letter("created", weight.dims[2])] if weight.dims[2] else []
    pattern.ins[input.slot] = [*rows, [inner] if input.dims[1] else []]
    pattern.ins[weight.slot][0] = [Letter("gathered", weight.dims[0])] if weight.dims[0] else []
    pattern.ins[weight.slot][1:] = [[inner] if input.dims[1] else [], made]
    pattern.out([*rows, made])
    return pattern
