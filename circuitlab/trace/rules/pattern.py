"""What a rule says: an einops-like pattern of an op's dimensions, and the role of each letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.wires import ClashError, Dim, Wires, leaves, size_of


class NoRuleError(Exception):
    """The rule does not cover this way of calling the function: the op is opaque."""


class Letter:
    """One index of the pattern: a role, and the atoms it stands for."""

    __slots__ = ("atoms", "role")

    def __init__(self, role: str, atoms: Dim) -> None:
        self.role = role
        self.atoms = atoms


Slots = list[list[Letter]]
"""One list of letters per dimension."""


class Pattern:
    """What a rule gives back.

    Attributes:
        kind: family of the op, see `circuitlab.circuit.Op`.
        ins: operand number -> letters of its dimensions.
        outs: letters of the dimensions of each result.
        attrs: values worth showing.
    """

    __slots__ = ("attrs", "ins", "kind", "outs")

    def __init__(self, kind: str, **attrs: Any) -> None:
        self.kind = kind
        self.ins: dict[int, Slots] = {}
        self.outs: list[Slots] = []
        self.attrs = {key: value for key, value in attrs.items() if value is not None}

    def take(self, operand: Operand, role: str = "broadcast") -> Slots:
        """Letters of its own for each dimension of an operand."""
        slots = [[Letter(role, dim)] if dim else [] for dim in operand.dims]
        self.ins[operand.slot] = slots
        return slots

    def out(self, slots: Slots) -> None:
        """One more result."""
        self.outs.append([list(letters) for letters in slots])

    def new(self, w: Wires, size: int, role: str, *hint: Any) -> list[Letter]:
        """A dimension of a new wire for a result; empty for size 1."""
        dim = w.new(size, *hint)
        return [Letter(role, dim)] if dim else []


def set_role(slots: Sequence[Letter], role: str) -> None:
    """Give letters a role."""
    for letter in slots:
        letter.role = role


def cut_roles(w: Wires, dim: Dim, before: int) -> list[Letter]:
    """Letters of a dimension that was cut into parts, since there were ``before`` picks.

    A cut that lies within one index of a factor picks that index.
    """
    picked = {id(atom) for atom in leaves(w.picks[before:])}
    return [Letter("indexed" if id(atom) in picked else "joined", [atom]) for atom in leaves(dim)]


def axis_of(dim: int, ndim: int) -> int:
    """A dimension number, counted from the front."""
    if not isinstance(dim, int) or isinstance(dim, bool) or not -ndim <= dim < max(ndim, 1):
        raise NoRuleError
    return dim % ndim if ndim else 0


def axes_of(dim: Any, ndim: int) -> list[int]:
    """Dimension numbers from None (all), a number or a sequence."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(ndim))
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    return [axis_of(d, ndim) for d in dims]


def shape_args(args: Sequence[Any]) -> list[int]:
    """Sizes given as one sequence or as separate numbers."""
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = args[0]
    if not all(isinstance(size, int) for size in args):
        raise NoRuleError
    return [int(size) for size in args]


def elementwise(
    w: Wires,
    event: Event,
    operands: Sequence[Operand],
    shape: Sequence[int],
    kind: str = "elementwise",
    apart: bool = False,
    **attrs: Any,
) -> Pattern:
    """Operands broadcast against each other: dimensions of equal position are one index.

    With ``apart``, two dimensions that cannot be one product of wires (2 x 3 and 3 x 2) are paired in their order, and
    the first goes on; else that is a clash.
    """
    pattern = Pattern(kind, **attrs)
    ndim = len(shape)
    columns: list[list[Letter]] = [[] for _ in range(ndim)]
    slots = {operand.slot: [[] for _ in range(operand.ndim)] for operand in operands}
    for axis in range(ndim):
        letter: Letter | None = None
        for operand in operands:
            position = axis - ndim + operand.ndim
            if position < 0 or not operand.dims[position]:
                continue
            dim = operand.dims[position]
            if letter is None:
                letter = Letter("broadcast", dim)
            elif not united(w, letter, dim, apart):
                slots[operand.slot][position] = [Letter("ordered", dim)]
                continue
            slots[operand.slot][position] = [letter]
        if letter is not None:
            columns[axis] = [letter]
    pattern.ins.update(slots)
    pattern.out(columns)
    return pattern


def united(w: Wires, letter: Letter, dim: Dim, apart: bool) -> bool:
    """Make a dimension the same index as a letter; where it cannot be, the order of both matters."""
    mark = w.mark()
    try:
        w.unify(letter.atoms, dim)
    except ClashError:
        if not apart:
            raise
        w.rollback(mark)
        letter.role = "ordered"
        return False
    letter.role = "ordered" if letter.role == "ordered" else "diagonal"
    return True


def regrouped(w: Wires, operand: Operand, shape: Sequence[int], **attrs: Any) -> Pattern:
    """A row-major reshape. Where it cuts across wires, those end; the dimensions around them go on."""
    pattern = Pattern("reindex", **attrs)
    dims, sizes = operand.dims, list(shape)
    made: list[tuple[Dim, str]] = []
    spans = _spans([size_of(dim) for dim in dims], sizes)
    slots: Slots = []
    for (start, stop), (begin, end) in spans:
        mark = w.mark()
        try:
            groups = w.regroup(dims[start:stop], sizes[begin:end])
            slots.extend([Letter("broadcast", [atom]) for atom in leaves(dim)] for dim in dims[start:stop])
            made.extend((group, "") for group in groups)
        except ClashError:
            w.rollback(mark)
            pattern.kind = "opaque"
            slots.extend([[Letter("opaque", dim)] if dim else [] for dim in dims[start:stop]])
            made.extend((w.new(size, "opaque", "reshape"), "opaque") for size in sizes[begin:end])
    pattern.ins[operand.slot] = slots
    # the same sequence of letters, cut at other places
    queue = [letter for dim in slots for letter in dim if letter.role != "opaque"]
    out: Slots = []
    for dim, role in made:
        if role:
            out.append([Letter(role, dim)] if dim else [])
            continue
        count = len(list(leaves(dim)))
        out.append(queue[:count])
        del queue[:count]
    pattern.out(out)
    return pattern


def _spans(old: list[int], new: list[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Smallest runs of old and new dimensions that hold equally many entries."""
    spans: list[tuple[tuple[int, int], tuple[int, int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        have = want = 1
        first = True
        while first or have != want:
            first = False
            if have <= want and i < len(old):
                have *= old[i]
                i += 1
                if have == want:
                    continue
            if want < have or i >= len(old):
                if j >= len(new):
                    break
                want *= new[j]
                j += 1
        if have != want:
            raise NoRuleError
        spans.append(((start, i), (begin, j)))
    return spans
