"""Recurrent nets, fused over time or one step of them, and the packing of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.index import ALIKE
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern, Slots, set_role
from circuitlab.trace.rules.shape import paired, tensors_of
from circuitlab.trace.wires import Dim, Wires, leaves


def recurrent(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Fused lstm, gru, rnn: gates share the hidden wire; time is ordered, and so is the axis of packed sequences.

    The states of all layers and directions stand in one array, entry by entry, which makes their hidden wires one. If
    they start from zeros and nobody reads how they end, that array says nothing, and each has a hidden wire of its own.
    """
    sizes = args[0] if isinstance(args[2], (tuple, list)) else None  # of packed sequences
    start, weights, biases, layers, _, _, bidirectional, *rest = args if sizes is None else args[1:]
    states: Sequence[Operand] = start if isinstance(start, (tuple, list)) else (start,)
    cells = _cells(weights, layers * (2 if bidirectional else 1), biases)
    pattern = Pattern("scan", layers=layers, bidirectional=bidirectional or None)
    slots = pattern.take(input)
    set_role(slots[-1], "contracted")
    if sizes is None:
        batch = _across(slots, input.ndim, bool(rest[0]))
    else:
        set_role(slots[0], "ordered")
        pattern.take(sizes, "ordered")
        known = _padded(input, sizes)
        batch = _letters("ordered", known[0] if known else states[0].dims[1])
    apart = not any(out.read for out in event.outs[1:]) and all(
        state.value.event is not None and state.value.event.fn in ALIKE for state in states
    )
    if not apart and len(cells[0]) not in (3, 5):  # with projections, what an LSTM gives is narrower than what it keeps
        w.unify(states[0].dims[-1], states[-1].dims[-1])
    below = slots[-1]
    for layer in range(layers):
        row = cells[layer * len(cells) // layers : (layer + 1) * len(cells) // layers]
        given: list[Dim] = []
        for cell_ in row:
            given.append(cell_[1].dims[-1] if apart else states[0].dims[-1])
            _cell(w, pattern, cell_, below, given[-1], None if apart else states[-1].dims[-1])
        below = _letters("joined", w.sum(given, [states[0].shape[-1]] * len(row), "cat", event.name))
    for state in states:
        own = pattern.take(state, "ordered")
        if not apart:
            set_role(own[-1], "joined")
        if batch and own[-2]:
            w.unify(state.dims[-2], batch[0].atoms)
            own[-2] = batch
            if sizes is None:
                set_role(batch, "diagonal")
    pattern.out([*slots[:-1], below])
    for tensor, state in zip(event.outs[1:], states, strict=True):
        lead = pattern.new(w, tensor.shape[0], "ordered", "layers", event.name)
        last = pattern.new(w, tensor.shape[-1], "ordered", "states", event.name) if apart else _letters("joined", state.dims[-1])
        pattern.out([lead, *([batch] if len(tensor.shape) > 2 else []), last])
    return pattern


def _letters(role: str, dim: Dim) -> list[Letter]:
    return [Letter(role, dim)] if dim else []


def _across(slots: Slots, ndim: int, batch_first: bool) -> list[Letter]:
    """The letters of the batch; time is ordered."""
    time = 1 if batch_first and ndim > 2 else 0
    set_role(slots[time], "ordered")
    return slots[1 - time] if ndim > 2 else []


def _cells(weights: Any, count: int, biases: bool) -> list[Sequence[Operand]]:
    """The weights of each layer and direction: in, recurrent, the two biases if any, and a projection if any."""
    if not isinstance(weights, (tuple, list)) or not isinstance(biases, bool):
        raise NoRuleError
    each = len(weights) // count
    if each not in ((4, 5) if biases else (2, 3)):
        raise NoRuleError
    return [weights[n * each : (n + 1) * each] for n in range(count)]


def _cell(
    w: Wires, pattern: Pattern, weights: Sequence[Operand], below: list[Letter], given: Dim, kept: Dim | None
) -> None:
    """Unify the parameters of one layer in one direction: each gate is a part with the hidden wire.

    Args:
        given: the axis of what the cell gives on. kept: of what it keeps, None where nothing else has it.
    """
    inward, recurrent_ = weights[:2]
    projection = weights[-1] if len(weights) in (3, 5) else None
    if below:
        w.unify(inward.dims[1], below[0].atoms)
    w.unify(recurrent_.dims[1], given)
    hidden = given if projection is None else projection.dims[1]
    if projection is not None:
        w.unify(projection.dims[0], given)
        if kept is not None:
            w.unify(hidden, kept)
        pattern.ins[projection.slot] = [_letters("joined", given), _letters("joined", hidden)]
    size = recurrent_.shape[1] if projection is None else projection.shape[1]
    for parameter in weights if projection is None else weights[:-1]:
        for gate in range(parameter.shape[0] // size):
            w.unify(w.slice(parameter.dims[0], gate * size, (gate + 1) * size), hidden)
        own = [_letters("joined", parameter.dims[0])]
        if parameter is inward:
            own.append(below)
        elif parameter is recurrent_:
            own.append(_letters("joined", given))
        pattern.ins[parameter.slot] = own


def cell(w: Wires, event: Event, input: Operand, hidden: Any, w_ih: Operand, w_hh: Operand, *biases: Any, **kwargs: Any) -> Pattern:
    """One step of an LSTM, GRU or RNN: gates share the hidden wire."""
    states: Sequence[Operand] = hidden if isinstance(hidden, (tuple, list)) else [hidden]
    pattern = Pattern("scan")
    slots = pattern.take(input)
    set_role(slots[-1], "contracted")
    state = states[0].dims[-1]
    _cell(w, pattern, [w_ih, w_hh, *(bias for bias in biases if isinstance(bias, Operand))], slots[-1], state, None)
    for tensor in states:
        own = pattern.take(tensor, "ordered")
        w.unify(tensor.dims[-1], state)
        set_role(own[-1], "joined")
        if input.ndim > 1 and own[0]:
            w.unify(tensor.dims[0], input.dims[0])
            own[0] = slots[0]
            set_role(slots[0], "diagonal")
    for _ in event.outs:
        pattern.out([*slots[:-1], _letters("joined", state)])
    return pattern


# packed sequences ----------------------------------------------------------------------------------------


def pack(w: Wires, event: Event, input: Operand, lengths: Operand, batch_first: bool) -> Pattern:
    """Batch and time become one axis, without what is beyond each sequence's length; the rest passes."""
    pattern = Pattern("box")
    slots = pattern.take(input)
    for letters in slots[:2]:
        set_role(letters, "ordered")
    w.unify(input.dims[0 if batch_first else 1], lengths.dims[0])
    pattern.take(lengths, "ordered")
    data, sizes = event.outs
    pattern.out([pattern.new(w, data.shape[0], "ordered", "packed", event.name), *slots[2:]])
    pattern.out([pattern.new(w, sizes.shape[0], "ordered", "sizes", event.name)])
    return pattern


def unpack(w: Wires, event: Event, data: Operand, sizes: Operand, batch_first: bool, *args: Any, **kwargs: Any) -> Pattern:
    """The packed axis becomes batch and time again, those that were packed."""
    pattern = Pattern("box")
    slots = pattern.take(data)
    set_role(slots[0], "ordered")
    pattern.take(sizes, "ordered")
    padded, lengths = event.outs
    known = _padded(data, sizes)
    batch = _letters("ordered", known[0]) if known else pattern.new(w, lengths.shape[0], "ordered", "batch", event.name)
    length = padded.shape[1 if batch_first else 0]
    if known and known[2] == length:
        time = _letters("ordered", known[1])
    else:
        time = pattern.new(w, length, "ordered", "time", event.name)
    pattern.out([*([batch, time] if batch_first else [time, batch]), *slots[1:]])
    pattern.out([batch])
    return pattern


def _padded(data: Operand, sizes: Operand) -> tuple[Dim, Dim, int] | None:
    """Batch, time and its length before packing; None where it is not known to be these sizes that data was packed by."""
    event = sizes.value.event
    if event is None or event.fn != "_pack_padded_sequence":
        return None
    input, batch_first = event.operands[0], event.args[2]
    if leaves(event.outs[0].dims[0]) != leaves(data.dims[0]) or sizes.value is not event.outs[1]:
        return None
    batch, time = (0, 1) if batch_first else (1, 0)
    return input.dims[batch], input.dims[time], input.shape[time]


def pad(w: Wires, event: Event, sequences: Any, *args: Any, **kwargs: Any) -> Pattern:
    """Sequences, each filled up to the length of the longest, side by side."""
    batch_first = kwargs.get("batch_first", args[0] if args else False)
    operands = tensors_of(sequences)
    pattern = Pattern("cat")
    slots = paired(w, pattern, operands, 0)
    for operand in operands:
        pattern.ins[operand.slot][0] = _letters("ordered", operand.dims[0])
    out = event.outs[0].shape
    batch = pattern.new(w, len(operands), "joined", "stack", event.name)
    time = pattern.new(w, out[1 if batch_first else 0], "ordered", "pad", event.name)
    pattern.out([*([batch, time] if batch_first else [time, batch]), *slots[1:]])
    return pattern
