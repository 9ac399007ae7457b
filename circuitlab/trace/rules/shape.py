"""Reindexing: functions that move, merge, split, repeat and cut axes, and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.pattern import (
    Letter,
    NoRuleError,
    Pattern,
    Slots,
    axes_of,
    axis_of,
    cut_roles,
    elementwise,
    regrouped,
    set_role,
    shape_args,
    united,
)
from circuitlab.trace.wires import ClashError, Dim, Wires


def same(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """The same array: contiguous, clone, detach, casts."""
    if input.shape != event.outs[0].shape:
        raise NoRuleError
    pattern = Pattern("reindex")
    pattern.out(pattern.take(input))
    return pattern


def view(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Row-major reshape to the shape that came out (view, reshape, flatten, unflatten, ravel ...)."""
    return regrouped(w, input, event.outs[0].shape)


def permute(w: Wires, event: Event, input: Operand, *dims: Any, **kwargs: Any) -> Pattern:
    """Dimensions in another order."""
    order = [axis_of(d, input.ndim) for d in shape_args(dims or (kwargs["dims"],))]
    return _ordered(input, order)


def transpose(w: Wires, event: Event, input: Operand, dim0: int, dim1: int) -> Pattern:
    """Two dimensions change places."""
    order = list(range(input.ndim))
    a, b = axis_of(dim0, input.ndim), axis_of(dim1, input.ndim)
    order[a], order[b] = order[b], order[a]
    return _ordered(input, order)


def turned(w: Wires, event: Event, input: Operand) -> Pattern:
    """T and t reverse all dimensions; mT, mH, adjoint and H the last two."""
    order = list(range(input.ndim))
    if event.fn in ("T", "t", "numpy_T"):
        order.reverse()
    else:
        order[-1], order[-2] = order[-2], order[-1]
    return _ordered(input, order)


def movedim(w: Wires, event: Event, input: Operand, source: Any, destination: Any) -> Pattern:
    """Some dimensions go to given places, the rest keep their order."""
    moved, places = axes_of(source, input.ndim), axes_of(destination, input.ndim)
    rest = iter(d for d in range(input.ndim) if d not in moved)
    target = dict(zip(places, moved, strict=True))
    return _ordered(input, [target[n] if n in target else next(rest) for n in range(input.ndim)])


def _ordered(input: Operand, order: Sequence[int]) -> Pattern:
    pattern = Pattern("reindex")
    slots = pattern.take(input)
    pattern.out([slots[axis] for axis in order])
    return pattern


def expand(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Size-1 and new leading dimensions are repeated; what was there stays."""
    return _expanded(w, event, input, event.outs[0].shape)


def _expanded(w: Wires, event: Event, input: Operand, shape: Sequence[int]) -> Pattern:
    pattern = Pattern("reindex")
    slots = pattern.take(input)
    lead = len(shape) - input.ndim
    out: Slots = []
    for axis, size in enumerate(shape):
        known = slots[axis - lead] if axis >= lead else []
        out.append(known or pattern.new(w, size, "created", "repeat", event.name))
    pattern.out(out)
    return pattern


def broadcast_tensors(w: Wires, event: Event, *tensors: Any) -> Pattern:
    """All operands expanded to one shape."""
    pattern = elementwise(w, event, event.operands, event.outs[0].shape, "reindex")
    shape = event.outs[0].shape
    columns = pattern.outs[0]
    pattern.outs = []
    for _ in event.outs:
        pattern.out(columns)
    for column, size in zip(columns, shape, strict=True):
        if not column and size > 1:
            raise NoRuleError
    return pattern


def repeat(w: Wires, event: Event, input: Operand, *sizes: Any, **kwargs: Any) -> Pattern:
    """Tiling: ``(n) -> (r n)``."""
    counts = shape_args(sizes or (kwargs.get("repeats", kwargs.get("dims")),))
    counts = [1] * (input.ndim - len(counts)) + counts
    pattern = Pattern("reindex")
    slots = pattern.take(input)
    lead = len(counts) - input.ndim
    pattern.out([
        [*pattern.new(w, count, "created", "repeat", event.name), *(slots[axis - lead] if axis >= lead else [])]
        for axis, count in enumerate(counts)
    ])
    return pattern


def repeat_interleave(w: Wires, event: Event, input: Operand, repeats: Any, dim: int | None = None, **kw: Any) -> Pattern:
    """Each entry r times in a row: ``(n) -> (n r)``."""
    pattern = Pattern("reindex")
    out = [list(letters) for letters in pattern.take(input)]
    if isinstance(repeats, Operand):  # a number for each entry
        pattern.kind = "gather"
        axis = axis_of(0 if dim is None else dim, input.ndim)
        if dim is None and input.ndim != 1:
            raise NoRuleError
        set_role(out[axis], "ordered")
        pattern.take(repeats, "ordered")
        out[axis] = pattern.new(w, event.outs[0].shape[axis], "ordered", "repeat", event.name)
        pattern.out(out)
        return pattern
    if dim is None:  # of the flattened array
        out = [[letter for letters in out for letter in letters]]
    axis = axis_of(0 if dim is None else dim, len(out))
    out[axis] += pattern.new(w, repeats, "created", "repeat", event.name)
    pattern.out(out)
    return pattern


def pieces(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """split, chunk, tensor_split: consecutive parts of one dimension."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if event.fn in ("hsplit", "vsplit", "dsplit"):
        dim = {"hsplit": 1 if input.ndim > 1 else 0, "vsplit": 0, "dsplit": 2}[event.fn]
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("slice", parts=[out.shape[axis] for out in event.outs], dim=axis)
    slots = pattern.take(input)
    if len(event.outs) == 1:
        pattern.out(slots)
        return pattern
    before, start = len(w.picks), 0
    for out in event.outs:
        size = out.shape[axis]
        pattern.out(_with_part(w, pattern, input, slots, axis, start, start + size, event))
        start += size
    slots[axis] = cut_roles(w, input.dims[axis], before)
    return pattern


def _with_part(
    w: Wires, pattern: Pattern, input: Operand, slots: Slots, axis: int, start: int, stop: int, event: Event
) -> Slots:
    """The operand's dimensions with entries start to stop of one of them."""
    out = list(slots)
    if (start, stop) == (0, input.shape[axis]):
        return out
    try:
        part = w.slice(input.dims[axis], start, stop)
    except ClashError:
        w.pick(input.dims[axis])
        part = w.new(stop - start, "opaque", event.name)
        out[axis] = [Letter("opaque", part)] if part else []
        return out
    out[axis] = [Letter("joined", part)] if part else []
    return out


def narrow(w: Wires, event: Event, input: Operand, dim: int, start: Any, length: int) -> Pattern:
    """A slice of one dimension."""
    if not isinstance(start, int):
        raise NoRuleError
    axis = axis_of(dim, input.ndim)
    start %= max(input.shape[axis], 1)
    pattern = Pattern("slice", dim=axis, start=start, stop=start + length)
    slots = pattern.take(input)
    before = len(w.picks)
    pattern.out(_with_part(w, pattern, input, slots, axis, start, start + length, event))
    if length == 1:
        set_role(slots[axis], "indexed")
    elif length != input.shape[axis]:
        slots[axis] = cut_roles(w, input.dims[axis], before)
    return pattern


def unbind(w: Wires, event: Event, input: Operand, dim: int = 0) -> Pattern:
    """Each index of a dimension on its own."""
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("index", dim=axis)
    slots = pattern.take(input)
    set_role(slots[axis], "indexed")
    for _ in event.outs:
        pattern.out(slots[:axis] + slots[axis + 1 :])
    return pattern


def select(w: Wires, event: Event, input: Operand, dim: int, index: Any) -> Pattern:
    """One index of a dimension."""
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("index", dim=axis, index=index if isinstance(index, int) else None)
    slots = pattern.take(input)
    set_role(slots[axis], "indexed")
    pattern.out(slots[:axis] + slots[axis + 1 :])
    return pattern


def tensors_of(tensors: Any, more: Sequence[Any] = ()) -> list[Operand]:
    """The operands of a function that takes them in a list, or one by one."""
    listed = tensors if isinstance(tensors, (tuple, list)) else (tensors, *more)
    return [item for item in listed if isinstance(item, Operand)]


def cat(w: Wires, event: Event, tensors: Any, dim: int = 0) -> Pattern:
    """Dimensions put end to end: a sum of wires."""
    every = tensors_of(tensors)
    operands = [o for o in every if o.shape != (0,)] or every[:1]
    axis = axis_of(dim, operands[0].ndim)
    filled = [o for o in operands if o.shape[axis]]
    if len(filled) == 1:  # put end to end with nothing: a cache that was empty
        pattern = Pattern("reindex")
        for operand in every:
            pattern.take(operand, "joined")
        pattern.out(pattern.take(filled[0]))
        return pattern
    pattern = Pattern("cat", dim=axis)
    slots = paired(w, pattern, operands, axis)
    joined: list[Dim] = [operand.dims[axis] for operand in operands]
    whole = w.sum(joined, [operand.shape[axis] for operand in operands], "cat", event.name)
    for operand in every:
        if operand.shape == (0,):
            pattern.take(operand, "joined")
            continue
        pattern.ins[operand.slot][axis] = [Letter("joined", operand.dims[axis])] if operand.dims[axis] else []
    slots[axis] = [Letter("joined", whole)] if whole else []
    pattern.out(slots)
    return pattern


def paired(w: Wires, pattern: Pattern, operands: list[Operand], skip: int) -> Slots:
    """Letters of operands that agree in every dimension but one."""
    first = operands[0]
    columns: Slots = []
    for operand in operands:
        pattern.ins[operand.slot] = [[] for _ in range(operand.ndim)]
    for axis in range(first.ndim):
        if axis == skip or not first.dims[axis]:
            columns.append([])
            continue
        letter = Letter("broadcast", first.dims[axis])
        for operand in operands[1:]:
            if not united(w, letter, operand.dims[axis], apart=True):
                pattern.ins[operand.slot][axis] = [Letter("ordered", operand.dims[axis])]
        columns.append([letter])
    for operand in operands:
        own = pattern.ins[operand.slot]
        pattern.ins[operand.slot] = [dim or list(column) for dim, column in zip(own, columns, strict=True)]
    return columns


def stack(w: Wires, event: Event, tensors: Any, dim: int = 0) -> Pattern:
    """Arrays of one shape along a new dimension."""
    operands = tensors_of(tensors)
    axis = axis_of(dim, operands[0].ndim + 1)
    pattern = Pattern("cat", dim=axis)
    columns = paired(w, pattern, operands, -1)
    made = pattern.new(w, len(operands), "joined", "stack", event.name)
    pattern.out(columns[:axis] + [made] + columns[axis:])
    return pattern


def stacked(w: Wires, event: Event, tensors: Any) -> Pattern:
    """hstack, vstack, dstack, column_stack: put end to end, or side by side if they have a dimension too few."""
    ndim = {operand.ndim for operand in event.operands}
    place = {"hstack": 1, "column_stack": 1, "dstack": 2}.get(event.fn, 0)
    if ndim == {1} and event.fn == "hstack":
        return cat(w, event, tensors, 0)
    if ndim == {1} and event.fn != "dstack":
        return stack(w, event, tensors, place)
    if ndim == {2} and event.fn == "dstack":
        return stack(w, event, tensors, 2)
    if min(ndim) < (3 if event.fn == "dstack" else 2):
        raise NoRuleError
    return cat(w, event, tensors, place)


def at_least(w: Wires, event: Event, *tensors: Any) -> Pattern:
    """Dimensions of size 1 added until there are enough."""
    pattern = Pattern("reindex")
    for operand, out in zip(event.operands, event.outs, strict=True):
        one = regrouped(w, operand, out.shape)
        pattern.ins.update(one.ins)
        pattern.outs += one.outs
    return pattern


def channel_shuffle(w: Wires, event: Event, input: Operand, groups: int) -> Pattern:
    """``b (g c) ... -> b (c g) ...``."""
    outer, inner = w.regroup([input.dims[1]], [groups, input.shape[1] // groups])
    pattern = Pattern("reindex")
    slots = pattern.take(input)
    group, rest = ([Letter("broadcast", dim)] if dim else [] for dim in (outer, inner))
    slots[1] = [*group, *rest]
    out = list(slots)
    out[1] = [*rest, *group]
    pattern.out(out)
    return pattern


def pad(
    w: Wires, event: Event, input: Operand, pad: Any, mode: str = "constant", value: Any = None, **kwargs: Any
) -> Pattern:
    """Constants before and after an axis, which stays a part of the longer one; other modes make a new axis."""
    pattern = Pattern("cat", mode=mode, pad=list(pad))
    slots = pattern.take(input)
    out = list(slots)
    for number in range(len(pad) // 2):
        axis = input.ndim - 1 - number
        if not all(isinstance(count, int) for count in pad[2 * number : 2 * number + 2]):
            set_role(slots[axis], "ordered")  # by counts that are computed
            out[axis] = pattern.new(w, event.outs[0].shape[axis], "ordered", "pad", event.name)
            continue
        before, after = int(pad[2 * number]), int(pad[2 * number + 1])
        if not before and not after:
            continue
        size = input.shape[axis]
        if mode != "constant" or before < 0 or after < 0:
            set_role(slots[axis], "ordered")
            out[axis] = pattern.new(w, size + before + after, "ordered", "pad", event.name)
            continue
        set_role(slots[axis], "joined")
        new = [w.new(n, "pad", event.name) for n in (before, after) if n]
        blocks = [new[0], input.dims[axis]] if before else [input.dims[axis]]
        sizes = [before, size] if before else [size]
        if after:
            blocks.append(new[-1])
            sizes.append(after)
        whole = w.sum(blocks, sizes, "pad", event.name)
        out[axis] = [Letter("joined", whole)] if whole else []
    pattern.out(out)
    return pattern


def pixel_shuffle(w: Wires, event: Event, input: Operand, *args: int, **kwargs: int) -> Pattern:
    """``(c r s) h w -> c (h r) (w s)``, and the inverse for pixel_unshuffle."""
    factor = args[0] if args else next(iter(kwargs.values()))
    pattern = Pattern("reindex")
    slots = [list(letters) for letters in pattern.take(input)]
    c, h, x = input.ndim - 3, input.ndim - 2, input.ndim - 1
    if event.fn == "pixel_shuffle":
        sizes = (input.shape[c] // factor**2, factor, factor)
        channel, first, second = (
            [Letter("broadcast", dim)] if dim else [] for dim in w.regroup([input.dims[c]], list(sizes))
        )
        pattern.ins[input.slot][c] = [*channel, *first, *second]
        slots[c], slots[h], slots[x] = channel, [*slots[h], *first], [*slots[x], *second]
    else:
        halves: list[list[list[Letter]]] = []
        for axis in (h, x):
            groups = w.regroup([input.dims[axis]], [input.shape[axis] // factor, factor])
            halves.append([[Letter("broadcast", dim)] if dim else [] for dim in groups])
            pattern.ins[input.slot][axis] = [*halves[-1][0], *halves[-1][1]]
        slots[c] = [*slots[c], *halves[0][1], *halves[1][1]]
        slots[h], slots[x] = halves[0][0], halves[1][0]
    pattern.out(slots)
    return pattern


def meshgrid(w: Wires, event: Event, *tensors: Any, indexing: str = "ij", **kwargs: Any) -> Pattern:
    """Each operand along a dimension of its own, repeated over the others."""
    operands = tensors_of(tensors[0] if tensors and isinstance(tensors[0], (list, tuple)) else tensors)
    pattern = Pattern("reindex")
    letters = [pattern.take(operand)[0] if operand.ndim else [] for operand in operands]
    order = list(range(len(operands)))
    if indexing == "xy" and len(order) > 1:
        order[:2] = [1, 0]
    for _ in event.outs:
        pattern.out([letters[n] for n in order])
    return pattern


def write(w: Wires, event: Event, view: Event, base: Operand, written: Operand, number: int) -> Pattern:
    """The base of a view after the view was written to: axes that the view has whole pass, along others it matters where."""
    pattern = Pattern("box")
    mark = w.mark()
    try:  # the view's own rule, asked again
        seen = view.rule(w, view, Operand(0, base.value), *view.args[1:], **view.kwargs)
        slots, own = seen.ins[0], seen.outs[number]
        for letters, dim in zip(own, written.dims, strict=True):
            w.unify([atom for letter in letters for atom in letter.atoms], dim)
    except (NoRuleError, ClashError):
        w.rollback(mark)
        pattern.take(written, "ordered")
        pattern.out(pattern.take(base, "ordered"))
        return pattern
    shared = {id(letter) for letters in slots for letter in letters} & {id(letter) for letters in own for letter in letters}
    for letter in (letter for letters in (*slots, *own) for letter in letters):
        whole = id(letter) in shared and letter.role in ("broadcast", "diagonal")
        letter.role = "diagonal" if whole else "ordered"
    pattern.ins.update({base.slot: slots, written.slot: own})
    pattern.out(slots)
    return pattern


def to_complex(w: Wires, event: Event, input: Operand) -> Pattern:
    """The last dimension holds real and imaginary parts; it goes."""
    pattern = Pattern("box")
    slots = pattern.take(input)
    set_role(slots[-1], "ordered")
    pattern.out(slots[:-1])
    return pattern


def to_real(w: Wires, event: Event, input: Operand) -> Pattern:
    """A new last dimension holds real and imaginary parts."""
    pattern = Pattern("box")
    slots = pattern.take(input)
    pattern.out([*slots, pattern.new(w, 2, "ordered", "complex", event.name)])
    return pattern


def diagonal(
    w: Wires, event: Event, input: Operand, offset: int = 0, dim1: int | None = None, dim2: int | None = None, **kwargs: Any
) -> Pattern:
    """Entries of two dimensions with one number, as a new last dimension; the rest pass."""
    first, second = (-2, -1) if event.fn.startswith("linalg") else (0, 1)
    taken = [axis_of(first if dim1 is None else dim1, input.ndim), axis_of(second if dim2 is None else dim2, input.ndim)]
    pattern = Pattern("box", offset=kwargs.get("offset", offset))
    slots = pattern.take(input)
    for axis in taken:
        set_role(slots[axis], "ordered")
    kept = [letters for axis, letters in enumerate(slots) if axis not in taken]
    pattern.out([*kept, pattern.new(w, event.outs[0].shape[-1], "ordered", "diagonal", event.name)])
    return pattern


def diagonals(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Entries of one dimension laid along a diagonal of two new ones, and back."""
    if event.fn == "diag" and input.ndim == 2:
        return diagonal(w, event, input, *args, **kwargs)
    if event.fn == "diag_embed" and (len(args) > 1 or kwargs.keys() - {"offset"}):
        raise NoRuleError
    pattern = Pattern("box")
    slots = pattern.take(input)
    lead = input.ndim - 1 if event.fn == "diag_embed" else 0
    for letters in slots[lead:]:
        set_role(letters, "ordered")
    made = [pattern.new(w, size, "ordered", "diagonal", event.name) for size in event.outs[0].shape[-2:]]
    pattern.out([*slots[:lead], *made])
    return pattern
