"""Products: linear, matmul, einsum and all that sum over a shared index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern, Slots
from circuitlab.trace.wires import Wires


def product(
    w: Wires, event: Event, terms: Sequence[tuple[Operand, str]], result: str, bias: Operand | None = None
) -> Pattern:
    """An einsum over lettered dimensions; a size-1 dimension stretches to its letter's size.

    Args:
        w, event: as rules get them.
        terms: operands, each with one letter for every dimension.
        result: the letters of the result.
        bias: added to the result, aligned to its last dimensions.
    """
    learned = [operand for operand, _ in terms if operand.value.static and operand.value.learned]
    pattern = Pattern("linear" if learned and len(learned) < len(terms) else "contract")
    letters: dict[str, Letter] = {}
    owners: dict[str, list[Operand]] = {}
    for operand, sign in terms:
        if len(sign) != operand.ndim:
            raise NoRuleError
        slots: Slots = []
        for char, dim in zip(sign, operand.dims, strict=True):
            if not dim:
                slots.append([])
                continue
            if char in letters:
                w.unify(letters[char].atoms, dim)
            else:
                letters[char] = Letter("", dim)
            owners.setdefault(char, []).append(operand)
            slots.append([letters[char]])
        pattern.ins[operand.slot] = slots
    for char, letter in letters.items():
        several = len(owners[char]) > 1
        if char not in result:
            letter.role = "contracted" if several else "reduced"
        elif several:
            letter.role = "diagonal"
        else:
            letter.role = "created" if owners[char][0] in learned and pattern.kind == "linear" else "broadcast"
    pattern.out([[letters[char]] if char in letters else [] for char in result])
    if bias is not None:
        _add_bias(w, pattern, bias)
    return pattern


def _add_bias(w: Wires, pattern: Pattern, bias: Operand) -> None:
    pattern.attrs["bias"] = True
    columns = pattern.outs[0]
    offset = len(columns) - bias.ndim
    slots: Slots = []
    for axis, dim in enumerate(bias.dims):
        column = columns[offset + axis]
        if not dim:
            slots.append([])
        elif column:
            w.unify(column[0].atoms, dim)
            slots.append(column)
        else:
            columns[offset + axis] = [Letter("created", dim)]
            slots.append(columns[offset + axis])
    pattern.ins[bias.slot] = slots


def _signs(count: int, start: int = 0) -> str:
    return "".join(chr(0x100 + start + n) for n in range(count))


def linear(w: Wires, event: Event, input: Operand, weight: Operand, bias: Operand | None = None) -> Pattern:
    """``... i, o i -> ... o``."""
    lead = _signs(input.ndim - 1)
    out = "o" if weight.ndim == 2 else ""
    return product(w, event, [(input, lead + "i"), (weight, out + "i")], lead + out, bias)


def bilinear(
    w: Wires, event: Event, input1: Operand, input2: Operand, weight: Operand, bias: Operand | None = None
) -> Pattern:
    """``... i, ... j, o i j -> ... o``."""
    lead = _signs(input1.ndim - 1)
    return product(w, event, [(input1, lead + "i"), (input2, lead + "j"), (weight, "oij")], lead + "o", bias)


def matmul(w: Wires, event: Event, input: Operand, other: Operand) -> Pattern:
    """Matrix product with broadcast leading dimensions; vectors as torch has them."""
    lead = _signs(max(input.ndim, other.ndim, 2) - 2)
    left = lead[len(lead) - max(input.ndim - 2, 0) :] + ("ik" if input.ndim > 1 else "k")
    right = lead[len(lead) - max(other.ndim - 2, 0) :] + ("kj" if other.ndim > 1 else "k")
    result = lead + ("i" if input.ndim > 1 else "") + ("j" if other.ndim > 1 else "")
    return product(w, event, [(input, left), (other, right)], result)


def rmatmul(w: Wires, event: Event, input: Operand, other: Operand) -> Pattern:
    """``other @ input``."""
    return matmul(w, event, other, input)


def outer(w: Wires, event: Event, input: Operand, vec2: Operand) -> Pattern:
    """``i, j -> i j``."""
    return product(w, event, [(input, "i"), (vec2, "j")], "ij")


def inner(w: Wires, event: Event, input: Operand, other: Operand) -> Pattern:
    """``... k, ... k -> ... ...``."""
    if not input.ndim or not other.ndim:
        return product(w, event, [(input, _signs(input.ndim)), (other, _signs(other.ndim))], _signs(max(input.ndim, other.ndim)))
    left, right = _signs(input.ndim - 1), _signs(other.ndim - 1, 100)
    return product(w, event, [(input, left + "k"), (other, right + "k")], left + right)


def vecdot(w: Wires, event: Event, x: Operand, y: Operand, *args: Any, dim: int = -1, **kwargs: Any) -> Pattern:
    """Products of vectors along one dimension, the others broadcast."""
    ndim = max(x.ndim, y.ndim)
    signs = _signs(ndim)
    contracted = dim % ndim
    result = signs[:contracted] + signs[contracted + 1 :]
    return product(w, event, [(x, signs[ndim - x.ndim :]), (y, signs[ndim - y.ndim :])], result)


def chain(w: Wires, event: Event, *matrices: Any, **kwargs: Any) -> Pattern:
    """A product of matrices; the first and the last may be vectors."""
    operands = event.operands
    signs = [chr(0x300 + n) + chr(0x301 + n) for n in range(len(operands))]
    if operands[0].ndim == 1:
        signs[0] = signs[0][1:]
    if operands[-1].ndim == 1:
        signs[-1] = signs[-1][:1]
    named = "".join(signs)
    return product(w, event, list(zip(operands, signs, strict=True)), "".join(c for c in named if named.count(c) == 1))


def trace(w: Wires, event: Event, input: Operand) -> Pattern:
    """``i i ->``; a matrix that is not square is summed by position."""
    pattern = Pattern("reduce")
    slots = pattern.take(input, "ordered")
    if input.shape[0] == input.shape[1]:
        w.unify(input.dims[0], input.dims[1])
        slots[1] = slots[0]
        for letter in slots[0]:
            letter.role = "reduced"
    pattern.out([])
    return pattern


def kron(w: Wires, event: Event, input: Operand, other: Operand) -> Pattern:
    """``a b, c d -> (a c) (b d)``."""
    pattern = Pattern("contract")
    left, right = pattern.take(input), pattern.take(other)
    ndim = max(len(left), len(right))
    left, right = [[]] * (ndim - len(left)) + left, [[]] * (ndim - len(right)) + right
    pattern.out([[*a, *b] for a, b in zip(left, right, strict=True)])
    return pattern


def cov(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Each row against each: ``i n -> i i``."""
    if len(event.operands) > 1:
        raise NoRuleError
    pattern = Pattern("contract")
    slots = pattern.take(input)
    for letter in slots[-1] if slots else []:
        letter.role = "contracted"
    pattern.out([slots[0], slots[0]] if input.ndim == 2 else [])
    return pattern


def addmm(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """input + mat1 mat2 (addmm, baddbmm, addmv), summed over the batch (addbmm), or of vectors (addr)."""
    names = ("mat1", "batch1", "mat", "vec1", "mat2", "batch2", "vec", "vec2")
    given = [*args, *(kwargs[key] for key in names if key in kwargs)]
    mat1, mat2 = [item for item in given if isinstance(item, Operand)][:2]
    if event.fn.startswith("addr"):
        return product(w, event, [(mat1, "i"), (mat2, "j")], "ij", input)
    if event.fn.startswith("addbmm"):
        return product(w, event, [(mat1, "bik"), (mat2, "bkj")], "ij", input)
    right = "kj" if mat2.ndim > 1 else "k"
    lead = "b" if mat1.ndim == 3 else ""
    result = lead + "i" + ("j" if mat2.ndim > 1 else "")
    return product(w, event, [(mat1, lead + "ik"), (mat2, lead + right)], result, input)


def tensordot(w: Wires, event: Event, a: Operand, b: Operand, dims: Any = 2, *args: Any, **kwargs: Any) -> Pattern:
    """Contract dimensions of a with dimensions of b, in pairs."""
    if isinstance(dims, int):
        pairs = [(a.ndim - dims + n, n) for n in range(dims)]
    else:
        first, second = dims
        pairs = [(i % a.ndim, j % b.ndim) for i, j in zip(first, second, strict=True)]
    left, right = list(_signs(a.ndim)), list(_signs(b.ndim, 100))
    for i, j in pairs:
        right[j] = left[i]
    shared = {left[i] for i, _ in pairs}
    result = [c for c in (*left, *right) if c not in shared]
    return product(w, event, [(a, "".join(left)), (b, "".join(right))], "".join(result))


def einsum(w: Wires, event: Event, equation: Any, *operands: Any, **kwargs: Any) -> Pattern:
    """Any einsum with an equation in text, or in sublists."""
    if not isinstance(equation, str):
        return einsum(w, event, *_from_sublists((equation, *operands)))
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    left, arrow, result = equation.replace(" ", "").partition("->")
    signs = left.split(",")
    if len(signs) != len(operands):
        raise NoRuleError
    spread = max((o.ndim - len(s.replace("...", "")) for o, s in zip(operands, signs, strict=True) if "..." in s),
                 default=0)
    filler = _signs(spread)
    full: list[str] = []
    for operand, sign in zip(operands, signs, strict=True):
        count = operand.ndim - len(sign.replace("...", ""))
        full.append(sign.replace("...", filler[spread - count :]))
    if not arrow:
        named = "".join(full)
        result = filler + "".join(sorted(c for c in set(named) if named.count(c) == 1 and c not in filler))
    return product(w, event, list(zip(operands, full, strict=True)), result.replace("...", filler))


def _from_sublists(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def sign(numbers: Any) -> str:
        return "".join("..." if n is Ellipsis else chr(0x200 + n) for n in numbers)

    operands, lists = list(args[: len(args) // 2 * 2 : 2]), list(args[1 : len(args) // 2 * 2 : 2])
    result = f"->{sign(args[-1])}" if len(args) % 2 else ""
    return (",".join(map(sign, lists)) + result, *operands)


def cdist(w: Wires, event: Event, x1: Operand, x2: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Distances between all pairs of rows: ``... i k, ... j k -> ... i j``."""
    lead = _signs(max(x1.ndim, x2.ndim) - 2)
    return product(
        w,
        event,
        [(x1, lead[len(lead) - x1.ndim + 2 :] + "ik"), (x2, lead[len(lead) - x2.ndim + 2 :] + "jk")],
        lead + "ij",
    )
