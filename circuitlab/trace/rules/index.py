"""Indexing, gathering, scattering and looking up."""

from __future__ import annotations

from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern, Slots, axis_of, cut_roles, set_role
from circuitlab.trace.rules.pointwise import pointwise
from circuitlab.trace.wires import ClashError, Dim, Wires, leaves


def _expanded(index: Any, ndim: int) -> list[Any]:
    """An index written out: one item for every dimension, and None for new ones."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(_width(item) for item in items)
    if Ellipsis in [i for i in items if not isinstance(i, Operand)]:
        at = next(n for n, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (ndim - used)
    else:
        items += [slice(None)] * (ndim - used)
    return items


def _width(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, bool):
        raise NoRuleError
    if isinstance(item, Operand) and item.value.dtype in ("bool", "uint8"):
        return max(item.ndim, 1)
    return 1


def _is_index(item: Any) -> bool:
    """Whether an item of an index is whole numbers, in a tensor or a list."""
    if isinstance(item, Operand):
        return item.value.dtype not in ("bool", "uint8")
    return isinstance(item, (list, range)) and all(type(i) is int for i in item)


_STILL = frozenset(
    "to long int contiguous clone detach view reshape flatten unflatten unsqueeze squeeze expand expand_as broadcast_to "
    "view_as reshape_as transpose permute t T mT getitem cpu cuda type type_as data".split()
)
"""Functions that leave whole numbers what they are, at the place that their axes tell."""


def counting(index: Operand, size: int) -> int | None:
    """The dimension, from the last, along which an index counts 0, 1 ... size - 1, alike along all others; None if none is known to.

    It has to come from an `arange`: numbers that happen to count are no reason.
    """
    value = index.value
    while value.event is not None and value.event.fn in _STILL and value.dtype in ("int64", "int32"):
        event = value.event
        items = event.args[1] if event.fn == "getitem" else ()
        if not all(item in (None, ...) or item == slice(None) for item in (items if isinstance(items, tuple) else (items,))):
            return None
        value = event.operands[0].value
    event = value.event
    if event is None or event.fn != "arange" or value.dtype not in ("int64", "int32") or value.shape != (size,):
        return None
    start = event.args[0] if len(event.args) > 1 else event.kwargs.get("start", 0)
    step = event.args[2] if len(event.args) > 2 else event.kwargs.get("step", 1)
    found = [dim for dim, atoms in enumerate(index.dims) if leaves(atoms) == leaves(value.dims[0])]
    return found[0] - index.ndim if (start, step) == (0, 1) and len(found) == 1 else None


def _name_counter(w: Wires, counter: Dim, counted: Dim) -> None:
    """A counter that nothing else used so far is one of the axis that it counts."""
    found = leaves(counter)
    if len(found) == 1 and len(found[0].hints) == 1:
        w.unify(counted, counter)


class _Read:
    """A reading of ``x[index]``, dimension by dimension."""

    def __init__(self, w: Wires, event: Event, pattern: Pattern, input: Operand, index: Any) -> None:
        self.w, self.event, self.pattern, self.input = w, event, pattern, input
        self.slots = pattern.take(input)
        self.out: Slots = []
        self.kind = "reindex"
        self.labels: list[Any] = []
        self.gathers: list[tuple[int, Operand | None, int | None]] = []
        self.place: int | None = None
        self.apart = False
        axis = 0
        items = _expanded(index, input.ndim)
        self.paired = sum(map(_is_index, items)) > 1
        for item in items:
            axis += self._step(item, axis)
        if self.gathers:
            self._gather()

    def _step(self, item: Any, axis: int) -> int:
        """Read one item of the index; the number of dimensions it takes."""
        if item is None:
            self.out.append([])
            return 0
        size = self.input.shape[axis]
        if isinstance(item, slice):
            self._slice(item, axis, size)
        elif isinstance(item, int):
            set_role(self.slots[axis], "indexed")
            self.labels.append(item)
            self.kind = "index" if self.kind != "gather" else self.kind
        elif _is_index(item) and (self.paired or isinstance(item, Operand)):
            self.apart |= self.place not in (None, len(self.out))
            if self.place is None:
                self.place = len(self.out)
            if isinstance(item, Operand):
                self.gathers.append((axis, item, counting(item, size)))
            else:
                self.gathers.append((axis, None, -1 if [*item] == [*range(size)] else None))
        elif isinstance(item, (list, range)) and _is_index(item):
            # a constant list picks entries: a new axis
            set_role(self.slots[axis], "indexed")
            self.out.append(self.pattern.new(self.w, len(item), "indexed", "picked", self.event.name))
            self.kind = "index"
        elif isinstance(item, Operand) and self.event.fn == "getitem":
            return self._mask(item, axis)
        else:
            raise NoRuleError
        return 1

    def _mask(self, mask: Operand, axis: int) -> int:
        """Entries where a mask is true: how many there are depends on the data, so they are a new wire."""
        if self.gathers or self.kind == "gather" or mask.ndim == 0:
            raise NoRuleError
        for offset, dim in enumerate(mask.dims):
            self.w.unify(self.input.dims[axis + offset], dim)
            set_role(self.slots[axis + offset], "ordered")
        self.pattern.ins[mask.slot] = self.slots[axis : axis + mask.ndim]
        count = self.event.outs[0].shape[len(self.out)]
        self.out.append(self.pattern.new(self.w, count, "created", "found", self.event.name))
        self.kind = "gather"
        return mask.ndim

    def _slice(self, item: slice, axis: int, size: int) -> None:
        if any(v is not None and not isinstance(v, int) for v in (item.start, item.stop, item.step)):
            raise NoRuleError
        start, stop, step = item.indices(size)
        letters = self.slots[axis]
        count = len(range(start, stop, step))
        if count == size:
            self.out.append(letters)
            return
        self.kind = "slice" if self.kind == "reindex" else self.kind
        self.labels.append([start, stop] if step == 1 else [start, stop, step])
        dim = self.input.dims[axis]
        if step == 1 and count:
            before = len(self.w.picks)
            try:
                part = self.w.slice(dim, start, stop)
                if count == 1:
                    set_role(letters, "indexed")
                else:
                    self.slots[axis][:] = cut_roles(self.w, dim, before)
                self.out.append([Letter("joined", part)] if part else [])
                return
            except ClashError:
                pass
        elif count and size % step == 0 and start < step and count == size // step:
            try:
                outer, inner = self.w.regroup([dim], [size // step, step])
                kept = [Letter("broadcast", outer)] if outer else []
                self.slots[axis] = [*kept, *([Letter("indexed", inner)] if inner else [])]
                self.pattern.ins[self.input.slot] = self.slots
                self.out.append(kept)
                return
            except ClashError:
                pass
        set_role(letters, "indexed")
        self.out.append(self.pattern.new(self.w, count, "indexed", "picked", self.event.name))

    def _gather(self) -> None:
        """Index tensors broadcast against each other; their dimensions stand where the first stood, or in front.

        A dimension whose index counts 0, 1, 2 ... to its end is read entry by entry: it goes on.
        """
        self.kind = "gather"
        columns: Slots = [[] for _ in range(max(operand.ndim if operand else 1 for _, operand, _ in self.gathers))]
        counted = [column for _, _, column in self.gathers]
        for axis, _, column in self.gathers:
            if column is not None and self.slots[axis] and counted.count(column) == 1:
                columns[column] = self.slots[axis]
            else:
                set_role(self.slots[axis], "gathered")
        for axis, operand, _ in self.gathers:
            if operand is None:
                continue
            own: Slots = []
            for position, dim in enumerate(operand.dims, start=-operand.ndim):
                column = columns[position]
                if column and column is self.slots[axis]:
                    _name_counter(self.w, dim, column[0].atoms)
                    own.append([Letter("ordered", dim)])
                    continue
                if dim and column:
                    self.w.unify(column[0].atoms, dim)
                    column[0].role = "diagonal"
                elif dim:
                    column.append(Letter("broadcast", dim))
                own.append(column if dim else [])
            self.pattern.ins[operand.slot] = own
        if any(operand is None and not (column and columns[column] is self.slots[axis]) for axis, operand, column in self.gathers):
            set_role(columns[-1], "ordered")  # a constant list, entry by entry
        at = 0 if self.apart else self.place or 0
        self.out[at:at] = columns


def getitem(w: Wires, event: Event, input: Operand, index: Any) -> Pattern:
    """``x[index]`` with numbers, slices, None, ... and integer tensors."""
    pattern = Pattern("reindex")
    read = _Read(w, event, pattern, input, index)
    pattern.kind = read.kind
    if read.labels:
        pattern.attrs["index"] = read.labels
    pattern.out(read.out)
    return pattern


def indexed(w: Wires, event: Event, input: Operand, indices: Any) -> Pattern:
    """``aten.index``: getitem with an array, or None for all, for each dimension."""
    return getitem(w, event, input, tuple(slice(None) if item is None else item for item in indices))


def setitem(w: Wires, event: Event, input: Operand, index: Any, value: Any) -> Pattern:
    """``x[index] = value``: x with some entries replaced; dimensions that the index leaves whole pass."""
    if isinstance(index, Operand) and index.value.dtype == "bool" and index.ndim:
        if isinstance(value, Operand) and value.ndim:
            raise NoRuleError  # as many values as there are entries: in their order
        pattern = Pattern("elementwise")  # a choice entry by entry
        slots = pattern.take(input)
        for letters, dim in zip(slots, index.dims, strict=False):
            w.unify([atom for letter in letters for atom in letter.atoms], dim)
            set_role(letters, "diagonal")
        pattern.ins[index.slot] = slots[: index.ndim]
        pattern.out(slots)
        return pattern
    pattern = Pattern("box")
    read = _Read(w, event, pattern, input, index)
    whole = {id(letter) for letters in read.out for letter in letters if letter.role in ("broadcast", "diagonal")}
    touched = [letter for letters in read.slots for letter in letters if id(letter) not in whole]
    if isinstance(value, Operand):
        own: Slots = []
        for position, dim in enumerate(value.dims):
            target = read.out[len(read.out) - value.ndim + position]
            if dim and target:
                w.unify([atom for letter in target for atom in letter.atoms], dim)
            own.append(target if dim else [])
            if dim and not target:
                raise NoRuleError
        pattern.ins[value.slot] = own
    kept = {id(letter) for letters in read.slots for letter in letters}
    for slot, slots in pattern.ins.items():
        for letter in (letter for letters in slots for letter in letters):
            if slot != input.slot and id(letter) not in kept:
                letter.role = "gathered"
    for letter in touched:
        letter.role = "ordered"
    for letters in read.out:
        for letter in letters:
            if id(letter) not in whole:
                letter.role = "ordered"
    pattern.out(read.slots)
    return pattern


def embedding(w: Wires, event: Event, input: Operand, weight: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Rows of the weight, chosen by the input."""
    if input.value.dtype.startswith(("float", "bfloat")):
        input, weight = weight, input  # torch.embedding(weight, indices)
    pattern = Pattern("embedding")
    slots = pattern.take(input)
    rows, columns = pattern.take(weight)
    set_role(rows, "gathered")
    set_role(columns, "created")
    pattern.out([*slots, columns])
    return pattern


def embedding_bag(w: Wires, event: Event, input: Operand, weight: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Embeddings of a bag, reduced over the bag (two-dimensional input)."""
    if input.value.dtype.startswith(("float", "bfloat")):
        input, weight = weight, input
    if input.ndim != 2 or len(event.operands) > 2:
        raise NoRuleError
    pattern = Pattern("embedding")
    slots = pattern.take(input)
    rows, columns = pattern.take(weight)
    set_role(slots[1], "reduced")
    set_role(rows, "gathered")
    set_role(columns, "created")
    pattern.out([slots[0], columns])
    return pattern


def one_hot(w: Wires, event: Event, tensor: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """A new class axis, by the values of the operand."""
    pattern = Pattern("gather")
    slots = pattern.take(tensor)
    pattern.out([*slots, pattern.new(w, event.outs[0].shape[-1], "ordered", "classes", event.name)])
    return pattern


def index_select(w: Wires, event: Event, input: Operand, dim: int, index: Operand) -> Pattern:
    """Entries of one dimension, chosen by an index tensor."""
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("gather", dim=axis)
    slots = pattern.take(input)
    chosen = pattern.take(index)
    if counting(index, input.shape[axis]) is not None:
        _name_counter(w, index.dims[0], input.dims[axis])
        set_role(chosen[0], "ordered")
        pattern.out(slots)
        return pattern
    set_role(slots[axis], "gathered")
    pattern.out([*slots[:axis], chosen[0] if chosen else [], *slots[axis + 1 :]])
    return pattern


def nonzero(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Where an array is not zero: how many places there are depends on the data, so they are a new wire."""
    pattern = Pattern("box")
    for operand in event.operands:
        pattern.take(operand, "ordered")
    found: list[Letter] | None = None
    for out in event.outs:
        if found is None:
            found = pattern.new(w, out.shape[0], "created", "found", event.name)
        rest = [pattern.new(w, size, "created", "index", event.name) for size in out.shape[1:]]
        pattern.out([found, *rest])
    return pattern


def take(w: Wires, event: Event, input: Operand, index: Operand) -> Pattern:
    """Entries chosen by their number in the flattened array."""
    pattern = Pattern("gather")
    pattern.take(input, "gathered")
    pattern.out(pattern.take(index))
    return pattern


def put(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Values written in their order to places all over an array."""
    pattern = Pattern("scatter")
    for operand in event.operands:
        pattern.take(operand, "ordered")
    pattern.out(pattern.ins[input.slot])
    return pattern


def index_put(w: Wires, event: Event, input: Operand, indices: Any, values: Any, *args: Any, **kwargs: Any) -> Pattern:
    """``x[indices] = values`` or ``+= values``."""
    return setitem(w, event, input, tuple(indices), values)


def multinomial(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Entries drawn by their weight."""
    pattern = Pattern("random")
    slots = pattern.take(input)
    set_role(slots[-1], "ordered")
    pattern.out([*slots[:-1], pattern.new(w, event.outs[0].shape[-1], "created", "drawn", event.name)])
    return pattern


def where(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """With one argument, where it is not zero; with three, a choice entry by entry."""
    if len(args) + len(kwargs) == 1:
        return nonzero(w, event, args[0] if args else kwargs["condition"])
    return pointwise(w, event, *args, **kwargs)


def gather(w: Wires, event: Event, input: Operand, dim: int, index: Operand, **kwargs: Any) -> Pattern:
    """``out[i][j] = input[index[i][j]][j]``: other dimensions are paired, or are first parts of each other."""
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("gather", dim=axis)
    slots = pattern.take(input)
    own = pattern.take(index)
    set_role(slots[axis], "gathered")
    for other, letters in enumerate(own):
        if other == axis:
            continue
        if input.shape[other] == index.shape[other]:
            w.unify(input.dims[other], index.dims[other])
            slots[other] = letters
            set_role(letters, "diagonal")
        else:
            set_role(slots[other], "ordered")
            set_role(letters, "ordered")
    pattern.out(own)
    return pattern


def take_along_dim(w: Wires, event: Event, input: Operand, indices: Operand, dim: int | None = None) -> Pattern:
    """gather with broadcasting of the other dimensions; without a dimension, of the flattened array."""
    if dim is None:
        return take(w, event, input, indices)
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("gather", dim=axis)
    slots, own = pattern.take(input), pattern.take(indices)
    set_role(slots[axis], "gathered")
    for other in range(input.ndim):
        if other != axis and slots[other] and own[other]:
            w.unify(input.dims[other], indices.dims[other])
            slots[other] = own[other]
            set_role(own[other], "diagonal")
    pattern.out([own[other] if other == axis else own[other] or slots[other] for other in range(input.ndim)])
    return pattern


def scatter(w: Wires, event: Event, input: Operand, dim: int, index: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Values put at (or added to) indexed places of one dimension; other dimensions are paired."""
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("scatter", dim=axis)
    slots = pattern.take(input)
    set_role(slots[axis], "ordered")
    own: Slots | None = None
    first = input
    for operand in event.operands:
        if operand.slot == input.slot or operand.ndim == 0:
            continue
        if own is None:
            own = pattern.take(operand, "gathered")
            first = operand
        else:
            if operand.shape != first.shape:
                raise NoRuleError
            for a, b in zip(first.dims, operand.dims, strict=True):
                w.unify(a, b)
            pattern.ins[operand.slot] = own
    for other, letters in enumerate(own or []):
        if other != axis and input.shape[other] == index.shape[other]:
            w.unify(input.dims[other], index.dims[other])
            slots[other][:] = letters
            set_role(letters, "diagonal")
        elif other != axis:
            set_role(slots[other], "ordered")
    pattern.out(slots)
    return pattern


def index_add(w: Wires, event: Event, input: Operand, dim: int, index: Operand, source: Any, *args: Any,
              **kwargs: Any) -> Pattern:
    """Rows of the source added to (or copied over) indexed rows; other dimensions are paired."""
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("scatter", dim=axis)
    slots = pattern.take(input)
    rows = pattern.take(index, "gathered")
    set_role(slots[axis], "ordered")
    if isinstance(source, Operand) and source.ndim:
        w.unify(index.dims[0] if index.ndim else [], source.dims[axis])
        own: Slots = []
        for other, dim_ in enumerate(source.dims):
            if other == axis:
                own.append(rows[0] if rows else [])
                continue
            w.unify(input.dims[other], dim_)
            set_role(slots[other], "diagonal")
            own.append(slots[other])
        pattern.ins[source.slot] = own
    pattern.out(slots)
    return pattern


ALIKE = frozenset({"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"})
"""Functions that make arrays whose entries are all alike."""


def created(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """New arrays: every dimension is a new wire. All entries alike (zeros, rand), or positions matter (arange)."""
    if not event.operands and any(type(a).__module__ == "numpy" and hasattr(a, "shape") for a in args):
        raise NoRuleError  # from where we cannot see
    random = event.fn.startswith(("rand", "normal"))
    uniform = (random and event.fn != "randperm") or event.fn in ALIKE
    pattern = Pattern("random" if random else "create")
    role = "created" if uniform else "ordered"
    for operand in event.operands:
        pattern.take(operand, "opaque" if operand.ndim and not uniform else "broadcast")
        if operand.ndim and not uniform and not event.fn.startswith("new_"):
            raise NoRuleError
    for out in event.outs:
        pattern.out([pattern.new(w, size, role, "create", event.name, n) for n, size in enumerate(out.shape)])
    return pattern
