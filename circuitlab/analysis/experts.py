"""A dense feed-forward block as a mixture of experts that computes only the chosen ones, and back again.

The neurons of a partition's modules become experts. A position's experts are those whose mean key has the largest product with
its input ("avg-k"), they weigh 1, and the output bias is added once: with all experts chosen the block is the dense
one (Qiu et al., *Unlocking Emergent Modularity in Large Language Models*, 2024; Zhang et al., *MoEfication*, 2022).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.maps import Weight
from circuitlab.errors import InputError

GATES = ("gate", "similarity")


class Router(nn.Module):
    """Chooses the experts of each position.

    Attributes:
        weight: (experts, inputs), mean of each expert's keys ("gate"), or of its keys at length 1 ("similarity").
        bias: (experts,), mean of its biases ("gate" alone).
        top_k: number of experts that are chosen.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, keys: torch.Tensor, bias: torch.Tensor | None, members: torch.Tensor, top_k: int, selection: str) -> None:
        super().__init__()
        self.top_k = top_k
        self.selection = selection
        weight, offset = gate(keys, bias, members, selection)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", offset)
        self.names: tuple[str, ...] = ("",)
        self.chosen: Chosen | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(positions, inputs) -> int64 (positions, top_k), ascending."""
        if self.top_k == len(self.weight):
            return torch.arange(self.top_k, device=x.device).expand(len(x), self.top_k)
        scores = nn.functional.linear(x, self.weight, self.bias)
        return scores.topk(self.top_k, sorted=False).indices.sort(-1).values

    def checked(self, chosen: Chosen | None, rows: torch.Tensor, where: str) -> Chosen:
        """What was chosen; an `InputError` if that was not for the rows that reach a map, which is told by its name."""
        if chosen is None or len(chosen.experts) != len(rows):
            raise InputError(f"experts are chosen where {self.names[0]} runs, for as many positions as reach "
                             f"{where}: here {0 if chosen is None else len(chosen.experts)} and {len(rows)}")
        return chosen

    def extra_repr(self) -> str:
        return f"experts={len(self.weight)}, top_k={self.top_k}, selection={self.selection!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "chosen": None}


def gate(keys: torch.Tensor, bias: torch.Tensor | None, members: torch.Tensor, selection: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (experts, inputs) and bias (experts,) whose products with an input choose experts.

    Args:
        keys: (neurons, inputs). bias: (neurons,). members: int64 (experts, slots), neurons of each, -1 where there is none.
        selection: "gate" or "similarity".
    """
    rows = keys if selection == "gate" else nn.functional.normalize(keys.float(), dim=1).to(keys.dtype)
    held = (members >= 0).to(keys.dtype)
    share = held / held.sum(1, keepdim=True)
    weight = torch.einsum("es,esd->ed", share, rows[members.clamp(min=0)])
    return weight, None if bias is None or selection != "gate" else (share * bias[members.clamp(min=0)]).sum(1)


def _positions(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """x as (positions, values), and the sizes of the positions' dimensions."""
    moved = x.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1]), tuple(moved.shape[:-1])


class _ExpertMap(nn.Module):
    """A linear map whose neurons are sorted by expert. What is shared by the maps into and out of the hidden wire."""

    index: torch.Tensor

    def __init__(self, dense: nn.Module, weight: Weight, parts: tuple[Weight, ...], members: torch.Tensor, router: Router) -> None:
        super().__init__()
        self.axis = weight.axis
        self.shell = (_emptied(dense),)  # not a submodule: it holds no parameters
        self.names = (weight.parameter.rpartition(".")[2], weight.bias.rpartition(".")[2])
        self.rows = tuple((part.rows, part.dim) for part in parts)
        self.shared = (router,)  # a submodule of the map that routes alone, so that nothing is saved twice
        self.register_buffer("index", members)
        self.experts, self.slots = members.shape
        self.whole = bool((members >= 0).all())

    def _sorted(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """(parts, experts, slots, rest) of a parameter; slots that hold no neuron are zero."""
        parts = [tensor.movedim(dim, 0)[slice(*rows)] for rows, _ in self.rows]
        held = (self.index >= 0)[:, :, None]
        return torch.stack([part.reshape(len(part), -1)[self.index.clamp(min=0)] * held for part in parts])

    def _unsorted(self, tensor: torch.Tensor, like: torch.Tensor, dim: int) -> torch.Tensor:
        """The parameter that `_sorted` was made of."""
        made = like.detach().clone().movedim(dim, 0)
        held = self.index >= 0
        for (rows, _), part in zip(self.rows, tensor, strict=True):
            part_rows = made[slice(*rows)]
            part_rows[self.index[held]] = part[held].view(-1, *part_rows.shape[1:])
        return made.movedim(0, dim).contiguous()

    def extra_repr(self) -> str:
        return f"experts={self.experts}, neurons each={self.slots}"


class KeyMap(_ExpertMap):
    """The map into the hidden wire, of the chosen neurons. What its output goes through need not know."""

    columns: torch.Tensor

    def __init__(self, dense: nn.Module, parts: tuple[Weight, ...], members: torch.Tensor, router: Router, *, routes: bool) -> None:
        super().__init__(dense, parts[0], parts, members, router)
        self.routes = routes
        if routes:
            self.router = router
        weight = cast("torch.Tensor", getattr(dense, self.names[0]))
        bias = getattr(dense, self.names[1]) if self.names[1] else None
        self.shapes = (tuple(weight.shape), parts[0].dim)
        width = weight.shape[parts[0].dim]
        held = [torch.arange(width, device=members.device)[slice(*part.rows)][members.clamp(min=0)] for part in parts]
        self.register_buffer("columns", torch.stack([torch.where(members >= 0, at, width) for at in held]))
        self.weight = nn.Parameter(self._sorted(weight.detach(), parts[0].dim), requires_grad=weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(self._sorted(bias.detach(), 0).squeeze(-1), requires_grad=bias.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The dense map's output for the chosen neurons, in their places; the others are zero."""
        flat, sizes = _positions(x, self.axis)
        router = self.shared[0]
        if self.routes:
            router.chosen = Chosen(router(flat), self.experts)
        chosen = router.checked(router.chosen, flat, router.names[1])
        made = [chosen_linear(flat, weight, None if self.bias is None else self.bias[part], chosen)
                for part, weight in enumerate(self.weight)]
        width = self.shapes[0][self.shapes[1]]
        out = made[0].new_zeros(len(flat), width if self.whole else width + 1)  # empty slots go beyond the end
        for columns, values in zip(self.columns, made, strict=True):
            out = out.scatter_(1, columns[chosen.experts].flatten(1), values)
        return out[:, :width].view(*sizes, width).movedim(-1, self.axis)

    def dense(self) -> nn.Module:
        """The map with all neurons in their old places."""
        shape, dim = self.shapes
        made = copy.copy(self.shell[0])
        made._parameters = dict(made._parameters)
        made._parameters[self.names[0]] = nn.Parameter(
            self._unsorted(self.weight.detach(), self.weight.new_zeros(shape), dim), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            made._parameters[self.names[1]] = nn.Parameter(
                self._unsorted(self.bias.detach()[..., None], self.bias.new_zeros(shape[dim]), 0), requires_grad=self.bias.requires_grad)
        return made


class ValueMap(_ExpertMap):
    """The map out of the hidden wire, of the chosen neurons."""

    def __init__(self, dense: nn.Module, weight: Weight, members: torch.Tensor, router: Router) -> None:
        super().__init__(dense, weight, (weight,), members, router)
        matrix, bias = cast("torch.Tensor", getattr(dense, self.names[0])), getattr(dense, self.names[1]) if self.names[1] else None
        self.shapes = (tuple(matrix.shape), weight.dim)
        self.weight = nn.Parameter(self._sorted(matrix.detach(), weight.dim)[0], requires_grad=matrix.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """The dense map's output."""
        flat, sizes = _positions(h, self.axis)
        router = self.shared[0]
        chosen, router.chosen = router.chosen, None
        chosen = router.checked(chosen, flat, router.names[-1])
        if chosen.k == self.experts and self.whole:
            held = flat[:, self.index.flatten()]
        else:
            held = flat.gather(1, self.index.clamp(min=0)[chosen.experts].flatten(1))
        out = chosen_sum(held.view(len(flat), chosen.k, self.slots), self.weight, chosen)
        out = out if self.bias is None else out + self.bias
        return out.view(*sizes, -1).movedim(-1, self.axis)

    def dense(self) -> nn.Module:
        """The map with all neurons in their old places."""
        shape, dim = self.shapes
        made = copy.copy(self.shell[0])
        made._parameters = dict(made._parameters)
        made._parameters[self.names[0]] = nn.Parameter(
            self._unsorted(self.weight.detach()[None], self.weight.new_zeros(shape), dim), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            made._parameters[self.names[1]] = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return made


# products with chosen experts -------------------------------------------------------------------------


@dataclass
class Chosen:
    """The experts of each position, and the order in which they stand together.

    Attributes:
        experts: int64 (positions, k). of: how many there are.
        rows: int64 (positions * k,), where each stands among the chosen of all positions, when those are sorted by expert.
        ends: int32 (experts,), where each expert's rows end.
    """

    experts: torch.Tensor
    of: int

    @property
    def k(self) -> int:
        return self.experts.shape[1]

    @functools.cached_property
    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        experts, rows = self.experts.flatten().sort(stable=True)
        every = torch.arange(self.of, device=experts.device)
        return rows, torch.searchsorted(experts, every, right=True, out_int32=True)

    @property
    def rows(self) -> torch.Tensor:
        return self._sorted[0]

    @property
    def ends(self) -> torch.Tensor:
        return self._sorted[1]

    @functools.cached_property
    def back(self) -> torch.Tensor:
        """int64 (positions * k,), where each is found among the sorted."""
        return torch.empty_like(self.rows).scatter_(0, self.rows, torch.arange(len(self.rows), device=self.rows.device))


def chosen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chosen: Chosen) -> torch.Tensor:
    """``x @ weight[e].T + bias[e]`` for each of the experts chosen for each position.

    Args:
        x: (positions, inputs). weight: (experts, slots, inputs). bias: (experts, slots).

    Returns:
        (positions, k * slots).
    """
    if chosen.k == chosen.of:
        return nn.functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    if len(x) == 1 and not _at_once(x, weight):  # nothing to sort
        numbers = chosen.experts[0].tolist()
        return torch.cat([nn.functional.linear(x, weight[e], None if bias is None else bias[e]) for e in numbers], 1)
    made = _grouped(x[chosen.rows // chosen.k], weight.transpose(1, 2), chosen.ends)[chosen.back]
    if bias is not None:
        made = made + bias[chosen.experts.flatten()]
    return made.view(len(x), -1)


def chosen_sum(h: torch.Tensor, weight: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """``Σ_k h[:, k] @ weight[chosen[:, k]]``.

    Args:
        h: (positions, k, slots). weight: (experts, slots, outputs).

    Returns:
        (positions, outputs).
    """
    n, k, slots = h.shape
    if k == chosen.of:
        return h.flatten(1) @ weight.flatten(0, 1)
    if n == 1 and not _at_once(h, weight):
        return torch.stack([h[:, slot] @ weight[e] for slot, e in enumerate(chosen.experts[0].tolist())]).sum(0)
    made = _grouped(h.reshape(n * k, slots)[chosen.rows], weight, chosen.ends)
    return made[chosen.back].view(n, k, -1).sum(1)


def _at_once(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the products of all experts are one kernel, which waits for nothing."""
    return rows.is_cuda and rows.dtype == torch.bfloat16 and _GROUPED is not None and not any(size % 8 for size in weight.shape[1:])


def _grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert, each times its expert's matrix (experts, inputs, outputs)."""
    if _at_once(rows, weight):
        return _GROUPED(rows, weight, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ weight[e] for e, part in enumerate(rows.split(sizes)) if len(part)])


_GROUPED: Any = getattr(nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


# the whole model --------------------------------------------------------------------------------------


def to_moe(model: nn.Module, partitions: Mapping[str, Any], top_k: float | Mapping[str, float], *, selection: str = "gate") -> nn.Module:
    """A copy of a model whose feed-forward blocks are mixtures of experts that compute only the chosen experts.

    The copy is an ordinary module of the model's own class: it trains, saves, and runs on any device. ``copy.to_dense()``
    gives a dense model back, with all weights in their old places. Experts are padded with zeros to the largest one's
    size, so modules of equal size cost least. What stands between the maps (activation, dropout, learned scales) stays the
    model's own code.

    Args:
        model: is not changed.
        partitions: wire name -> `Partition` of its neurons.
        top_k: experts chosen for each position; a fraction below 1 is a share of the experts; or one of these for each wire.
        selection: "gate" chooses by the mean key (avg-k), "similarity" by the mean of keys at length 1.

    Raises:
        InputError: a partition that does not know its block, or of another size; a top_k out of range; a block whose
            maps are not modules of their own.
    """
    if selection not in GATES:
        raise InputError(f"selection={selection!r} is not one of {GATES}")
    made = copy.deepcopy(model)
    for wire, part in partitions.items():
        block = block_of(wire, part, made)
        members = members_of(part.labels)
        count = top_k[wire] if isinstance(top_k, Mapping) else top_k
        _convert(made, block, members, _number(count, len(members), wire), selection)
    for module, name in _fused(made):
        if any(isinstance(inner, _ExpertMap) for inner in module.modules()):
            vars(module).setdefault("_fused", vars(module)[name])
            vars(module)[name] = False
    made.to_dense = functools.partial(to_dense, made)  # type: ignore[assignment]
    return made


def to_dense(moe: nn.Module) -> nn.Module:
    """A dense copy of a model that `to_moe` made: every weight is where it was."""
    made = copy.deepcopy(moe)
    made.__dict__.pop("to_dense", None)
    for path, module in list(made.named_modules()):
        if isinstance(module, (KeyMap, ValueMap)):
            _put(made, path, module.dense().train(module.training))
    for module, name in _fused(made):
        vars(module)[name] = vars(module).pop("_fused", vars(module)[name])
    return made


def _fused(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules of torch that in eval mode read the weights of those within them, which are not called then; and what decides it."""
    for module in model.modules():
        for kind, name in ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor")):
            if isinstance(module, kind) and name in vars(module):
                yield module, name


def block_of(wire: str, part: Any, model: nn.Module) -> FeedForward:
    """The block that a partition is of.

    Raises:
        InputError: it does not know, it has another number of neurons, it is one of experts that share their parameters, or the
            model has no such parameters.
    """
    block = getattr(part, "ffn", None)
    if not isinstance(block, FeedForward):
        raise InputError(f"the partition of {wire!r} was made of a matrix, which does not tell whose neurons it is about: "
                         "make it from what cl.observe gave, or set ffn= of it")
    if block.stacked > 1:
        raise InputError(f"the partition of {wire!r} is of one of {block.stacked} experts that share the parameter "
                         f"{block.values[0].parameter}: it is a mixture already, and none of them is a module that could be taken apart "
                         "further; give each expert an nn.Linear for each of its maps")
    if len(part.labels) != block.size:
        raise InputError(f"the partition of {wire!r} has {len(part.labels)} neurons, and the wire {block.size}")
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {name for name, _ in model.named_buffers()}
    missing = [w.parameter for w in (*block.keys, *block.gates, *block.values) if w.parameter not in names]
    if missing:
        raise InputError(f"the partition of {wire!r} is of another model: {type(model).__name__} has no parameter {missing[0]!r}")
    return block


def members_of(labels: Any) -> torch.Tensor:
    """int64 (modules, slots): the neurons of each module, -1 after the last."""
    groups = torch.as_tensor(labels, device="cpu").long()
    return nn.utils.rnn.pad_sequence([(groups == n).nonzero().flatten() for n in groups.unique().tolist()], True, -1)


def _number(top_k: float, experts: int, wire: str) -> int:
    number = max(1, round(top_k * experts)) if isinstance(top_k, float) and 0 < top_k < 1 else int(top_k)
    if not 1 <= number <= experts or (not isinstance(top_k, int) and number != top_k and not 0 < top_k < 1):
        raise InputError(f"top_k={top_k} of {wire!r}: between 1 and its {experts} experts, or a share between 0 and 1")
    return number


def _convert(model: nn.Module, block: FeedForward, members: torch.Tensor, top_k: int, selection: str) -> None:
    """Put expert maps in the place of a block's maps."""
    where = f"the block {block.path!r} (wire {block.wire})"
    maps = sorted((*block.gates, *block.keys), key=lambda weight: weight.order)
    first, value = block.first[0], block.values[0]
    if max(len(block.keys), len(block.gates), len(block.values)) > 1 or block.seen:
        raise InputError(f"{where} has more than one map into or out of its wire, or the model returns its values, so it "
                         "cannot be made sparse; merge adapters into the weights first")
    dense: dict[str, nn.Module] = {}
    for weight in (*maps, value):
        path, owner = weight.module, weight.parameter.rpartition(".")[0]
        if path is None or not weight.direct or (weight.bias and weight.bias.rpartition(".")[0] != owner):
            raise InputError(f"{where}: {weight.parameter} is not the weight of a module that does this map alone, "
                             "so there is no module to replace; put an nn.Linear in its place")
        dense[path] = model.get_submodule(path)
        if isinstance(dense[path], _ExpertMap):
            raise InputError(f"{where}: its map {path!r} belongs to another block as well, whose experts it already has; "
                             "convert every other block of a chain")
    *into, out = dense
    named = dict(model.named_parameters(remove_duplicate=False))
    bias = first.of_bias(named[first.bias].detach()) if first.bias else None
    members = members.to(named[first.parameter].device)
    router = Router(first.of(named[first.parameter].detach()), bias, members, top_k, selection)
    router.names = (*into, out)
    for path in into:
        parts = tuple(weight for weight in (*block.gates, *block.keys) if weight.module == path)
        _put(model, path, KeyMap(dense[path], parts, members, router, routes=path == into[0]).train(dense[path].training))
    _put(model, out, ValueMap(dense[out], value, members, router).train(dense[out].training))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _emptied(module: nn.Module) -> nn.Module:
    """A module without its parameters, to be filled again."""
    shell = copy.copy(module)
    shell._parameters = dict.fromkeys(module._parameters)  # type: ignore[assignment]
    return shell
