"""What a cut of a recurrent net's hidden wires takes with it.

A fused recurrent net (``nn.LSTM``, ``nn.GRU``, ``nn.RNN``) keeps the states of all its layers and directions in one array,
so their hidden wires must stay equally long. Where the states start from zeros and nobody reads how they end, each layer
has a hidden wire of its own, and the arrays of states have axes that nothing else has: these get shorter too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from circuitlab.circuit import Circuit, Op
from circuitlab.errors import InputError

FUSED = frozenset("lstm gru rnn_tanh rnn_relu".split())


def states_of(op: Op, circuit: Circuit) -> Iterator[tuple[str, str | None, list[tuple[str, ...]]]]:
    """Of a fused recurrent net, each state: its name, its name at the end, and its dimension in each layer and direction."""
    number = 2 if op.fn == "lstm" else 1
    first = 2 if len(circuit.tensor(op.inputs[1]).shape) == 1 else 1  # after the sizes of packed sequences
    weights = op.inputs[first + number :]
    count = op.attrs["layers"] * (2 if op.attrs.get("bidirectional") else 1)
    cells = [weights[n * len(weights) // count : (n + 1) * len(weights) // count] for n in range(count)]
    projected = len(cells[0]) in (3, 5)
    for at, name in enumerate(op.inputs[first : first + number]):
        held = [circuit.tensor(cell[-1] if projected and at == 1 else cell[1]).dims[1] for cell in cells]
        yield name, op.outputs[1 + at] if len(op.outputs) > 1 + at else None, held


def with_states(
    circuit: Circuit, kept: Mapping[str, tuple[int, ...]], length: Callable[[tuple[str, ...]], int]
) -> dict[str, tuple[int, ...]]:
    """The entries that are kept of wires, and of the states that go with them.

    Args:
        length: of a dimension, how many entries are kept.

    Raises:
        InputError: layers that keep their states in one array would differ.
    """
    made = dict(kept)
    for op in circuit.ops:
        if op.kind != "scan" or op.fn not in FUSED:
            continue
        for state, end, held in states_of(op, circuit):
            sizes = {" ".join(dim): length(dim) for dim in held}
            whole = circuit.tensor(state).shape[-1]
            if set(sizes.values()) == {whole}:
                continue
            if len(set(sizes.values())) > 1:
                where = f" ({op.source})" if op.source else ""
                raise InputError(f"cut: {op.fn} in {op.name!r}{where} keeps the states of all its layers in one array, and they would have "
                                 f"{', '.join(f'{size} of {name!r}' for name, size in sizes.items())}; cut these wires alike, all at once")
            size = next(iter(sizes.values()))
            for name in filter(None, (state, end)):
                own = circuit.tensor(name).dims[-1]
                if own not in held:
                    made[own[0]] = tuple(range(size))  # zeros, or read by nobody: whichever they are
    return made
