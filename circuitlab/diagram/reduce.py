"""Circuit -> what is drawn: reindexing gone, chains one glyph, repeats once, constants out of sight.

The result is a `Drawing`: nodes in the order they ran, joined by bands. Which tracks pass a node and which end at it is
read off the ops' axes: nothing here guesses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from circuitlab.circuit import Axis, Block, Circuit, Op
from circuitlab.diagram.arrays import Arrays
from circuitlab.diagram.bundles import bundles, factors
from circuitlab.diagram.drawing import Band, Drawing, Node, Occurrence
from circuitlab.diagram.labels import labels
from circuitlab.diagram.repeats import Repeats, is_silent
from circuitlab.diagram.scales import absorb_scales
from circuitlab.diagram.signs import part_of, sign_of


@dataclass
class _Unit:
    """What becomes one node: some ops, or a folded block. Of a fused map, one part: it makes that part alone."""

    ops: list[Op]
    block: Block | None
    plates: tuple[str, ...]
    folded: bool
    count: int = 1
    makes: str = ""
    part: tuple[int, int] = (0, 1)

    @property
    def outputs(self) -> list[str]:
        """What others may read."""
        return [self.makes] if self.makes else [name for op in self.ops for name in op.outputs]


_SOON = 2
"""Readers of an array this many nodes after the first share its copy."""
_QUIET_FUNCTIONS = {"linear", "contract", "softmax", "conv", "embedding", "box"}


class Reducer:
    """Makes the drawing of one block of a circuit."""

    def __init__(
        self,
        circuit: Circuit,
        *,
        depth: int,
        opened: frozenset[str],
        closed: frozenset[str],
        batch: bool,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self.circuit = circuit
        self.opened, self.closed, self.depth, self.hidden = opened, closed, depth, hidden
        self.static = _static(circuit)
        self.arrays = Arrays(circuit, self.static, batch=batch)
        self.plates: dict[str, tuple[Block, int]] = {}
        self.foldable: dict[str, str] = {}
        self.stepped: set[str] = set()

    def drawing(self) -> Drawing:
        """The drawing of the circuit's root."""
        root = self.circuit.root
        solid = self.depth == 0 and bool(self._live(self._ops(root)))
        units = self._spread([_Unit(list(self._ops(root)), root, (), folded=True)] if solid else self._units(root, 1, ()))
        if solid:
            self.foldable[root.name] = "closed"
        nodes, made = self._nodes(units)
        bands = self._bands(nodes, made)
        glyphs = [op for unit in units if not unit.folded for op in unit.ops]
        self.arrays.factors = factors(self.circuit, nodes, bands, glyphs)
        if self.arrays.factors:
            nodes, made = self._nodes(units)
            bands = self._bands(nodes, made)
        shown = [track.wires for node in nodes for band in node.outs for track in band.tracks]
        signs = labels(self.circuit.wires, shown)
        drawing = Drawing(nodes, bands, self.plates, self.foldable, signs)
        absorb_scales(drawing, self.circuit)
        return drawing

    # what is shown ------------------------------------------------------------------------------------

    def _ops(self, block: Block) -> Iterable[Op]:
        return (self.circuit.op(name) for name in block.op_names())

    def _live(self, ops: Iterable[Op]) -> list[Op]:
        """Ops that are drawn: they depend on the inputs, and do something."""
        return [op for op in ops if not self._is_still(op)]

    def _seen(self, ops: Iterable[Op]) -> list[Op]:
        """Live ops that are not to be hidden: a folded block counts those in as well."""
        return [op for op in self._live(ops) if op.name not in self.hidden]

    def _is_still(self, op: Op) -> bool:
        if is_silent(op):
            return True
        return bool(op.outputs) and all(name in self.static for name in op.outputs)

    def _units(self, block: Block, level: int, plates: tuple[str, ...]) -> list[_Unit]:
        units: list[_Unit] = []
        folded = Repeats(self.circuit, self.static, self.hidden, self.arrays.aliases, self.arrays.canonical).fold(block)
        items, counts = folded.items, folded.counts
        self.stepped |= folded.stepped
        self.arrays.learned()
        large = [i for i in items if isinstance(i, Block) and not self._is_glyph(i) and self._seen(self._ops(i))]
        for item, count in zip(items, counts, strict=True):
            if isinstance(item, str):
                op = self.circuit.op(item)
                if self._seen([op]):
                    units.append(_Unit([op], None, plates, folded=False))
                continue
            while self._is_wrapper(item):
                item = next(i for i in item.items if isinstance(i, Block) and not self._is_empty(i))
            ops, seen = self._live(self._ops(item)), self._seen(self._ops(item))
            if not seen:
                continue
            if item.kind == "loop":
                self.plates[item.name] = (item, count)
                units.extend(self._units(item, level, (*plates, item.name)))
                continue
            if self._is_glyph(item):
                units.append(_Unit(seen, item, plates, folded=False, count=count))
                continue
            free = (item.kind == "function" and self._worth_seeing(item)) or (len(large) == 1 and count == 1 and block.kind != "loop")
            if self._is_open(item, level, free):
                self.foldable[item.name] = "open"
                inner = plates if self._is_wrapper(item) and count == 1 else (*plates, item.name)
                if inner is not plates:
                    self.plates[item.name] = (item, count)
                units.extend(self._units(item, level if free else level + 1, inner))
            else:
                self.foldable[item.name] = "closed"
                units.append(_Unit(ops, item, plates, folded=True, count=count))
        return units

    def _spread(self, units: list[_Unit]) -> list[_Unit]:
        """Fused maps as their parts: a linear map of which only slices are read is one map for each slice.

        That is what the slices mean: rows of the weight that make q, and rows that make k, are two maps.
        """
        home = {op.name: unit for unit in units if not unit.folded and len(unit.ops) == 1 for op in unit.ops}
        dropped: set[int] = set()
        made: list[_Unit] = []
        for unit in units:
            slices = self._slices(unit, home) if unit.ops and unit.ops[0].kind == "linear" else []
            if not slices:
                made.append(unit)
                continue
            dropped.update(id(home[op.name]) for op in slices)
            parts = [(op, name) for op in slices for name in op.outputs if self._read_outside(name, set())]
            made.extend(
                _Unit([unit.ops[0], op], unit.block, unit.plates, folded=False, makes=name, part=(n, len(parts)))
                for n, (op, name) in enumerate(parts)
            )
        return [unit for unit in made if id(unit) not in dropped]

    def _slices(self, unit: _Unit, home: dict[str, _Unit]) -> list[Op]:
        """The ops that take parts of a linear map's new wires, if nothing else reads the map's result."""
        if len(unit.ops) != 1 or unit.folded or unit.count > 1:
            return []
        op = unit.ops[0]
        readers = self._readers(op.outputs[0])
        new = {a.wire for a in op.axes if a.role == "created"}
        for reader in readers:
            constant = reader.kind == "slice" or (reader.kind == "index" and len(self._live_inputs(reader)) == 1)
            taken = [a for a in reader.axes if not a.passes and a.ins]
            if not constant or reader.name not in home or any(a.wire not in new for a in taken):
                return []
        return readers

    def _live_inputs(self, op: Op) -> list[str]:
        return [name for name in op.inputs if name not in self.static]

    def _readers(self, name: str) -> list[Op]:
        """The ops that read an array, through reindexing."""
        if name in self.circuit.outputs:
            return []
        found: dict[str, Op] = {}
        for reader in self.circuit.consumers.get(name, ()):
            op = self.circuit.op(reader)
            if is_silent(op):
                found.update({o.name: o for out in op.outputs for o in self._readers(out)})
            elif op.name not in self.hidden:
                found[op.name] = op
        return list(found.values())

    def _is_open(self, block: Block, level: int, free: bool) -> bool:
        if block.name in self.closed:
            return False
        return block.name in self.opened or level < self.depth or free

    def _worth_seeing(self, block: Block) -> bool:
        """Functions that hold products or a softmax are steps of the architecture; others are details."""
        ops = list(self._ops(block))
        return len(self._seen(ops)) <= 24 and any(op.kind in _QUIET_FUNCTIONS for op in ops)

    def _is_wrapper(self, block: Block) -> bool:
        """A function that hands everything on to one block is no step of its own."""
        if block.kind != "function":
            return False
        inner = [i for i in block.items if not self._is_empty(i)]
        return len(inner) == 1 and isinstance(inner[0], Block)

    def _is_empty(self, item: str | Block) -> bool:
        return not self._seen([self.circuit.op(item)] if isinstance(item, str) else self._ops(item))

    def _is_glyph(self, block: Block) -> bool:
        """Blocks that come to a single glyph: one op, one elementwise function, one normalisation."""
        live = self._seen(self._ops(block))
        if len(live) == 1:
            return True
        if any(op.kind not in ("elementwise", "reduce", "norm", "random") for op in live):
            return False
        made = {name for op in live for name in op.outputs}
        read = {self.arrays.canonical(n) for op in live for n in op.inputs if n not in self.static}
        inner = {self.arrays.canonical(n) for n in made}
        outside = list(self._left(live))
        if len(read - inner) != 1 or len(outside) != 1:
            return False
        source, result = next(iter(read - inner)), outside[0]
        return self._wires_of(source) == self._wires_of(result)

    def _wires_of(self, tensor: str) -> list[str]:
        return sorted(name for dim in self.circuit.tensor(tensor).dims for name in dim)

    def _left(self, ops: Sequence[Op]) -> list[str]:
        """What ops make that others read, or that goes out."""
        inside = {op.name for op in ops}
        left: dict[str, None] = {}
        for op in ops:
            for name in op.outputs:
                if self._read_outside(name, inside):
                    left[name] = None
        return list(left)

    def _read_outside(self, name: str, inside: set[str]) -> bool:
        if name in self.circuit.outputs:
            return True
        for reader in self.circuit.consumers.get(name, ()):
            op = self.circuit.op(reader)
            if is_silent(op):
                if any(self._read_outside(out, inside) for out in op.outputs):
                    return True
            elif reader not in inside and reader not in self.hidden:
                return True
        return False

    # nodes --------------------------------------------------------------------------------------------

    def _nodes(self, units: list[_Unit]) -> tuple[list[Node], dict[str, Node]]:
        nodes: list[Node] = []
        made: dict[str, Node] = {}
        self.units: dict[int, _Unit] = {}
        several = len(self.circuit.inputs) > 1
        for name in self.circuit.inputs:
            node = Node("input", label=name, upper=name if several else "")
            nodes.append(node)
            made[self.arrays.canonical(name)] = node
        for unit in units:
            node = self._node(unit)
            self.units[id(node)] = unit
            nodes.append(node)
            for name in unit.outputs:
                made[name] = node
        several = len(self.circuit.outputs) > 1
        for name in self.circuit.outputs:
            if self.arrays.canonical(name) in made:
                nodes.append(Node("output", label=name, upper=self.circuit.returned(name) if several else ""))
        return nodes, made

    def _node(self, unit: _Unit) -> Node:
        if unit.folded and unit.block is not None:
            return Node(
                "block", label=_title(unit.block), block=unit.block.name, plates=unit.plates, count=unit.count
            )
        sign = sign_of(self.circuit, unit.ops[:1] if unit.makes else unit.ops, unit.block, self.static)
        if unit.makes:
            sign = part_of(sign, *unit.part)
        if sign.kind == "index" and unit.ops[0].name in self.stepped:
            sign = replace(sign, label="λ")  # another entry in each repeat
        return Node(
            sign.kind,
            sign.label,
            sign.upper,
            sign.lower,
            op=unit.ops[0].name if len(unit.ops) == 1 or unit.makes else "",
            block=unit.block.name if unit.block is not None else "",
            plates=unit.plates,
            count=unit.count,
        )

    # bands --------------------------------------------------------------------------------------------

    def _bands(self, nodes: list[Node], made: dict[str, Node]) -> list[Band]:
        """Join the nodes. An array that several nodes read is copied: a node of its own."""
        readers: dict[str, list[Node]] = {}
        order = {id(node): number for number, node in enumerate(nodes)}
        outputs = iter([n for n in self.circuit.outputs if self.arrays.canonical(n) in made])
        reads: dict[int, list[str]] = {}
        for node in nodes:
            if node.kind == "input":
                continue
            if node.kind == "output":
                names = [self.arrays.canonical(next(outputs))]
            else:
                names = self._reads(self.units[id(node)], made, node)
            reads[id(node)] = names
            for name in names:
                readers.setdefault(name, []).append(node)
        self.arrays.bundles = bundles(self.circuit, readers)
        bands: list[Band] = []
        band_of: dict[tuple[str, int], Band] = {}
        depth = self._depths(nodes, reads, made)
        for name, found in readers.items():
            source, tracks = made[name], self.arrays.tracks(name)
            groups = _groups(sorted(found, key=lambda node: depth[id(node)]), depth)
            for number, group in enumerate(groups):
                rest = list(itertools.chain(*groups[number:]))
                if len(rest) > 1:  # a copy; of those who read it much later, another one later
                    plates = rest[0].plates
                    for reader in rest[1:]:
                        plates = _common(plates, reader.plates)
                    copy = Node("copy", plates=plates)
                    nodes.insert(nodes.index(source) + 1, copy)
                    trunk = self._branch(Band(name, tracks, source, copy))
                    copy.ins.append(trunk)
                    bands.append(trunk)
                    source = copy
                last = max(rest, key=lambda reader: order[id(reader)])
                for reader in group:
                    band = band_of[name, id(reader)] = self._branch(Band(name, tracks, source, reader))
                    band.main = reader is last
                    bands.append(band)
        for node in list(nodes):
            if id(node) in reads:
                node.ins = [band_of[name, id(node)] for name in reads[id(node)]]
        for node in nodes:
            if node.kind not in ("input", "output", "copy"):
                self._join(node)
        return bands

    def _branch(self, band: Band) -> Band:
        """Add a band to what leaves its source; where that is a copy, all tracks pass."""
        band.source.outs.append(band)
        if band.source.kind == "copy":
            trunk = band.source.ins[0]
            band.source.passes.extend((trunk, n, band, n) for n in range(len(band.tracks)))
        return band

    def _depths(self, nodes: list[Node], reads: dict[int, list[str]], made: dict[str, Node]) -> dict[int, int]:
        """How many nodes there are before each, on the longest way; outputs come last."""
        depth: dict[int, int] = {}
        for node in nodes:
            depth[id(node)] = 1 + max((depth[id(made[name])] for name in reads.get(id(node), ())), default=-1)
        last = max(depth.values(), default=0)
        return {id(node): last + 9 if node.kind == "output" else depth[id(node)] for node in nodes}

    def _reads(self, unit: _Unit, made: dict[str, Node], node: Node) -> list[str]:
        """The arrays that a unit takes from elsewhere, in order."""
        found: dict[str, None] = {}
        inner = {name for op in unit.ops for name in op.outputs}
        for op in unit.ops:
            for name in op.inputs:
                base = self.arrays.canonical(name)
                if base not in self.static and base in made and made[base] is not node and base not in inner:
                    found[base] = None
        return list(found)

    def _join(self, node: Node) -> None:
        """Which tracks pass the node, from the axes of its ops."""
        unit = self.units[id(node)]
        classes = _Classes()
        touched: set[Occurrence] = set()
        floats = node.kind in ("elementwise", "mask", "merge") and not unit.folded
        for op in unit.ops:
            for axis in op.axes:
                ins = [o for s, d, f in axis.ins if op.inputs[s] not in self.static
                       and (o := self.arrays.occurrence(op.inputs[s], d, f)) is not None]
                outs = [(op.outputs[s], d, f) for s, d, f in axis.outs]
                if axis.passes and ins and (floats or not self._learned(op, axis)):
                    for one in (*ins, *outs):
                        classes.unite(ins[0], one)
                else:
                    touched.update(ins)
                    touched.update(outs)
        touched = {classes.find(o) for o in touched}
        outs = {place: (band, number) for band in node.outs for number, track in enumerate(band.tracks)
                for place in track.places}
        by_class: dict[Occurrence, list[tuple[Band, int]]] = {}
        for place, where in outs.items():
            by_class.setdefault(classes.find(place), []).append(where)
        for band in node.ins:
            for number, track in enumerate(band.tracks):
                roots = [classes.find(place) for place in track.places]
                if any(r in touched for r in roots):
                    continue
                for to, out in by_class.get(roots[0], []):
                    if len(to.tracks[out].places) == len(track.places) and (band, number, to, out) not in node.passes:
                        node.passes.append((band, number, to, out))
        if node.kind == "contract":
            self._pair(node, unit.ops[0])

    def _learned(self, op: Op, axis: Axis) -> bool:
        """Whether a parameter or constant has entries of its own for each index of the axis."""
        return any(op.inputs[slot] in self.static for slot, _, _ in axis.ins)

    def _pair(self, node: Node, op: Op) -> None:
        where = {place: (band, number) for band in node.ins for number, track in enumerate(band.tracks)
                 for place in track.places}
        for axis in op.axes:
            if axis.role == "contracted":
                ends = [where[o] for s, d, f in axis.ins
                        if (o := self.arrays.occurrence(op.inputs[s], d, f)) is not None and o in where]
                if len(ends) == 2 and (ends[0], ends[1]) not in node.pairs:
                    node.pairs.append((ends[0], ends[1]))


class _Classes:
    """Union-find over occurrences."""

    def __init__(self) -> None:
        self.parent: dict[Occurrence, Occurrence] = {}

    def find(self, item: Occurrence) -> Occurrence:
        while item in self.parent:
            item = self.parent[item]
        return item

    def unite(self, one: Occurrence, other: Occurrence) -> None:
        a, b = self.find(one), self.find(other)
        if a != b:
            self.parent[b] = a


def _static(circuit: Circuit) -> frozenset[str]:
    """Names of the arrays that depend on no input."""
    static = {tensor.name for tensor in circuit.tensors if tensor.kind in ("parameter", "buffer", "constant")}
    for op in circuit.ops:
        fresh = op.kind == "create"  # zeros_like(x) has the axes of x, and none of its values
        if fresh or (op.kind not in ("opaque", "random") and all(name in static for name in op.inputs)):
            static.update(op.outputs)
    return frozenset(static)


def _groups(readers: list[Node], depth: dict[int, int]) -> list[list[Node]]:
    """Readers of one array that share a copy: those that come soon after each other. The last is never alone but of two."""
    groups: list[list[Node]] = []
    for reader in readers:
        if groups and depth[id(reader)] <= depth[id(groups[-1][0])] + _SOON:
            groups[-1].append(reader)
        else:
            groups.append([reader])
    if len(groups) > 1 and len(groups[-1]) == 1:
        last = groups.pop()
        groups[-1] += last
    return groups


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return one[:count]


def _title(block: Block) -> str:
    """A module's own name in its parent, and its class; a function's name."""
    if block.kind == "function" or not block.name:
        return block.title
    last = block.name.split("/")[-1].split("#")[0].rpartition(".")[2]
    return block.title if last.isdigit() else last
