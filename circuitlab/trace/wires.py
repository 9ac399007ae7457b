"""Identity of axes: atoms, union-find, retroactive splitting, parts and sums.

An **atom** is a wire in the making. A dimension is a list of atoms, slowest first; a size-1 dimension is the empty
list. Three things happen to atoms as the run is read:

- *union*: an op requires two dimensions to be the same index;
- *split*: a ``view`` shows that an atom is a product, and from then on it is, everywhere, earlier tensors included;
- *parts*: a slice or ``cat`` shows that an atom is a sum (a fused q, k, v axis), each part a product of atoms.

Every change is logged, so that a rule that fails half-way leaves nothing behind (`mark`, `rollback`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


class ClashError(Exception):
    """Two dimensions cannot be the same axis as far as we can express it: the op becomes opaque there."""


class Atom:
    """A wire in the making.

    Attributes:
        size: number of entries, at least 2.
        index: order of creation; the older of two united atoms stands for both.
        parent: the atom it was united with, None for a root.
        factors: the product that a root was split into, () if it was not.
        parts: (start, stop, atoms) pieces if it is a sum, else ().
        whole: (atom, start) if it was made as a part of another.
        hints: what is known about its origin, for naming: (kind, detail...) tuples.
        cuts: (start, stop) -> atom of a slice that spans several parts.
        picked: single entries of it were taken, which no part tells of: its order matters.
        smeared: it was united with a shifted copy of itself: it has no parts.
        torn: it was united with one of other parts, that do not fit: no sum that holds it can tell of it.
    """

    __slots__ = ("cuts", "factors", "hints", "index", "parent", "parts", "picked", "size", "smeared", "torn", "whole")

    def __init__(self, size: int, index: int, hint: tuple[Any, ...]) -> None:
        self.size = size
        self.index = index
        self.parent: Atom | None = None
        self.factors: tuple[Atom, ...] = ()
        self.parts: tuple[tuple[int, int, tuple[Atom, ...]], ...] = ()
        self.whole: tuple[Atom, int] | None = None
        self.hints: tuple[tuple[Any, ...], ...] = (hint,)
        self.cuts: dict[tuple[int, int], Atom] = {}
        self.picked = False
        self.smeared = False
        self.torn = False

    def __repr__(self) -> str:
        return f"<{self.index}:{self.size}>"


Dim = list[Atom]


def root(atom: Atom) -> Atom:
    """The atom that stands for all that were united with it."""
    while atom.parent is not None:
        atom = atom.parent
    return atom


def leaves(atoms: Iterable[Atom]) -> list[Atom]:
    """The atoms as they are known now: roots, with splits written out."""
    found: list[Atom] = []
    for atom in atoms:
        while atom.parent is not None:
            atom = atom.parent
        if atom.factors:
            found += leaves(atom.factors)
        else:
            found.append(atom)
    return found


def size_of(atoms: Iterable[Atom]) -> int:
    """Product of sizes."""
    return math.prod(atom.size for atom in atoms)


class Wires:
    """All atoms of one run."""

    def __init__(self) -> None:
        self.count = 0
        self.picks: list[Atom] = []  # of single entries, in the order that they were taken
        self._log: list[tuple[Atom, str, Any]] = []

    # transactions -------------------------------------------------------------------------------------

    def mark(self) -> int:
        """A point to roll back to."""
        return len(self._log)

    def rollback(self, mark: int) -> None:
        """Undo every change since the mark."""
        while len(self._log) > mark:
            atom, name, value = self._log.pop()
            setattr(atom, name, value)

    def commit(self) -> None:
        """Forget how to undo."""
        self._log.clear()

    def _set(self, atom: Atom, name: str, value: Any) -> None:
        self._log.append((atom, name, getattr(atom, name)))
        setattr(atom, name, value)

    # making -------------------------------------------------------------------------------------------

    def new(self, size: int, *hint: Any) -> Dim:
        """A dimension of a wire of its own; empty if the size is 1."""
        if size == 1:
            return []
        self.count += 1
        return [Atom(int(size), self.count, hint)]

    def sum(self, pieces: list[Dim], sizes: list[int], *hint: Any) -> Dim:
        """The concatenation of dimensions: the whole that they are the parts of, where there is one already."""
        filled = [(piece, size) for piece, size in zip(pieces, sizes, strict=True) if size]
        if len(filled) == 1:
            return filled[0][0]
        whole = self._whole_of([piece for piece, _ in filled])
        if whole is not None:
            return [whole]
        made = self.new(sum(size for _, size in filled), *hint)
        parts: list[tuple[int, int, tuple[Atom, ...]]] = []
        start = 0
        for piece, size in filled:
            parts.append((start, start + size, tuple(piece)))
            start += size
        made[0].parts = tuple(parts)
        return made

    def _whole_of(self, pieces: list[Dim]) -> Atom | None:
        """The atom whose parts, in order, are exactly these."""
        first = list(leaves(pieces[0]))
        if len(first) != 1 or first[0].whole is None:
            return None
        whole = root(first[0].whole[0])
        if whole.factors or len(whole.parts) != len(pieces):
            return None
        for (_, _, atoms), piece in zip(whole.parts, pieces, strict=True):
            if list(leaves(atoms)) != list(leaves(piece)):
                return None
        # the same atoms twice (a rotated half united with the other), or atoms as one with their neighbours, cannot tell
        # their order
        flat = [atom for piece in pieces for atom in leaves(piece)]
        return whole if len(set(map(id, flat))) == len(flat) and not any(atom.smeared for atom in flat) else None

    # identity -----------------------------------------------------------------------------------------

    def unify(self, one: Iterable[Atom], other: Iterable[Atom]) -> None:
        """Make two dimensions the same product of wires.

        Raises:
            ClashError: their factors do not refine each other.
        """
        left, right = list(leaves(one)), list(leaves(other))
        if size_of(left) != size_of(right):
            raise ClashError(f"sizes {size_of(left)} and {size_of(right)}")
        while left and right:
            a, b = self._fresh(left), self._fresh(right)
            if a is b:
                del left[0], right[0]
            elif a.size == b.size:
                self._union(a, b)
                del left[0], right[0]
            elif a.size > b.size and a.size % b.size == 0:
                self.split(a, b.size)
            elif b.size > a.size and b.size % a.size == 0:
                self.split(b, a.size)
            else:
                raise ClashError(f"{a.size} against {b.size}")

    @staticmethod
    def _fresh(queue: Dim) -> Atom:
        """The first leaf of a queue, written out anew if it was united or split since."""
        if queue[0].parent is not None or queue[0].factors:
            queue[:1] = leaves(queue[:1])
        return queue[0]

    def _union(self, a: Atom, b: Atom) -> None:
        if b.index < a.index:
            a, b = b, a
        shifted = self._shifted(a, b)
        self._set(b, "parent", a)
        self._set(a, "hints", a.hints + b.hints)
        if b.picked:
            self.pick([a])
        if a.whole is None and b.whole is not None:
            self._set(a, "whole", b.whole)
        if shifted or b.smeared:
            # entries i and i + 1 of one axis stand side by side: they are as one, and no part can be told from the next
            self._set(a, "smeared", True)
        if b.torn:
            self._set(a, "torn", True)
        mark = self.mark()
        try:
            self._merge_parts(a, b)
        except ClashError:
            # parts that do not fit together, or not to be told apart: none are claimed, and none may be permuted
            self.rollback(mark)
            self.pick([a])
            for _, _, atoms in (*a.parts, *b.parts):
                self.pick(atoms)
                if a.smeared:
                    self._smear(atoms)
            self._set(a, "torn", True)
            self._set(a, "parts", ())

    def _smear(self, atoms: Iterable[Atom]) -> None:
        """Parts of what is smeared are so too, where else they may stand."""
        for atom in leaves(atoms):
            self._set(atom, "smeared", True)
            for _, _, inner in atom.parts:
                self._smear(inner)

    def _merge_parts(self, a: Atom, b: Atom) -> None:
        if a.smeared:
            raise ClashError(f"parts of {a}, whose entries are as one with the next")
        if not b.parts:
            return
        if not a.parts:
            self._set(a, "parts", b.parts)
            return
        for start, _, _ in b.parts[1:]:
            self._cut(a, start)
        theirs = b.parts
        for start, _, _ in a.parts[1:]:
            theirs = self._cut_parts(theirs, start)
        for (_, _, mine), (_, _, its) in zip(a.parts, theirs, strict=True):
            self.unify(mine, its)

    @staticmethod
    def _shifted(a: Atom, b: Atom) -> bool:
        """Whether two atoms are overlapping parts of one whole, at different places."""
        starts: dict[int, int] = {}
        for number, atom in enumerate((a, b)):
            at = 0
            while atom.whole is not None:
                at += atom.whole[1]
                atom = root(atom.whole[0])
                if number == 0:
                    starts[id(atom)] = at
                elif 0 < abs(starts.get(id(atom), at) - at) < a.size:
                    return True
        return False

    def split(self, atom: Atom, outer: int) -> tuple[Atom, Atom]:
        """Make an atom the product (outer)(inner), everywhere."""
        atom = root(atom)
        inner = atom.size // outer
        first = self.new(outer, "factor", atom, 0)[0]
        second = self.new(inner, "factor", atom, 1)[0]
        if atom.parts:
            if any(start % inner for start, _, _ in atom.parts):
                raise ClashError(f"a sum with parts of {[e - s for s, e, _ in atom.parts]} as ({outer})({inner})")
            pieces: list[tuple[int, int, tuple[Atom, ...]]] = []
            for start, stop, atoms in atom.parts:
                count = (stop - start) // inner
                piece = self.new(count, "part", first, start // inner)
                for p in piece:
                    p.whole = (first, start // inner)
                pieces.append((start // inner, stop // inner, tuple(piece)))
                self.unify(atoms, [*piece, second])
            if len(pieces) > 1:
                self._set(first, "parts", tuple(pieces))
        first.picked = second.picked = atom.picked
        self._set(atom, "factors", (first, second))
        return first, second

    # parts --------------------------------------------------------------------------------------------

    def slice(self, dim: Iterable[Atom], start: int, stop: int) -> Dim:
        """Entries start to stop of a dimension, as a dimension.

        Raises:
            ClashError: the slice cuts through an inner factor.
        """
        atoms = list(leaves(dim))
        total = size_of(atoms)
        if (start, stop) == (0, total):
            return atoms
        if stop - start == 1:
            self._mark_cut(atoms, start, stop)
            return []
        lead, inner = atoms[0], size_of(atoms[1:])
        if start % inner or stop % inner:
            # the slice may lie within one index of the leading factor
            if start // inner == (stop - 1) // inner:
                self.pick([lead])
                return self.slice(atoms[1:], start % inner, (stop - 1) % inner + 1)
            raise ClashError(f"[{start}:{stop}] of {atoms}")
        start, stop = start // inner, stop // inner
        if stop - start == 1:
            self._mark_cut([lead], start, stop)
            return atoms[1:]
        if (start, stop) == (0, lead.size):
            return atoms
        if lead.smeared:
            self.pick([lead])
            raise ClashError(f"a part of {lead}, whose entries are as one with the next")
        self._cut(lead, start)
        self._cut(lead, stop)
        inside = [part for part in lead.parts if part[0] >= start and part[1] <= stop]
        if len(inside) == 1:
            return [*inside[0][2], *atoms[1:]]
        made = lead.cuts.get((start, stop))
        if made is None:
            made = self.new(stop - start, "part", lead, start)[0]
            made.whole = (lead, start)
            made.parts = tuple((s - start, e - start, atoms_) for s, e, atoms_ in inside)
            self._set(lead, "cuts", {**lead.cuts, (start, stop): made})
        return [made, *atoms[1:]]

    def _mark_cut(self, atoms: Dim, start: int, stop: int) -> None:
        """A single entry is taken: a boundary of a sum, else a pick."""
        if len(atoms) == 1 and atoms[0].parts:
            self._cut(atoms[0], start)
            self._cut(atoms[0], stop)
        else:
            self.pick(atoms)

    def settle(self, atoms: Iterable[Atom]) -> None:
        """Forget the parts of sums where one of them is torn: it may stand at other places of other sums, in pieces."""
        sums = [atom for atom in atoms if atom.parts]
        while torn := [a for a in sums if a.parts and any(leaf.torn or leaf.smeared for *_, inner in a.parts for leaf in leaves(inner))]:
            for atom in torn:
                self.pick([atom])
                atom.torn, atom.parts = True, ()

    def pick(self, dim: Iterable[Atom]) -> None:
        """The order of these atoms matters, and that of their parts."""
        for atom in leaves(dim):
            self.picks.append(atom)
            if not atom.picked:
                self._set(atom, "picked", True)
                for _, _, inner in atom.parts:
                    self.pick(inner)

    def _cut(self, atom: Atom, at: int) -> None:
        """Give a leaf a boundary between two parts."""
        if 0 < at < atom.size:
            if atom.smeared:
                raise ClashError(f"a part of {atom}, whose entries are as one with the next")
            parts = atom.parts or ((0, atom.size, None),)
            cut = self._cut_parts(parts, at, atom)  # type: ignore[arg-type]
            if cut != atom.parts:
                self._set(atom, "parts", cut)

    def _cut_parts(
        self, parts: tuple[tuple[int, int, tuple[Atom, ...]], ...], at: int, whole: Atom | None = None
    ) -> tuple[tuple[int, int, tuple[Atom, ...]], ...]:
        made: list[tuple[int, int, tuple[Atom, ...]]] = []
        for start, stop, atoms in parts:
            if not start < at < stop:
                made.append((start, stop, atoms))
                continue
            inside = leaves(atoms or ())
            if len(inside) == 1 and not inside[0].smeared:
                self._cut(inside[0], at - start)  # it is cut wherever else it stands
            for begin, end in ((start, at), (at, stop)):
                if atoms is None:  # type: ignore[comparison-overlap]
                    piece = self.new(end - begin, "part", whole, begin)
                    for p in piece:
                        p.whole = (whole, begin)  # type: ignore[assignment]
                else:
                    piece = self.slice(atoms, begin - start, end - start)
                made.append((begin, end, tuple(piece)))
        return tuple(made)

    # reshaping ----------------------------------------------------------------------------------------

    def regroup(self, dims: list[Dim], shape: list[int]) -> list[Dim]:
        """The dimensions of a row-major reshape: atoms are split where the new shape asks for it.

        Raises:
            ClashError: a new dimension cuts across wires (6 x 4 -> 8 x 3).
        """
        queue = [atom for dim in dims for atom in leaves(dim)]
        made: list[Dim] = []
        for size in shape:
            dim: Dim = []
            have = 1
            while have < size:
                if not queue:
                    raise ClashError("too few entries")
                atom = self._fresh(queue)
                need = size // have
                if size % have or (atom.size > need and atom.size % need) or (atom.size < need and need % atom.size):
                    raise ClashError(f"{atom.size} does not fit into {size}")
                if atom.size > need:
                    self.split(atom, need)
                    continue
                dim.append(atom)
                have *= atom.size
                del queue[0]
            made.append(dim)
        if queue:
            raise ClashError("too many entries")
        return made
