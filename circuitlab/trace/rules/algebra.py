"""Functions of whole matrices, and of counts: leading dimensions pass, nothing is claimed of the rest."""

from __future__ import annotations

from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.contract import product
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern, axis_of, elementwise, set_role
from circuitlab.trace.rules.pointwise import reduce
from circuitlab.trace.wires import Wires

MATRIX = (
    "linalg_inv linalg_pinv linalg_det linalg_slogdet linalg_cholesky linalg_qr linalg_svd linalg_svdvals linalg_eig "
    "linalg_eigh linalg_eigvals linalg_eigvalsh linalg_matrix_exp linalg_matrix_power linalg_matrix_rank linalg_lu "
    "linalg_inv_ex linalg_cholesky_ex linalg_lu_factor linalg_lu_factor_ex linalg_ldl_factor linalg_ldl_factor_ex "
    "linalg_cond linalg_tensorinv geqrf cholesky_inverse lu inverse det logdet slogdet cholesky qr svd matrix_exp "
    "matrix_power pinverse"
)
MATRICES = (
    "linalg_solve linalg_solve_ex linalg_solve_triangular linalg_lstsq linalg_lu_solve linalg_ldl_solve "
    "linalg_householder_product cholesky_solve triangular_solve lu_solve lu_unpack ormqr"
)


def matrix(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Each matrix of a batch on its own: inverses, determinants, decompositions."""
    if input.ndim < 2 or any(operand.ndim for operand in event.operands if operand.slot != input.slot):
        raise NoRuleError
    pattern = Pattern("box")
    for operand in event.operands:
        pattern.take(operand)
    slots = pattern.ins[input.slot]
    lead = input.ndim - 2
    set_role([letter for letters in slots[lead:] for letter in letters], "ordered")
    for out in event.outs:
        if out.shape[:lead] != input.shape[:lead]:
            raise NoRuleError
        rest = [pattern.new(w, size, "ordered", "matrix", event.name) for size in out.shape[lead:]]
        pattern.out([*slots[:lead], *rest])
    return pattern


def matrices(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """Matrices of a batch with matrices of a batch of the same shape: solving, multiplying factors out."""
    first = event.operands[0]
    lead = first.ndim - 2
    if lead < 0 or any(operand.shape[:lead] != first.shape[:lead] for operand in event.operands):
        raise NoRuleError
    pattern = Pattern("box")
    slots = pattern.take(first)
    for operand in event.operands[1:]:
        own = pattern.take(operand)
        for axis in range(lead):
            w.unify(first.dims[axis], operand.dims[axis])
            set_role(slots[axis], "diagonal")
            own[axis] = slots[axis]
        set_role([letter for letters in own[lead:] for letter in letters], "ordered")
    set_role([letter for letters in slots[lead:] for letter in letters], "ordered")
    for out in event.outs:
        if out.shape == (0,):
            pattern.out([[]])
            continue
        if out.shape[:lead] != first.shape[:lead]:
            raise NoRuleError
        rest = [pattern.new(w, size, "ordered", "matrix", event.name) for size in out.shape[lead:]]
        pattern.out([*slots[:lead], *rest])
    return pattern


def matrix_norm(
    w: Wires, event: Event, input: Operand, order: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, **kwargs: Any
) -> Pattern:
    """The norm of matrices, which rows and columns may be permuted in."""
    if any(operand.ndim for operand in event.operands if operand.slot != input.slot):
        raise NoRuleError
    return reduce(w, event, input, list(dim), keepdim=keepdim)


def cross(w: Wires, event: Event, input: Operand, other: Operand, dim: int | None = None, **kwargs: Any) -> Pattern:
    """The cross product along a dimension of size 3."""
    shape = event.outs[0].shape
    if dim is None:
        dim = -1 if event.fn.startswith("linalg") else next(n for n, size in enumerate(shape) if size == 3)
    pattern = elementwise(w, event, event.operands, shape, "box")
    set_role(pattern.outs[0][axis_of(dim, len(shape))], "ordered")
    return pattern


def member(w: Wires, event: Event, elements: Operand, test: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Entry by entry, whether it is among others."""
    pattern = Pattern("box")
    pattern.take(test, "reduced")
    pattern.out(pattern.take(elements))
    return pattern


def counts(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """How often each value occurs: histc, bincount."""
    pattern = Pattern("box")
    for operand in event.operands:
        set_role([letter for letters in pattern.take(operand) for letter in letters], "ordered")
    for out in event.outs:
        pattern.out([pattern.new(w, size, "ordered", "counts", event.name) for size in out.shape])
    return pattern


def buckets(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """Entry by entry, the number of the interval that it lies in; each row in boundaries of its own, if there are any."""
    input, boundaries = event.operands if event.fn == "bucketize" else event.operands[1::-1]
    if len(event.operands) > 2 or event.outs[0].shape != input.shape:
        raise NoRuleError
    pattern = Pattern("box")
    slots, bounds = pattern.take(input), pattern.take(boundaries)
    if boundaries.ndim > 1:
        for axis in range(input.ndim - 1):
            w.unify(input.dims[axis], boundaries.dims[axis])
            set_role(slots[axis], "diagonal")
            bounds[axis] = slots[axis]
    set_role(bounds[-1], "ordered")
    pattern.out(slots)
    return pattern


def grouped_mm(w: Wires, event: Event, input: Operand, mat2: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Rows of one array, in runs, each run times the matrix of its group: ``n k, g k m -> n m``.

    Also ``g n k, g k m -> g n m``; and where runs lie elsewhere, ``g n k, k m -> n m`` and ``n k, k m -> g n m``.
    """
    offsets = kwargs.get("offs", args[0] if args else None)
    if kwargs.get("bias") is not None or len(args) > 1:
        raise NoRuleError
    ranks = (input.ndim, mat2.ndim)
    if ranks == (3, 3):
        return product(w, event, [(input, "gnk"), (mat2, "gkm")], "gnm")
    if not isinstance(offsets, Operand):
        raise NoRuleError
    learned = any(operand.value.learned and operand.value.static for operand in (input, mat2))
    pattern = Pattern("linear" if learned else "contract")
    left, right = pattern.take(input), pattern.take(mat2)
    groups = pattern.take(offsets, "ordered")[0]
    w.unify(input.dims[-1], mat2.dims[-2])
    right[-2] = left[-1]
    set_role(left[-1], "contracted" if ranks != (2, 2) else "ordered")
    rows, columns = left[-2], right[-1]
    if learned and mat2.value.learned:
        set_role(columns, "created")
    if ranks == (2, 2):
        pattern.out([groups, rows, columns])
        return pattern
    set_role(rows if ranks == (2, 3) else columns, "ordered")
    whole = mat2 if ranks == (2, 3) else input
    w.unify(whole.dims[0], offsets.dims[0])
    pattern.ins[whole.slot][0] = [Letter("gathered", whole.dims[0])] if whole.dims[0] else []
    pattern.out([rows, columns])
    return pattern
