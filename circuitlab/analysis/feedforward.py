"""Feed-forward blocks of a circuit, found from the wires alone: nobody names layers by hand.

A feed-forward block is a hidden wire that linear maps make at each position separately, that only elementwise functions
act on, and that linear maps contract: ``FFN(x) = Σ_j act(x·K_j + b_j) V_j + c`` or, gated,
``h_j = act(x·G_j)(x·U_j)``. Neuron ``j`` has a key ``K_j`` (and a gate ``G_j``), an activation ``h_j`` and a value ``V_j``
(Geva et al., *Transformer Feed-Forward Layers Are Key-Value Memories*, 2021).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from circuitlab.analysis.hidden import Region
from circuitlab.analysis.maps import Maps, NoMapError, Weight
from circuitlab.circuit import Circuit, Wire


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block.

    Attributes:
        path: of the smallest module that holds it.
        wire: name of the hidden wire.
        size: number of neurons.
        keys: the maps that make the wire; for a gated block those without the activation ("up").
        gates: the maps whose product with the input goes through the activation and gates the keys'; () if not gated.
        values: the maps that contract the wire.
        activation: names of the functions between, in order, such as "gelu".
        zeros: whether the activation is exactly zero on a part of its range, as ReLU is.
        scales: parameters and buffers of the wire between keys and values (batch norm, learned scales).
        positions: wires of the other dimensions of what the first value map multiplies, slowest first.
        batch: number of that dimension of these which counts examples, None if there is none.
        seen: whether the wire's values are returned by the model as well.
        expert: which of the stacked experts, None for all of them.
        experts: number of that dimension of positions which counts the stacked experts, None if none does.
        told: whether it is known which of stacked experts each position is sent to.
        picked: whether its inputs are picked by an index from rows that count examples first, as for experts.
    """

    path: str
    wire: str
    size: int
    keys: tuple[Weight, ...]
    gates: tuple[Weight, ...]
    values: tuple[Weight, ...]
    activation: str = ""
    zeros: bool = False
    scales: tuple[str, ...] = ()
    positions: tuple[tuple[str, ...], ...] = ()
    batch: int | None = None
    seen: bool = False
    expert: int | None = None
    experts: int | None = None
    told: bool = True
    picked: bool = False

    @property
    def gated(self) -> bool:
        """Whether the block is gated (SwiGLU, GEGLU and the like)."""
        return bool(self.gates)

    @property
    def stacked(self) -> int:
        """Number of experts whose neurons share the wire's numbering; 1 for an ordinary block."""
        return min((weight.stacked for weight in (*self.keys, *self.gates, *self.values) if weight.stacked > 1), default=1)

    @property
    def first(self) -> tuple[Weight, ...]:
        """The maps before the activation: gates of a gated block, else keys."""
        return self.gates or self.keys


def ffn(circuit: Circuit) -> dict[str, Wire]:
    """Module path -> hidden wire of every feed-forward block of a circuit, in the order of the run.

    Blocks that stand side by side in one module, as in an MLP of three layers, go by the path of the map that makes
    their wire.
    """
    return {path: circuit.wires[found.wire] for path, found in blocks(circuit).items()}


def blocks(circuit: Circuit) -> dict[str, FeedForward]:
    """Module path -> `FeedForward`, as `ffn`."""
    maps = Maps(circuit)
    found: list[FeedForward] = []
    mine: list[tuple[set[str], set[str]]] = []  # the ops of each: into the wire, and out of it
    for op in circuit.ops:
        for axis in op.axes:
            data = maps.multiplied(op, axis) if axis.role == "contracted" else None
            if data is None:
                continue
            try:
                block = _block(Region(maps, op, axis, data))
            except NoMapError:
                continue
            at = next((n for n, known in enumerate(found) if _again(known, block, mine[n][0])), len(found))
            if at == len(found):
                found.append(block)
                mine.append((set(), set()))
            else:
                found[at] = _together(found[at], block)
            mine[at][0].update(weight.op for weight in (*block.keys, *block.gates))
            mine[at][1].update(value.op for value in block.values)
    paths, wires = [block.path for block in found], [block.wire for block in found]
    named: dict[str, FeedForward] = {}
    for block, (into, out) in zip(found, mine, strict=True):
        path = block.path
        if paths.count(path) > 1:
            path = maps.module_of(block.keys[0].op)
        if path in named:
            path = block.wire if wires.count(block.wire) == 1 else f"{path}#{len(named) + 1}"
        keys, gates = (tuple(maps.shared(weight, into, 0) for weight in some) for some in (block.keys, block.gates))
        values = tuple(maps.shared(value, out, block.size) for value in block.values)
        named[path] = replace(block, path=path, keys=keys, gates=gates, values=values)
    return named


def _again(known: FeedForward, block: FeedForward, ops: set[str]) -> bool:
    """Whether a block is one that is known: another map that reads its values, or a further call of its maps."""
    one, two = ({w.parameter + str(w.rows) for w in (*some.keys, *some.gates)} for some in (known, block))
    return one == two and (block.values[0].parameter in [value.parameter for value in known.values]
                           or any(w.op in ops for w in (*block.keys, *block.gates)))


def _block(region: Region) -> FeedForward:
    wires, positions = region.circuit.wires, region.positions
    return FeedForward(
        path=region.maps.smallest(region.ops), wire=region.wire, size=wires[region.wire].size,
        keys=region.keys, gates=region.gates, values=(region.value,), activation=region.activation, zeros=region.zeros,
        scales=tuple(region.scales), positions=positions,
        batch=next((n for n, dim in enumerate(positions) if dim and wires[dim[0]].kind == "batch"), None),
        seen=region.seen, experts=region.experts, told=region.told,
        picked=region.maps.rows_picked((region.gates or region.keys)[0]),
    )


def _together(known: FeedForward, block: FeedForward) -> FeedForward:
    """A block whose keys are met again: read by another map, activated in another way, or for other positions."""
    if block.values[0].parameter not in [value.parameter for value in known.values]:
        one, two = known.path.split("."), block.path.split(".")
        shared = [part for n, part in enumerate(one[: len(two)]) if one[: n + 1] == two[: n + 1]]
        known = replace(known, values=(*known.values, *block.values), path=".".join(shared))
    elif known.activation != block.activation:
        names = " ".join(dict.fromkeys(f"{known.activation} {block.activation}".split()))
        known = replace(known, activation=names, zeros=known.zeros and block.zeros)
    return replace(known, told=known.told and block.told, picked=known.picked and block.picked)
