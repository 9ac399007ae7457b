"""Indexing, gathering, scattering and looking up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern, Slots, axis_of, cut_roles, set_role
from circuitlab.trace.rules.pointwise import pointwise
from circuitlab.trace.wires import ClashError, Wires


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


class _Read:
    """A reading of ``x[index]``, dimension by dimension."""

    def __init__(self, w: Wires, event: Event, pattern: Pattern, input: Operand, index: Any) -> None:
        self.w, self.event, self.pattern, self.input = w, event, pattern, input
        self.slots = pattern.take(input)
        self.out: Slots = []
        self.kind = "reindex"
        self.labels: list[Any] = []
        self.gathers: list[tuple[int, Operand]] = []
        self.place: int | None = None
        self.apart = False
        axis = 0
        for item in _expanded(index, input.ndim):
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
        elif isinstance(item, Operand) and item.value.dtype not in ("bool", "uint8"):
            if self.gathers and self.gathers[-1][0] != axis - 1:
                self.apart = True
            if self.place is None:
                self.place = len(self.out)
            self.gathers.append((axis, item))
        elif isinstance(item, (list, range)) and all(isinstance(i, int) for i in item):
            # a constant list picks entries: a new axis
            if self.gathers:
                raise NoRuleError
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
        """Index tensors broadcast against each other; their dimensions stand where the first stood, or in front."""
        self.kind = "gather"
        ndim = max(operand.ndim for _, operand in self.gathers)
        columns: Slots = [[] for _ in range(ndim)]
        for axis, operand in self.gathers:
            set_role(self.slots[axis], "gathered")
            own: Slots = []
            for position, dim in enumerate(operand.dims):
                column = columns[ndim - operand.ndim + position]
                if dim and column:
                    self.w.unify(column[0].atoms, dim)
                    column[0].role = "diagonal"
                elif dim:
                    column.append(Letter("broadcast", dim))
                own.append(column if dim else [])
            self.pattern.ins[operand.slot] = own
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


_ALIKE = frozenset({"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"})
"""Functions that make arrays whose entries are all alike."""


def created(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """New arrays: every dimension is a new wire. All entries alike (zeros, rand), or positions matter (arange)."""
    if not event.operands and any(type(a).__module__ == "numpy" and hasattr(a, "shape") for a in args):
        raise NoRuleError  # from where we cannot see
    random = event.fn.startswith(("rand", "normal"))
    uniform = (random and event.fn != "randperm") or event.fn in _ALIKE
    pattern = Pattern("random" if random else "create")
    role = "created" if uniform else "ordered"
    for operand in event.operands:
        pattern.take(operand, "opaque" if operand.ndim and not uniform else "broadcast")
        if operand.ndim and not uniform and not event.fn.startswith("new_"):
            raise NoRuleError
    for out in event.outs:
        pattern.out([pattern.new(w, size, role, "create", event.name, n) for n, size in enumerate(out.shape)])
    return pattern


def recurrent(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Fused lstm, gru, rnn of unpacked sequences: gates share the hidden wire; time is ordered.

    The states of all layers and directions stand in one array, entry by entry, which makes their hidden wires one. If
    they start from zeros and nobody reads how they end, that array says nothing, and each has a hidden wire of its own.
    """
    states = args[0] if isinstance(args[0], (tuple, list)) else (args[0],)
    weights = args[1]
    if not isinstance(weights, (tuple, list)) or not isinstance(args[2], bool):
        raise NoRuleError
    biases, layers, bidirectional, batch_first = args[2], args[3], args[6], args[7]
    directions = 2 if bidirectional else 1
    hidden = states[0].shape[-1]
    unbatched = input.ndim == 2
    pattern = Pattern("scan", layers=layers, bidirectional=bidirectional or None)
    slots = pattern.take(input)
    time = 0 if unbatched else 1 if batch_first else 0
    batch = None if unbatched else 0 if batch_first else 1
    set_role(slots[time], "ordered")
    set_role(slots[-1], "contracted")
    per_cell = len(weights) // (layers * directions)
    if per_cell != (4 if biases else 2) or hidden == 1:
        raise NoRuleError  # projections
    apart = not any(out.read for out in event.outs[1:]) and all(
        state.value.event is not None and state.value.event.fn in _ALIKE for state in states
    )
    below: list[Letter] = slots[-1]
    for layer in range(layers):
        cells = [weights[n * per_cell : (n + 1) * per_cell] for n in range(layer * directions, (layer + 1) * directions)]
        own_states = [cell_[1].dims[-1] if apart else states[0].dims[-1] for cell_ in cells]
        for cell_, state in zip(cells, own_states, strict=True):
            _cell(w, pattern, cell_, below, state, hidden)
        below = [Letter("joined", w.sum(own_states, [hidden] * directions, "cat", event.name))]
    for tensor in states:
        own = pattern.take(tensor, "ordered")
        if not apart:
            w.unify(tensor.dims[-1], states[0].dims[-1])
            set_role(own[-1], "joined")
        if batch is not None and own[-2]:
            w.unify(tensor.dims[-2], input.dims[batch])
            own[-2] = slots[batch]
            set_role(slots[batch], "diagonal")
    pattern.out([*slots[:-1], below])
    for tensor in event.outs[1:]:
        lead = pattern.new(w, tensor.shape[0], "ordered", "layers", event.name)
        last = pattern.new(w, hidden, "ordered", "states", event.name) if apart else [Letter("joined", states[0].dims[-1])]
        pattern.out([lead, *([slots[batch]] if batch is not None else []), last])
    return pattern


def _cell(
    w: Wires, pattern: Pattern, cell: Sequence[Any], below: list[Letter], state: Any, hidden: int
) -> None:
    """Unify the parameters of one layer in one direction: each gate is a part with the hidden wire."""
    inward, recurrent_, *biases = cell
    if below:
        w.unify(inward.dims[1], below[0].atoms)
    w.unify(recurrent_.dims[1], state)
    for parameter in (inward, recurrent_, *biases):
        for gate in range(parameter.shape[0] // hidden):
            w.unify(w.slice(parameter.dims[0], gate * hidden, (gate + 1) * hidden), state)
        own: Slots = [[Letter("joined", parameter.dims[0])]]
        if parameter is inward:
            own.append(below)
        elif parameter is recurrent_:
            own.append([Letter("joined", state)])
        pattern.ins[parameter.slot] = own


def cell(w: Wires, event: Event, input: Operand, hidden: Any, w_ih: Operand, w_hh: Operand, *biases: Any, **kwargs: Any) -> Pattern:
    """One step of an LSTM, GRU or RNN: gates share the hidden wire."""
    states = list(hidden) if isinstance(hidden, (tuple, list)) else [hidden]
    size = states[0].shape[-1]
    pattern = Pattern("scan")
    slots = pattern.take(input)
    set_role(slots[-1], "contracted")
    state = states[0].dims[-1]
    weights = [w_ih, w_hh, *(bias for bias in biases if isinstance(bias, Operand))]
    if size == 1 or len(weights) not in (2, 4):
        raise NoRuleError
    _cell(w, pattern, weights, slots[-1], state, size)
    for tensor in states:
        own = pattern.take(tensor, "ordered")
        w.unify(tensor.dims[-1], state)
        set_role(own[-1], "joined")
        if input.ndim > 1 and own[0]:
            w.unify(tensor.dims[0], input.dims[0])
            own[0] = slots[0]
            set_role(slots[0], "diagonal")
    for _ in event.outs:
        pattern.out([*slots[:-1], [Letter("joined", state)]])
    return pattern
