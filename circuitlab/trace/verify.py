"""Every claim of a circuit, tested on numbers.

Two kinds of claim are tested. **Local**, for each axis of each op: for a broadcast or diagonal axis, running the op on
any re-indexed operands (entries dropped and doubled) gives the re-indexed result; for a contracted, reduced or
normalised axis the same holds for permutations; see `circuitlab.trace.claims`. **Global**, for each permutable wire:
permuting every parameter dimension it sits in leaves the module's outputs as they are, also where each index of a wire
around it has a permutation of its own; and the circuit compiled back to code gives the module's outputs. Numbers are float64 where the module allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from circuitlab.circuit import Circuit
from circuitlab.errors import InputError, VerificationError
from circuitlab.trace import transforms
from circuitlab.trace.claims import (
    Claim,
    Results,
    cloned,
    difference,
    test_op,
    tolerance_of,
)
from circuitlab.trace.compile import to_torch
from circuitlab.trace.events import Event, tensors_in
from circuitlab.trace.guard import copy_model, doubled, own, random_state, with_numbers
from circuitlab.trace.permutable import nesting
from circuitlab.trace.permute import draw, move
from circuitlab.trace.record import RunError, forward_of, named_inputs, record
from circuitlab.trace.rules import pointwise
from circuitlab.trace.watch import Recorder


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
        import pandas as pd

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
    used = {tensor.name for tensor in circuit.tensors}
    state = (*model.named_parameters(), *model.named_buffers())
    if any(tensor.is_meta for name, tensor in state if name in used):
        raise VerificationError("the module is on the meta device, where there are no numbers to test with; give it "
                                "weights, e.g. model.to_empty(device='cpu'), and verify again")
    empty = [name for name, tensor in named_inputs(forward_of(model), args, kwargs) if tensor.is_meta]
    if empty:
        raise VerificationError(f"the input {empty[0]!r} is on the meta device, where there are no numbers to test with; give "
                                "inputs with values, e.g. torch.rand_like(input, device='cpu')")
    with random_state(), with_numbers(model):
        generator = torch.Generator().manual_seed(seed)
        tester, output, double = _watched(circuit, model, args, kwargs, generator)
        _permutations(circuit, model, args, kwargs, tester, output, double)
        _compiled(circuit, model, args, kwargs, tester, output, double)
    return Report(
        tuple(tester.held), tuple(tester.failed), tuple(tester.untestable), "float64" if double else "as given"
    )


# local claims --------------------------------------------------------------------------------------------


class _Tester(Recorder):
    """Records a run, and tests each op's axes as it goes."""

    circuit: Circuit
    results: Results
    generator: torch.Generator

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        try:
            before = cloned((tuple(args), {key: item for key, item in kwargs.items() if key != "out"}))
        except RuntimeError:  # arrays of a kind that cannot be copied
            before = None
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
        try:
            copies = [tensor.detach().clone() for tensor in results]
        except RuntimeError:
            copies = None
        if before is None or copies is None:
            self.results.untestable.append(Claim("shape", op.name, source=op.source, why="its arrays cannot be copied"))
            return
        with torch.random.fork_rng(devices=[]):  # so that the module draws what it drew when it was traced
            test_op(self.circuit, op, func, before, copies, self.results, self.generator)


def _watched(
    circuit: Circuit, model: torch.nn.Module, args: Any, kwargs: Any, generator: torch.Generator
) -> tuple[Results, dict[str, torch.Tensor], bool]:
    """Run and test, in float64 if the module can."""
    failure: RunError | None = None
    for double in (True, False):
        tester = type("Tester", (_Tester,), {})
        results = Results()
        tester.circuit, tester.results, tester.generator = circuit, results, generator
        try:
            with random_state():
                _, output = record(model, args, kwargs, meta=False, recorder_class=tester,
                                   convert=doubled if double else own)
        except RunError as error:
            # a module may ask for its dtype, and take another way in float64
            if isinstance(error.cause, VerificationError) and not double:
                raise error.cause from None
            failure = error
            continue
        return results, _outputs(output), double
    assert failure is not None
    raise VerificationError(f"the module does not run on these inputs: {failure.cause}") from failure.cause


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
        if not made.numel():
            return None, made
        with transforms.outside():
            first = transforms.whole(made).flatten()[0]
        return None, made.fill_(first)


def _permutations(
    circuit: Circuit,
    model: torch.nn.Module,
    args: Any,
    kwargs: Any,
    results: Results,
    output: dict[str, torch.Tensor],
    double: bool,
) -> None:
    """Test each permutable wire: all at once, and one by one if that fails."""
    wires = [wire for wire in circuit.wires.values() if wire.permutable and wire.size]
    if not wires:
        return
    if any(op.kind == "random" for op in circuit.ops):
        _, calm = record(model, args, kwargs, meta=False, recorder_class=_Calm, convert=doubled if double else own)
        output = _outputs(calm)
    generator = torch.Generator().manual_seed(1)
    within = nesting(circuit)
    index = {wire.name: draw(circuit, within, wire.name, generator) for wire in wires}

    def error_of(names: list[str]) -> float:
        def prepare(copied: torch.nn.Module) -> None:
            move(circuit, copied, within, {name: index[name] for name in names})

        _, got = record(model, args, kwargs, meta=False, recorder_class=_Calm, convert=doubled if double else own,
                        prepare=prepare)
        return _largest(_outputs(got), output)

    pending = [[wire.name for wire in wires]]
    while pending:
        names = pending.pop(0)
        why = ""
        try:
            error = error_of(names)
        except RunError as failure:
            error, why = float("inf"), str(failure.cause)
        if error <= 10 * results.tolerance:
            results.held.extend(Claim("permutable", name, name, error=error) for name in names)
        elif len(names) > 1:
            half = len(names) // 2
            pending[:0] = [names[:half], names[half:]]
        elif why:
            results.failed.append(Claim("permutable", names[0], names[0], why=why))
        else:
            why = f"permuting it everywhere changes the outputs by {error:.2g}"
            results.failed.append(Claim("permutable", names[0], names[0], error=error, why=why))


def _compiled(
    circuit: Circuit,
    model: torch.nn.Module,
    args: Any,
    kwargs: Any,
    results: Results,
    output: dict[str, torch.Tensor],
    double: bool,
) -> None:
    """Test whether the circuit's code gives what the module gave.

    Where the code names a dtype (the zeros that an LSTM begins with), it may not run in float64, and a
    module that masks by the least number of its dtype may not be finite there: then as the module is.
    """
    claim: dict[str, Any] = {"kind": "compiled", "subject": circuit.title}
    if any(op.kind == "random" for op in circuit.ops):
        results.untestable.append(Claim(**claim, why="it is random"))
        return

    def as_it_is() -> None:
        plain = _outputs(record(model, args, kwargs, meta=False, convert=own)[1])
        _compiled(circuit, model, args, kwargs, results, plain, double=False)

    if double and not all(bool(tensor.isfinite().all()) for path, tensor in output.items() if path in circuit.returns):
        as_it_is()
        return
    copied, values, _ = copy_model(model, (args, kwargs), convert=doubled if double else own)
    try:
        with torch.no_grad():
            compiled = to_torch(circuit, copied)
            got = _outputs(compiled(*values[0], **values[1]))
            again = _outputs(compiled(*values[0], **values[1])) if circuit.opaque else got
    except (InputError, RuntimeError, ValueError, IndexError, TypeError) as error:
        if double and not isinstance(error, InputError):
            as_it_is()
            return
        results.untestable.append(Claim(**claim, why=str(error)))
        return
    if _largest(again, got) > 0:
        results.untestable.append(Claim(**claim, why="an op without a rule gives other numbers each time"))
        return
    error = _largest(got, {path: output[path] for path in circuit.returns})
    tolerance = 10 * max([results.tolerance, *(tolerance_of(tensor.dtype) for tensor in got.values())])
    why = "" if error <= tolerance else f"the circuit's code gives outputs that differ by {error:.2g}"
    results.add(Claim(**claim, error=error, why=why), tolerance)


def _outputs(value: Any) -> dict[str, torch.Tensor]:
    """Where each array stands in what a forward returned -> the array."""
    return {path: tensor.detach() for path, tensor in tensors_in(value, torch.Tensor)}


def _largest(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference between outputs; infinite where one is missing."""
    if got.keys() != expected.keys():
        return float("inf")
    return max((difference(tensor, expected[path], 1e-6) for path, tensor in got.items()), default=0.0)
