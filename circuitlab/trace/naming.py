"""Names and labels of wires, from what happens to them: nothing here changes what is claimed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from circuitlab.errors import InputError
from circuitlab.trace.events import Event, Recording, Value
from circuitlab.trace.rules.pattern import Pattern
from circuitlab.trace.wires import Atom, leaves

BAR = "\u0304"
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass
class Named:
    """What a wire is called."""

    name: str = ""
    label: str = ""
    kind: str = ""
    group: str = ""
    origin: str = ""


@dataclass
class _Facts:
    """What happens to an atom in a run."""

    roles: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])  # (op kind, role)
    alone: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])  # the same where it is a whole dimension
    created: list[Event] = field(default_factory=list[Event])
    contracted: list[Event] = field(default_factory=list[Event])
    learned: list[Event] = field(default_factory=list[Event])  # those of contracted that have weights
    inputs: list[tuple[Value, int]] = field(default_factory=list[tuple[Value, int]])
    param: tuple[str, int] | None = None
    first: Event | None = None
    twice: bool = False
    window: bool = False
    table: bool = False  # rows of an embedding that the input does not choose (positions)
    repeated: bool = False
    pixel: bool = False  # a position of an image under a convolution
    over: int = 0  # products of data that it is broadcast over
    among: int = 0  # how many axes a linear map makes together, it among them (heads and what is in each)
    outer: bool = False  # it stands outside of others there


# names that the user gives -------------------------------------------------------------------------------


def given_names(recording: Recording, model: Any, names: Mapping[str, str] | None) -> dict[int, str]:
    """id of an input's atom -> the name that ``names=`` or a jaxtyping annotation gives it."""
    given: dict[int, str] = {}
    inputs = {value.name: value for value in recording.inputs}
    for key, text in _annotated(model).items():
        if key in inputs and len(text.split()) == len(inputs[key].shape):
            _give(given, inputs[key], text.split())
    for key, text in (names or {}).items():
        if key not in inputs:
            raise InputError(f"names has {key!r}, and the inputs are {', '.join(map(repr, inputs))}")
        words = text.split() if isinstance(text, str) else list(text)
        shape = inputs[key].shape
        if len(words) != len(shape):
            raise InputError(
                f"names={{{key!r}: {text!r}}} names {len(words)} axes, and {key!r} has {len(shape)}: {list(shape)}; "
                "use _ for an axis without a name"
            )
        _give(given, inputs[key], words)
    return given


def _give(given: dict[int, str], value: Value, words: list[str]) -> None:
    for word, dim in zip(words, value.dims, strict=True):
        if word != "_" and word.replace("_", "a").isalnum() and not word.isdigit():
            for atom in dim:
                given[id(atom)] = word


def _annotated(model: Any) -> dict[str, str]:
    """Axis names in jaxtyping annotations (``Float[Tensor, "batch seq"]``) of the forward."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError, AttributeError):
        return {}
    found = {key: getattr(parameter.annotation, "dim_str", None) for key, parameter in parameters.items()}
    return {key: text for key, text in found.items() if isinstance(text, str)}


# names that we find --------------------------------------------------------------------------------------


def name_wires(
    recording: Recording, atoms: list[Atom], made: list[tuple[Event, Pattern, Any]], given: dict[int, str]
) -> dict[int, Named]:
    """id of an atom -> its name, label, kind, group and origin."""
    facts = {id(atom): _Facts() for atom in atoms}
    _gather(recording, facts, made)
    user = {id(leaf): name for key, name in given.items() for leaf in _leaf_of(recording, key)}
    named = {id(atom): Named() for atom in atoms}
    taken: set[str] = set()
    outputs = {id(leaf) for value in recording.outputs for dim in value.dims for leaf in leaves(dim)}
    for atom in atoms:
        known, fact = named[id(atom)], facts[id(atom)]
        known.kind = _kind(atom, fact, id(atom) in outputs)
        known.origin = _origin(fact)
    for value in recording.inputs:
        _group(value.dims, named)
    for event, pattern, _ in made:
        if pattern.kind in ("conv", "pool", "resize", "reindex", "cat"):
            for out in event.outs:
                _group(out.dims, named)
    for atom in atoms:
        known, fact = named[id(atom)], facts[id(atom)]
        word = user.get(id(atom), "")
        known.label = word if 0 < len(word) <= 2 else _label(known.kind)
        if word:
            known.name = _unique(word, taken)
    for atom in atoms:
        known, fact = named[id(atom)], facts[id(atom)]
        if not known.name:
            known.name = _unique(_path(fact, known), taken)
    _number(atoms, made, named, {id(a) for a in atoms if 0 < len(user.get(id(a), "")) <= 2})
    return named


def _leaf_of(recording: Recording, key: int) -> list[Atom]:
    for value in recording.inputs:
        for dim in value.dims:
            if any(id(atom) == key for atom in dim):
                return list(leaves(dim))
    return []


def _gather(recording: Recording, facts: dict[int, _Facts], made: list[tuple[Event, Pattern, Any]]) -> None:
    for value in recording.inputs:
        for dim, atoms in enumerate(value.dims):
            for leaf in leaves(atoms):
                if id(leaf) in facts:
                    facts[id(leaf)].inputs.append((value, dim))
    mapped = {id(event) for event, pattern, _ in made if event.fn == "linear" or pattern.kind in _OF_DATA}
    for event, pattern, axes in made:
        operands = event.operands
        seen: set[int] = set()
        weights = _weights(event, pattern, mapped)
        kind = pattern.kind if weights is None else "linear" if weights else "contract"
        for axis in axes.found:
            atom, ins, outs = axis.atom, axis.ins, axis.outs
            role = axis.role if weights is None else _role_of(axis, weights)
            fact = facts[id(atom)]
            if pattern.kind == "scan" and role == "ordered" and ins and not any(slot == 0 for slot, _, _ in ins):
                continue  # the states' own axes: only what is scanned is gone through in order
            fact.roles.add((kind, role))
            if not any(len(leaves(operands[slot].value.dims[dim])) > 1 for slot, dim, _ in ins):
                fact.alone.add((kind, role))
            fact.first = fact.first or event
            if id(atom) in seen and kind != "reindex":
                fact.twice = True
            seen.add(id(atom))
            if role == "created" and kind in ("linear", "conv", "embedding"):
                fact.created.append(event)
                if kind == "linear" and outs:
                    _place(fact, event.outs[outs[0][0]].dims[outs[0][1]], outs[0][2])
            if role == "contracted":
                fact.contracted.append(event)
                if kind in ("linear", "conv"):
                    fact.learned.append(event)
            if kind == "contract" and role == "broadcast":
                fact.over += 1
            if pattern.kind == "reindex" and role == "created":
                fact.repeated = True
            if pattern.kind == "conv" and any(dim > 1 and len(event.outs[slot].shape) > 3 for slot, dim, _ in outs):
                fact.pixel = True
            if pattern.kind == "embedding" and role == "gathered":
                fact.table = all(o.value.static for o in operands)
            if role == "windowed" and ins and not outs and all(operands[s].value.static for s, _, _ in ins):
                fact.window = True
            for slot, dim, _ in ins:
                if fact.param is None and operands[slot].value.kind == "parameter":
                    fact.param = (operands[slot].value.name, dim)
    for _, pattern, axes in made:
        if pattern.kind in ("slice", "cat"):
            _inherit(facts, [axis.atom for axis in axes.found if axis.role == "joined"])


_OF_DATA = frozenset({"conv", "softmax", "embedding", "scan"})


def _weights(event: Event, pattern: Pattern, mapped: set[int]) -> set[int] | None:
    """Of a product, the operands that are weights; None where it is no product, or its kind tells.

    What was mapped from parameters alone (queries from learned latents) is data for the next product.
    """
    if pattern.kind not in ("linear", "contract"):
        return None
    learned = {operand.slot for operand in event.operands if operand.value.static and operand.value.learned}
    if event.fn == "linear":
        return learned - {0}
    if all(operand.value.static for operand in event.operands):
        return None
    return {slot for slot in learned if not _depends(event.operands[slot].value, mapped)}


def _depends(value: Value, events: set[int]) -> bool:
    """Whether a value comes out of one of these events, or of what they gave."""
    pending, seen = [value], set[int]()
    while pending:
        event = pending.pop().event
        if event is not None and id(event) not in seen:
            if id(event) in events:
                return True
            seen.add(id(event))
            pending += [operand.value for operand in event.operands]
    return False


def _role_of(axis: Any, weights: set[int]) -> str:
    """The role of an axis in a product, with these weights."""
    if axis.role not in ("created", "broadcast") or not axis.outs:
        return axis.role
    return "created" if axis.ins and {slot for slot, _, _ in axis.ins} & weights else "broadcast"


def _place(fact: _Facts, dim: Iterable[Atom], factor: int) -> None:
    """Where a linear map makes an axis, among others."""
    count = len(leaves(dim))
    fact.among = max(fact.among, count)
    fact.outer |= factor < count - 1


def _inherit(facts: dict[int, _Facts], joined: list[Atom]) -> None:
    """The parts of a sum are made by what makes the sum (a fused q, k, v map)."""
    for atom in joined:
        for _, _, parts in atom.parts:
            for leaf in leaves(parts):
                mine, whole = facts.get(id(leaf)), facts[id(atom)]
                if mine is not None:
                    mine.created = mine.created or whole.created
                    mine.param = mine.param or whole.param
                    if mine.created:
                        _place(mine, parts, [id(a) for a in leaves(parts)].index(id(leaf)))
                    mine.roles |= {pair for pair in whole.roles if pair[1] == "created"}


def _kind(atom: Atom, fact: _Facts, is_output: bool) -> str:
    has = fact.roles.__contains__
    roles = {role for _, role in fact.roles}
    kinds = {kind for kind, _ in fact.roles}
    learned = fact.learned
    linear = has(("linear", "created")) or has(("linear", "contracted"))
    if fact.window and not fact.inputs:
        return "window"
    if fact.pixel or "windowed" in roles and kinds & {"conv", "pool", "resize"}:
        return "spatial"
    if _is_batch(fact, linear):
        return "batch"
    if fact.table:
        return ""
    if has(("embedding", "gathered")) and fact.param is not None and fact.param[1] == 0:
        return "vocab"
    if has(("linear", "gathered")):
        return "expert"
    if has(("scan", "joined")) and fact.param is not None and not atom.parts:
        return "hidden"
    if fact.twice and not fact.created and not learned:
        return "position"
    if has(("softmax", "normalised")) and has(("contract", "contracted")) and not fact.created:
        return "position"
    if (has(("conv", "created")) or has(("conv", "contracted"))) and not (linear and has(("norm", "normalised"))):
        return "channel"
    if fact.created or learned:
        return _learned_kind(fact, learned, is_output)
    if has(("contract", "contracted")) and fact.inputs and not fact.twice:
        last = any(dim == len(value.shape) - 1 for value, dim in fact.inputs)
        if last or ("contract", "contracted") not in fact.alone:
            return "head_size"
    if any(0 < dim == len(value.shape) - 1 and value.dtype.startswith(("float", "bfloat")) for value, dim in fact.inputs):
        return "width"
    if any(value.dtype.startswith("int") or dim > 0 for value, dim in fact.inputs):
        return "position"
    if roles & {"ordered", "indexed"} and kinds & {"create", "scan", "embedding"}:
        return "position"
    if has(("linear", "broadcast")) and fact.param is not None:  # learned queries, each mapped alike
        return "position"
    return "position" if has(("contract", "contracted")) and fact.param is None else ""


def _is_batch(fact: _Facts, linear: bool) -> bool:
    """The first dimension of an input of several, where nothing is computed along it on its own.

    Batch and positions merged into one dimension of tokens, which experts pick from, are still batch and positions.
    """
    return (
        any(dim == 0 and len(value.shape) > 1 for value, dim in fact.inputs)
        and not linear
        and not {("gather", "gathered"), ("scatter", "ordered"), ("scatter", "gathered"), ("contract", "contracted"),
                 ("softmax", "normalised"), ("scan", "ordered"), ("embedding", "gathered")} & fact.alone
    )


def _learned_kind(fact: _Facts, learned: list[Event], is_output: bool) -> str:
    """Kinds of the axes that linear maps make and read."""
    has = fact.roles.__contains__
    paired = has(("contract", "diagonal")) and fact.param is not None
    if paired and has(("embedding", "created")):  # a bias for each head, looked up by distance
        return "head"
    if has(("norm", "normalised")) and len(fact.created) + len(learned) > 2 or has(("embedding", "created")):
        return "width"
    if has(("contract", "contracted")):
        return "head_size"
    if fact.created and learned and has(("conv", "diagonal")):  # within a block, mixed along positions for each index
        return "hidden"
    if (fact.repeated or fact.over > 1) and fact.outer and learned:
        return "group" if fact.among > 2 else "head"
    if paired and fact.among > 1:
        return "head"
    if len(fact.created) > 2 or len(fact.contracted) > 2:
        return "width"
    if has(("contract", "broadcast")) and learned and (fact.among > 1 or not has(("elementwise", "diagonal"))):
        return "head_size"
    if fact.created and not learned and is_output:
        return "class"
    if fact.created and learned and not fact.inputs:
        return "hidden"
    return "width"


def _group(dims: list[list[Atom]], named: dict[int, Named]) -> None:
    """Neighbouring spatial wires of one tensor are drawn as one."""
    run: list[Atom] = []
    for dim in [*dims, []]:
        flat = list(leaves(dim))
        if len(flat) == 1 and named[id(flat[0])].kind == "spatial":
            run.append(flat[0])
            continue
        if len(run) > 1 and not any(named[id(atom)].group for atom in run):
            group = f"positions_{run[0].index}"
            for atom in run:
                named[id(atom)].group = group
        run = []


_LABELS = {
    "batch": "b",
    "position": "x" + BAR,
    "spatial": "x" + BAR,
    "width": "d",
    "hidden": "f",
    "head": "h",
    "head_size": "k",
    "channel": "c",
    "vocab": "v",
    "class": "n",
    "window": "w",
    "group": "g",
    "expert": "e",
}


def _label(kind: str) -> str:
    return _LABELS.get(kind, "n")


_WORDS = {"batch": "batch", "position": "seq", "spatial": "pos"}


def _path(fact: _Facts, known: Named) -> str:
    """A name by origin: the module that the wire begins in, and its letter."""
    letter = known.label.replace(BAR, "")
    if fact.inputs and known.kind in _WORDS:
        return _WORDS[known.kind]
    if fact.inputs:
        value, dim = fact.inputs[0]
        return f"{value.name}.{dim}"
    if fact.created and known.kind != "vocab":
        where = _module(fact.created[0])
    elif fact.param is not None:
        where = fact.param[0].rpartition(".")[0]
    elif fact.first is not None:
        where = f"{fact.first.block.name}." if fact.first.block.name else ""
    else:
        where = ""
    where = where.rpartition(".")[0]
    if known.kind in _WORDS:
        letter = _WORDS[known.kind]
    return f"{where}.{letter}" if where else letter


def _module(event: Event) -> str:
    """Path of the module whose parameter an event uses."""
    for operand in event.operands:
        if operand.value.kind == "parameter":
            return operand.value.name.rpartition(".")[0]
    return event.block.name


def _origin(fact: _Facts) -> str:
    if fact.inputs:
        value, dim = fact.inputs[0]
        return f"dimension {dim} of the input {value.name!r}"
    if fact.param is not None:
        return f"dimension {fact.param[1]} of {fact.param[0]!r}"
    if fact.first is not None:
        return f"{fact.first.fn} in {fact.first.name!r}" + (f" ({fact.first.source})" if fact.first.source else "")
    return ""


def _unique(name: str, taken: set[str]) -> str:
    made, count = name, 1
    while made in taken:
        count += 1
        made = f"{name}_{count}"
    taken.add(made)
    return made


def _number(
    atoms: list[Atom], made: list[tuple[Event, Pattern, Any]], named: dict[int, Named], fixed: set[int]
) -> None:
    """Different wires with one label in one op get subscripts (c₁, c₂) or, for positions, other letters (x̄, ȳ)."""
    rivals: dict[int, set[int]] = {}
    for _, pattern, axes in made:
        if pattern.kind == "reindex":
            continue
        present = {id(axis.atom) for axis in axes.found}
        by_label: dict[str, list[int]] = {}
        for key in present:
            by_label.setdefault(named[key].label, []).append(key)
        for keys in by_label.values():
            if len(keys) > 1:
                for key in keys:
                    rivals.setdefault(key, set()).update(k for k in keys if k != key)
    channels = [atom for atom in atoms if named[id(atom)].kind == "channel"]
    if any(id(atom) in rivals for atom in channels):
        for number, atom in enumerate(channels):
            named[id(atom)].label = f"c{str(number).translate(_SUBSCRIPTS)}"
    chosen: dict[int, int] = {}
    for atom in atoms:
        known = named[id(atom)]
        if id(atom) not in rivals or id(atom) in fixed or known.kind == "channel":
            continue
        partners = {chosen.get(k) for k in rivals[id(atom)] if not _siblings(known, named[k])}
        number = next(n for n in range(1, len(partners) + 2) if n not in partners)
        chosen[id(atom)] = number
        if number > 1:
            positional = BAR in known.label
            letters = "xyzsuw"
            if known.kind == "spatial":  # the same picture at another resolution
                known.label += str(number - 1).translate(_SUBSCRIPTS)
            elif positional and number <= len(letters):
                known.label = letters[number - 1] + BAR
            else:
                known.label += str(number).translate(_SUBSCRIPTS)


def _siblings(one: Named, other: Named) -> bool:
    """Height and width share a label: they are drawn as one."""
    return bool(one.group) and one.group == other.group
