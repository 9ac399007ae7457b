"""Every claim of a circuit, tested on numbers.

Two kinds of claim are tested. **Local**, for each axis of each op: for a broadcast or diagonal axis, running the op on
any re-indexed operands (entries dropped and doubled) gives the re-indexed result; for a contracted, reduced or
normalised axis the same holds for permutations. **Global**, for each permutable wire: permuting every parameter
dimension it sits in leaves the module's outputs as they are. Numbers are float64 where the module allows it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from circuitlab.circuit import PASSING_ROLES, Circuit, Op, Place
from circuitlab.errors import InputError, VerificationError
from circuitlab.trace.events import Event, tensors_in
from circuitlab.trace.guard import random_state
from circuitlab.trace.record import RunError, record
from circuitlab.trace.rules import pointwise
from circuitlab.trace.watch import Recorder

_TESTED = PASSING_ROLES | {"contracted", "reduced", "normalised", "created"}


@dataclass(frozen=True)
class Claim:
    """One thing that a circuit says.

    Attributes:
        kind: "broadcast", "diagonal", "contracted", "reduced", "normalised", "created" (of an op's axis),
            "shape" (of an op) or "permutable" (of a wire).
        subject: name of the op or wire. wire: name of the wire. source: the author's line.
        error: largest difference found, relative to the largest number; None if it was not tested.
        why: where it failed or could not be tested, the reason.
    """

    kind: str
    subject: str
    wire: str = ""
    source: str = ""
    error: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `verify` found: claims that held, failed, and could not be tested."""

    held: tuple[Claim, ...] = ()
    failed: tuple[Claim, ...] = ()
    untestable: tuple[Claim, ...] = ()
    dtype: str = "float64"

    @property
    def ok(self) -> bool:
        """Whether no claim failed."""
        return not self.failed

    def to_frame(self) -> Any:
        """All claims as a pandas DataFrame: result, kind, subject, wire, error, why, source."""
        try:
            import pandas as pd
        except ImportError:
            raise InputError("Report.to_frame needs pandas: pip install pandas") from None
        rows = [
            {"result": result, **vars(claim)}
            for result, claims in (("held", self.held), ("failed", self.failed), ("untestable", self.untestable))
            for claim in claims
        ]
        return pd.DataFrame(rows, columns=["result", "kind", "subject", "wire", "error", "why", "source"])

    def __repr__(self) -> str:
        lines = [f"Report: {len(self.held)} held, {len(self.failed)} failed, {len(self.untestable)} not testable"]
        lines += [f"  failed: {c.kind} {c.wire} in {c.subject} ({c.source}): {c.why}" for c in self.failed[:10]]
        return "\n".join(lines)


def verify(circuit: Circuit, model: torch.nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> Report:
    """Test every claim of a circuit by running the module.

    The module is not changed: a copy runs, in float64 where that is possible.

    Args:
        circuit: traced from this module.
        model: the module.
        *args, **kwargs: inputs of the shapes it was traced with; with values, not on the meta device.
        seed: of the permutations that are tried.

    Returns:
        the `Report`.

    Raises:
        VerificationError: the module holds no values, does not run, or is another module or input shape than the
            circuit was traced from.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise VerificationError("the module is on the meta device, where there are no numbers to test with; give it "
                                "weights, e.g. model.to_empty(device='cpu'), and verify again")
    with random_state():
        generator = torch.Generator().manual_seed(seed)
        tester, output, double = _watched(circuit, model, args, kwargs, generator)
        _permutations(circuit, model, args, kwargs, tester, output, double)
    return Report(
        tuple(tester.held), tuple(tester.failed), tuple(tester.untestable), "float64" if double else "as given"
    )


# local claims --------------------------------------------------------------------------------------------


@dataclass
class _Results:
    held: list[Claim] = field(default_factory=list[Claim])
    failed: list[Claim] = field(default_factory=list[Claim])
    untestable: list[Claim] = field(default_factory=list[Claim])
    tolerance: float = 1e-8

    def add(self, claim: Claim, tolerance: float) -> None:
        """Sort a tested claim by its error."""
        bad = claim.error is None or not claim.error <= tolerance
        (self.failed if bad else self.held).append(claim)


class _Tester(Recorder):
    """Records a run, and tests each op's axes as it goes."""

    circuit: Circuit
    results: _Results
    generator: torch.Generator

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        kwargs = {key: item for key, item in kwargs.items() if key != "out"} if "out" in kwargs else kwargs
        before = _cloned((tuple(args), dict(kwargs)))
        return before, func(*args, **kwargs)

    def after(self, event: Event, func: Any, before: Any, results: list[torch.Tensor]) -> None:
        try:
            op = self.circuit.op(event.name)
        except KeyError:
            return
        if op.outputs != tuple(out.name for out in event.outs) or any(
            self.circuit.tensor(name).shape != out.shape for name, out in zip(op.outputs, event.outs, strict=True)
        ):
            raise VerificationError(
                f"the op {op.name!r} ({op.source}) made {[out.shape for out in event.outs]}, and the circuit says "
                f"{[self.circuit.tensor(n).shape for n in op.outputs]}: verify with inputs of the shapes that were traced"
            )
        _test_op(self, op, func, before, [tensor.detach().clone() for tensor in results])


def _watched(
    circuit: Circuit, model: torch.nn.Module, args: Any, kwargs: Any, generator: torch.Generator
) -> tuple[_Results, list[torch.Tensor], bool]:
    """Run and test, in float64 if the module can."""
    failure: RunError | None = None
    for double in (True, False):
        tester = type("Tester", (_Tester,), {})
        results = _Results()
        tester.circuit, tester.results, tester.generator = circuit, results, generator
        try:
            _, output = record(model, args, kwargs, meta=False, recorder_class=tester,
                               prepare=_to_double if double else None)
        except RunError as error:
            if isinstance(error.cause, VerificationError):
                raise error.cause from None
            failure = error
            continue
        return results, [t.detach() for _, t in tensors_in(output, torch.Tensor)], double
    assert failure is not None
    raise VerificationError(f"the module does not run on these inputs: {failure.cause}") from failure.cause


def _to_double(model: torch.nn.Module, values: Any) -> Any:
    """The copy in float64. Parameters are shared with the user's module, so they are replaced, not converted."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_floating_point():
                twin = _doubles.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().double(), False))
                module._parameters[name] = twin
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.double()
    _doubles.clear()
    twins: dict[int, torch.Tensor] = {}  # one tensor given twice stays one: modules ask whether keys are queries

    def double(tensor: torch.Tensor) -> torch.Tensor:
        return twins.setdefault(id(tensor), tensor.double()) if tensor.is_floating_point() else tensor

    return _mapped(values, double)


_doubles: dict[int, torch.nn.Parameter] = {}


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if type(value) in (tuple, list, torch.Size):
        return type(value)(_mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) is slice:
        return slice(*(_mapped(item, change) for item in (value.start, value.stop, value.step)))
    return value


def _cloned(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.detach().clone())


def _test_op(tester: _Tester, op: Op, func: Any, call: Any, results: list[torch.Tensor]) -> None:
    """Test each axis of an op that has just run."""
    if op.kind in ("opaque", "random", "create"):
        if op.kind != "create":
            tester.results.untestable.append(
                Claim("shape", op.name, source=op.source, why="it has no rule" if op.kind == "opaque" else "it is random")
            )
        return
    sizes = {name: wire.size for name, wire in tester.circuit.wires.items()}
    inputs = [tester.circuit.tensor(name) for name in op.inputs]
    outputs = [tester.circuit.tensor(name) for name in op.outputs]
    tolerance = max(_tolerance(t.dtype) for t in (*results, *(t for _, t in tensors_in(call, torch.Tensor))))
    tester.results.tolerance = max(tester.results.tolerance, tolerance)
    floor = _floor(call)
    for axis in op.axes:
        size = sizes[axis.wire]
        if axis.role not in _TESTED or not axis.ins or not size:
            continue
        index = _index(size, axis.role in PASSING_ROLES, tester.generator)
        claim: dict[str, Any] = {"kind": axis.role, "subject": op.name, "wire": axis.wire, "source": op.source}
        numbers = iter(range(len(inputs)))

        def changed(tensor: torch.Tensor) -> torch.Tensor:
            number = next(numbers)
            places = [place for place in axis.ins if place[0] == number]
            return _reindexed(tensor.clone(), places, inputs[number].dims, sizes, index)

        try:
            arguments, keywords = _mapped(call, changed)
            got = [t for _, t in tensors_in(_run(op, func, arguments, keywords), torch.Tensor)]
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            tester.results.untestable.append(Claim(**claim, why=f"it does not run re-indexed: {error}"))
            continue
        error = 0.0
        for number, (result, dims) in enumerate(zip(results, outputs, strict=True)):
            if number and axis.role == "reduced":
                continue  # where the largest was: read by nobody, else the role were "ordered"
            places = [place for place in axis.outs if place[0] == number]
            expected = _reindexed(result, places, dims.dims, sizes, index)
            error = max(error, _difference(got[number], expected, floor))
        why = "" if error <= tolerance else f"re-indexing {axis.wire} ({axis.role}) changes the result by {error:.2g}"
        tester.results.add(Claim(**claim, error=error, why=why), tolerance)


def _tolerance(dtype: torch.dtype) -> float:
    """The error that rounding may make, with room: a module may compute in less than float64 inside."""
    return 1e-8 if not dtype.is_floating_point else max(1e-8, 500 * torch.finfo(dtype).eps)


def _run(op: Op, func: Any, args: Any, kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    return args[0] if result is None and op.fn == "setitem" else result


def _index(size: int, any_map: bool, generator: torch.Generator) -> torch.Tensor:
    """A random permutation, or for broadcast axes any map: some entries twice, some dropped."""
    index = torch.randperm(size, generator=generator)
    if any_map:
        index[-1] = index[0]
        return index
    return index if not torch.equal(index, torch.arange(size)) else index.flip(0)


def _reindexed(
    tensor: torch.Tensor,
    places: list[Place],
    dims: tuple[tuple[str, ...], ...],
    sizes: Mapping[str, int],
    index: torch.Tensor,
) -> torch.Tensor:
    """The tensor with entries of the axis at these places chosen by the index."""
    for _, dim, factor in places:
        product = [sizes[name] for name in dims[dim]]
        tensor = _permuted(tensor, dim, product, factor, index)
    return tensor


def _permuted(tensor: torch.Tensor, dim: int, product: list[int], factor: int, index: torch.Tensor) -> torch.Tensor:
    shape = tensor.shape
    wide = tensor.reshape(*shape[:dim], *product, *shape[dim + 1 :])
    return wide.index_select(dim + factor, index.to(tensor.device)).reshape(shape)


def _floor(call: Any) -> float:
    """Results much smaller than the operands are rounding: the mean of what was normalised is 1e-17, not a number."""
    sizes = [t.detach().nan_to_num(0, 0, 0).abs().max() for _, t in tensors_in(call, torch.Tensor)
             if t.is_floating_point() and t.numel()]
    return 1e-4 * max((float(size) for size in sizes), default=0.0)


def _difference(got: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference relative to the largest number; infinite where shapes or not-a-numbers disagree."""
    if got.shape != expected.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    if not (got.is_floating_point() or got.is_complex()):
        return 0.0 if torch.equal(got, expected) else float("inf")
    same = (got == expected) | (got.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, torch.zeros_like(got), got - expected).abs()
    scale = torch.where(expected.isfinite(), expected, torch.zeros_like(expected)).abs().max()
    value = float(gap.max() / scale.clamp_min(max(floor, 1e-30)))
    return float("inf") if math.isnan(value) else value


# global claims -------------------------------------------------------------------------------------------


class _Calm(Recorder):
    """A run without chance: dropout does nothing, and noise drawn for each entry alike is one number for all.

    That is as symmetric as the noise is as a distribution, so what permuting changes it changes here too.
    """

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name.removesuffix("_") not in pointwise.RANDOM and name not in ("rand", "randn", "randint"):
            return None, func(*args, **kwargs)
        if "dropout" in name:
            input = args[0] if args else kwargs["input"]
            return None, input if name.endswith("_") or kwargs.get("inplace") else input.clone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = func(*args, **kwargs)
        return None, made.fill_(made.flatten()[0]) if made.numel() else made


def _permutations(
    circuit: Circuit,
    model: torch.nn.Module,
    args: Any,
    kwargs: Any,
    results: _Results,
    output: list[torch.Tensor],
    double: bool,
) -> None:
    """Test each permutable wire: all at once, and one by one if that fails."""
    wires = [wire for wire in circuit.wires.values() if wire.permutable and wire.size]
    if not wires:
        return
    if any(op.kind == "random" for op in circuit.ops):
        _, calm = record(model, args, kwargs, meta=False, recorder_class=_Calm, prepare=_to_double if double else None)
        output = [t.detach() for _, t in tensors_in(calm, torch.Tensor)]
    generator = torch.Generator().manual_seed(1)
    index = {wire.name: _index(wire.size, False, generator) for wire in wires}

    def error_of(names: list[str]) -> float:
        def prepare(copied: torch.nn.Module, values: Any) -> Any:
            values = _to_double(copied, values) if double else values
            _apply(circuit, copied, {name: index[name] for name in names}, fresh=not double)
            return values

        _, got = record(model, args, kwargs, meta=False, recorder_class=_Calm, prepare=prepare)
        found = [t for _, t in tensors_in(got, torch.Tensor)]
        return max((_difference(a, b, 1e-6) for a, b in zip(found, output, strict=True)), default=0.0)

    def settle(names: list[str]) -> None:
        try:
            error = error_of(names)
        except RunError as failure:
            error = float("inf")
            if len(names) == 1:
                results.failed.append(Claim("permutable", names[0], names[0], why=str(failure.cause)))
                return
        if error <= 10 * results.tolerance:
            results.held.extend(Claim("permutable", name, name, error=error) for name in names)
        elif len(names) == 1:
            why = f"permuting it everywhere changes the outputs by {error:.2g}"
            results.failed.append(Claim("permutable", names[0], names[0], error=error, why=why))
        else:
            half = len(names) // 2
            settle(names[:half])
            settle(names[half:])

    settle([wire.name for wire in wires])


def permute(circuit: Circuit, model: torch.nn.Module, permutations: Mapping[str, Any]) -> torch.nn.Module:
    """A copy of a module with wires permuted everywhere they sit: the same function, other numbers.

    Args:
        circuit: traced from this module.
        model: is not changed.
        permutations: wire name -> permutation of its entries (``LongTensor`` of the wire's size): entry i of the
            copy's wire is entry ``permutation[i]`` of the module's.

    Returns:
        the copy.

    Raises:
        InputError: an unknown or frozen wire, or not a permutation of its size.
    """
    checked: dict[str, torch.Tensor] = {}
    for name, given in permutations.items():
        wire = circuit.wires.get(name)
        if wire is None:
            raise InputError(f"this circuit has no wire {name!r}; the permutable ones are "
                             f"{[w.name for w in circuit.wires.values() if w.permutable]}")
        if not wire.permutable:
            raise InputError(f"the wire {name!r} is not permutable: {wire.why}")
        index = torch.as_tensor(given, dtype=torch.long)
        if index.shape != (wire.size,) or not torch.equal(torch.sort(index)[0].cpu(), torch.arange(wire.size)):
            raise InputError(f"the wire {name!r} has {wire.size} entries; a permutation of 0..{wire.size - 1} is needed")
        checked[name] = index
    copied = copy.deepcopy(model)
    _apply(circuit, copied, checked, fresh=False)
    return copied


def _apply(circuit: Circuit, model: torch.nn.Module, permutations: Mapping[str, torch.Tensor], *, fresh: bool) -> None:
    """Permute parameters and buffers in place; with ``fresh``, parameters are replaced and the old ones left alone."""
    if fresh:
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    twin = _doubles.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().clone(), False))
                    module._parameters[key] = twin
        _doubles.clear()
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    with torch.no_grad():
        for name, index in permutations.items():
            for tensor, dim, factor, part in circuit.wires[name].places:
                if tensor not in state:
                    raise VerificationError(f"the module has no parameter {tensor!r}: it is not the one that was traced")
                target = state[tensor]
                start, stop = part or (0, target.shape[dim])
                view = target.narrow(dim, start, stop - start)
                product = [circuit.wires[n].size for n in _product(circuit, tensor, dim, part)]
                view.copy_(_permuted(view.clone(), dim, product, factor, index))


def _product(circuit: Circuit, tensor: str, dim: int, part: tuple[int, int] | None) -> tuple[str, ...]:
    """The wires that a dimension, or a part of it, is the product of."""
    names = circuit.tensor(tensor).dims[dim]
    return names if part is None else next(found for at, found in _part_products(circuit, names, 0) if at == part)


def _part_products(
    circuit: Circuit, names: tuple[str, ...], offset: int
) -> Iterator[tuple[tuple[int, int], tuple[str, ...]]]:
    inner = 1
    for name in names[1:]:
        inner *= circuit.wires[name].size
    for start, stop, parts in circuit.wires[names[0]].parts:
        product = (*parts, *names[1:])
        yield (offset + start * inner, offset + stop * inner), product
        if parts:
            yield from _part_products(circuit, product, offset + start * inner)
