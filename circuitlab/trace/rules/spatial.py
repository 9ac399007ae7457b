"""Convolution, pooling and resizing: functions that slide over positions."""

from __future__ import annotations

from math import prod
from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern, Slots, set_role
from circuitlab.trace.wires import ClashError, Dim, Wires, size_of


def _numbers(value: Any, count: int) -> list[int]:
    if isinstance(value, (tuple, list)):
        return [int(v) for v in (value * count if len(value) == 1 else value)]
    return [int(value)] * count


def _positions(
    w: Wires, event: Event, pattern: Pattern, input: Operand, slots: Slots, count: int, alone: list[bool], aligned: list[bool]
) -> Slots:
    """The position dimensions of a result.

    An axis that keeps its size stays the same axis: position i of the result is position i of the input. ``alone``
    says where each position is computed from itself only; ``aligned`` where windows move by one position at a time.
    """
    made: Slots = []
    first = input.ndim - count
    for n in range(count):
        letters, size = slots[first + n], event.outs[0].shape[len(event.outs[0].shape) - count + n]
        if alone[n] and size == input.shape[first + n]:
            made.append(letters)
            continue
        set_role(letters, "windowed")
        if size == input.shape[first + n] and aligned[n]:
            made.append(letters)
        else:
            origin = letters[0].atoms[0] if letters else None
            made.append(pattern.new(w, size, "windowed", "positions", event.name, origin, n))
    return made


def conv(
    w: Wires,
    event: Event,
    input: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Pattern:
    """conv1d to conv3d: windows over positions, product over window and channels."""
    return _convolve(w, event, input, weight, bias, stride, padding, dilation, groups, False)


def conv_transpose(
    w: Wires,
    event: Event,
    input: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Pattern:
    """Transposed convolution; its weight is (in, out / groups, window)."""
    return _convolve(w, event, input, weight, bias, stride, padding, dilation, groups, True)


def _convolve(
    w: Wires,
    event: Event,
    input: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    transposed: bool,
) -> Pattern:
    count = weight.ndim - 2
    window = list(weight.shape[2:])
    strides = _numbers(stride, count)
    pattern = Pattern("conv", kernel=window, stride=strides, groups=groups if groups > 1 else None)
    pattern.attrs.update({key: True for key, on in (("transposed", transposed), ("bias", bias is not None)) if on})
    slots = pattern.take(input)
    channel = input.ndim - count - 1
    rows, columns = _channels(w, event, pattern, input, weight, slots, channel, groups, transposed)
    alone = [k == 1 and s == 1 for k, s in zip(window, strides, strict=True)]
    windows = [[Letter("windowed", dim)] if dim else [] for dim in weight.dims[2:]]
    pattern.ins[weight.slot] = [rows[0], rows[1], *windows]
    positions = _positions(w, event, pattern, input, slots, count, alone, [s == 1 for s in strides])
    if isinstance(bias, Operand):
        w.unify([atom for letter in columns for atom in letter.atoms], bias.dims[0])
        pattern.ins[bias.slot] = [columns]
    pattern.out([*slots[:channel], columns, *positions])
    return pattern


def _channels(
    w: Wires,
    event: Event,
    pattern: Pattern,
    input: Operand,
    weight: Operand,
    slots: Slots,
    channel: int,
    groups: int,
    transposed: bool,
) -> tuple[tuple[list[Letter], list[Letter]], list[Letter]]:
    """Letters of the weight's two channel dimensions, and of the result's channels."""
    made, read = (1, 0) if transposed else (0, 1)
    if groups == 1:
        if input.dims[channel]:
            w.unify(input.dims[channel], weight.dims[read])
            set_role(slots[channel], "contracted")
        out = [Letter("created", weight.dims[made])] if weight.dims[made] else []
        rows = [[], []]
        rows[made], rows[read] = out, slots[channel]
        return (rows[0], rows[1]), out
    mark = w.mark()
    try:
        group: Dim
        if transposed:
            group, inner = w.regroup([input.dims[channel]], [groups, input.shape[channel] // groups])
            w.unify([*group, *inner], weight.dims[0])
            outer = weight.dims[1]
        else:
            group, inner = w.regroup([input.dims[channel]], [groups, input.shape[channel] // groups])
            w.unify(inner, weight.dims[1])
            first, outer = w.regroup([weight.dims[0]], [groups, weight.shape[0] // groups])
            w.unify(first, group)
    except ClashError:
        w.rollback(mark)
        # the groups cut across what is known of the channels: ends and starts, no claim on groups
        set_role(slots[channel], "ordered")
        rows = [[Letter("ordered", dim)] if dim else [] for dim in weight.dims[:2]]
        out = pattern.new(w, event.outs[0].shape[channel], "ordered", "channels", event.name) if transposed else rows[0]
        return (rows[0], rows[1]), out
    g = [Letter("diagonal", group)] if group else []
    i = [Letter("contracted", inner)] if inner else []
    o = [Letter("created", outer)] if outer else []
    slots[channel][:] = [*g, *i]
    if transposed:
        return ([*g, *i], o), [*g, *o]
    return ([*g, *o], i), [*g, *o]


def pool(w: Wires, event: Event, input: Operand, kernel_size: Any = None, stride: Any = None, *args: Any,
         **kwargs: Any) -> Pattern:
    """Max, average and other pooling over windows of the last dimensions."""
    count = int(next(c for c in event.fn if c.isdigit()))
    if event.fn.startswith("adaptive"):
        return _adaptive(w, event, input, count)
    window = _numbers(kernel_size, count) if isinstance(kernel_size, (int, tuple, list)) else None
    pattern = Pattern("pool", kernel=window, stride=_numbers(stride, count) if stride else window)
    slots = pattern.take(input)
    steps = _numbers(stride, count) if stride else window or [0] * count
    # where the largest was is numbered along all positions
    alone = [k == s == 1 and len(event.outs) == 1 for k, s in zip(window or [0] * count, steps, strict=True)]
    positions = _positions(w, event, pattern, input, slots, count, alone, [s == 1 for s in steps])
    for _ in event.outs:
        pattern.out([*slots[: input.ndim - count], *positions])
    return pattern


def _adaptive(w: Wires, event: Event, input: Operand, count: int) -> Pattern:
    sizes = event.outs[0].shape[-count:]
    if len(event.outs) == 1 and all(size == 1 for size in sizes):
        pattern = Pattern("reduce")
        slots = pattern.take(input)
        for letters in slots[-count:]:
            set_role(letters, "reduced")
        pattern.out([*slots[:-count], *([] for _ in range(count))])
        return pattern
    pattern = Pattern("pool")
    slots = pattern.take(input)
    same = [size == input.shape[input.ndim - count + n] for n, size in enumerate(sizes)]
    alone = [kept and len(event.outs) == 1 for kept in same]
    positions = _positions(w, event, pattern, input, slots, count, alone, same)
    for _ in event.outs:
        pattern.out([*slots[:-count], *positions])
    return pattern


def unpool(w: Wires, event: Event, input: Operand, indices: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Entries put back to where the largest were."""
    count = int(next(c for c in event.fn if c.isdigit()))
    pattern = Pattern("scatter")
    slots = pattern.take(input)
    for axis, (letters, one, other) in enumerate(zip(slots, input.dims, indices.dims, strict=True)):
        w.unify(one, other)
        set_role(letters, "diagonal" if axis < input.ndim - count else "ordered")
    pattern.ins[indices.slot] = list(slots)
    made = [pattern.new(w, size, "ordered", "positions", event.name) for size in event.outs[0].shape[-count:]]
    pattern.out([*slots[: input.ndim - count], *made])
    return pattern


def spectrogram(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Spectra of windows of a signal, and back: a batch passes."""
    pattern = Pattern("box")
    for operand in event.operands:
        pattern.take(operand, "ordered")
    core = 1 if event.fn == "stft" else 3 if input.shape[-1] == 2 and not input.value.dtype.startswith("complex") else 2
    slots = pattern.ins[input.slot]
    lead = input.ndim - core
    for letters in slots[:lead]:
        set_role(letters, "broadcast")
    made = [pattern.new(w, size, "ordered", "spectrum", event.name) for size in event.outs[0].shape[lead:]]
    pattern.out([*slots[:lead], *made])
    return pattern


def resize(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """interpolate: positions are sampled anew."""
    count = input.ndim - 2
    pattern = Pattern("resize")
    slots = pattern.take(input)
    positions = _positions(w, event, pattern, input, slots, count, [False] * count, [True] * count)
    pattern.out([*slots[:2], *positions])
    return pattern


def unfold(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """``F.unfold``: windows of positions into channels (c k l); ``Tensor.unfold``: a window dimension at the end.

    Windows side by side, which leave nothing out, are a reshape.
    """
    out = event.outs[0].shape
    pattern = Pattern("box")
    slots = pattern.take(input)
    given = dict(zip(_UNFOLD if len(out) == input.ndim + 1 else _UNFOLD_IMAGE, args, strict=False)) | kwargs
    if len(out) == input.ndim + 1:
        axis = given["dimension"] % input.ndim
        halves = _tiled(w, slots, axis, out[axis], out[-1], given["step"])
        if halves is None:
            set_role(slots[axis], "windowed")
            halves = (pattern.new(w, out[axis], "windowed", "positions", event.name, None, 0),
                      pattern.new(w, out[-1], "windowed", "window", event.name))
        else:
            pattern.kind = "reindex"
        pattern.out([*slots[:axis], halves[0], *slots[axis + 1 :], halves[1]])
        return pattern
    if input.ndim != 4:
        raise NoRuleError
    sizes, steps = _numbers(given["kernel_size"], 2), _numbers(given.get("stride", 1), 2)
    spread, around = _numbers(given.get("dilation", 1), 2), _numbers(given.get("padding", 0), 2)
    counts = [input.shape[2 + n] // sizes[n] for n in (0, 1)]
    if not any(around) and set(spread) == {1}:
        mark = w.mark()
        high, wide = (_tiled(w, slots, 2 + n, counts[n], sizes[n], steps[n]) for n in (0, 1))
        if high is not None and wide is not None:
            pattern.kind = "reindex"
            pattern.out([slots[0], [*slots[1], *high[1], *wide[1]], [*high[0], *wide[0]]])
            return pattern
        w.rollback(mark)
        slots = pattern.take(input)
    for letters in slots[2:]:
        set_role(letters, "windowed")
    window = pattern.new(w, out[1] // input.shape[1], "windowed", "window", event.name)
    places = pattern.new(w, out[2], "windowed", "positions", event.name, None, 0)
    pattern.out([slots[0], [*slots[1], *window], places])
    return pattern


_UNFOLD = ("dimension", "size", "step")
_UNFOLD_IMAGE = ("kernel_size", "dilation", "padding", "stride")


def _tiled(
    w: Wires, slots: Slots, axis: int, count: int, size: int, step: int
) -> tuple[list[Letter], list[Letter]] | None:
    """An axis as (windows)(within each), where they lie side by side and fill it; its letters are put in their place."""
    dim = [atom for letter in slots[axis] for atom in letter.atoms]
    if count * size != size_of(dim) or (step != size and count > 1):
        return None
    try:
        outer, inner = ([Letter("broadcast", part)] if part else [] for part in w.regroup([dim], [count, size]))
    except ClashError:
        return None
    slots[axis] = [*outer, *inner]
    return outer, inner


def as_strided(w: Wires, event: Event, input: Operand, size: Any, stride: Any, storage_offset: Any = None) -> Pattern:
    """Any way to read the memory of an array that lies there in the order of its axes.

    An axis passes if one of the result steps through it from end to end, and all others, together, never do.
    """
    start, size = storage_offset or 0, event.outs[0].shape  # as it came out: the call may have numbers in tensors
    steps = [(step, count) for step, count in zip(stride, size, strict=True) if count > 1]
    if start + sum(step * (count - 1) for step, count in steps) >= prod(input.shape):
        raise NoRuleError  # beyond the array
    pattern = Pattern("box")
    slots = pattern.take(input)
    out: Slots = [pattern.new(w, count, "windowed", "positions", event.name, None, n) for n, count in enumerate(size)]
    for axis, count in enumerate(input.shape):
        inner = prod(input.shape[axis + 1 :])
        outer = inner * count
        others = list(steps)
        if count == 1 or (inner, count) not in others:
            continue
        others.remove((inner, count))
        low = sum(step * (many - 1) for step, many in others if step % outer)
        if start % outer + low < inner:
            out[[*zip(stride, size, strict=True)].index((inner, count))] = slots[axis]
    kept = {id(letter) for letters in out for letter in letters}
    for letters in slots:
        set_role([letter for letter in letters if id(letter) not in kept], "windowed")
    pattern.out(out)
    return pattern


def fold(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Windows (c k l) put back and summed into positions."""
    out = event.outs[0].shape
    if len(out) != 4 or input.ndim != 3:
        raise NoRuleError
    channel, window = w.regroup([input.dims[1]], [out[1], input.shape[1] // out[1]])
    pattern = Pattern("box")
    slots = pattern.take(input)
    c = [Letter("broadcast", channel)] if channel else []
    slots[1] = [*c, *([Letter("windowed", window)] if window else [])]
    set_role(slots[2], "windowed")
    places = [pattern.new(w, size, "windowed", "positions", event.name, None, n) for n, size in enumerate(out[2:])]
    pattern.out([slots[0], c, *places])
    return pattern


def grid_sampler(w: Wires, event: Event, input: Operand, grid: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Pixels read at given places: the places' dimensions stand for the pixels'."""
    pattern = Pattern("gather")
    slots, places = pattern.take(input), pattern.take(grid)
    if input.dims[0] or grid.dims[0]:
        w.unify(input.dims[0], grid.dims[0])
        set_role(slots[0], "diagonal")
        places[0] = slots[0]
    for letters in slots[2:]:
        set_role(letters, "gathered")
    set_role(places[-1], "ordered")
    pattern.out([slots[0], slots[1], *places[1:-1]])
    return pattern
