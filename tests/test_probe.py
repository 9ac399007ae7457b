"""Ops without a rule: probing claims what numbers can show, marks it, and nothing else."""

import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.diagram.check import look
from circuitlab.diagram.layout import draw
from circuitlab.trace.probe import probe

LIBRARY = torch.library.Library("circuitlab_tests", "DEF")


def operator(schema):
    def register(function):
        LIBRARY.define(schema)
        name = schema.partition("(")[0]
        LIBRARY.impl(name, function, "CPU")
        return getattr(torch.ops.circuitlab_tests, name)

    return register


scaled = operator("scaled(Tensor x, Tensor w) -> Tensor")(lambda x, w: torch.tanh(x) * w)
mixed = operator("mixed(Tensor x, Tensor w) -> Tensor")(lambda x, w: (x @ w).softmax(-1))
summed = operator("summed(Tensor x) -> Tensor")(lambda x: x.cumsum(1))
noisy = operator("noisy(Tensor x) -> Tensor")(lambda x: x + torch.randn_like(x))
cut = operator("cut(Tensor x, Tensor lengths) -> Tensor")(
    lambda x, lengths: x * (torch.arange(x.shape[1]) < lengths[:, None]))
calls = []
written = operator("written(Tensor(a!) x) -> Tensor")(lambda x: calls.append(0) or x.add_(1).clone())
turned = operator("turned(Tensor x) -> (Tensor, Tensor)")(lambda x: (x.T.contiguous(), x.amax(0)))


class Calls(nn.Module):
    def __init__(self, function, *extra):
        super().__init__()
        self.function = function
        self.extra = nn.ParameterList(extra)

    def forward(self, *inputs):
        return self.function(*inputs, *self.extra)


def axes(circuit):
    (op,) = circuit.opaque
    return {(a.role, a.ins, a.outs) for a in op.axes if a.role != "opaque"}, op


def traced(function, *inputs, extra=()):
    torch.manual_seed(0)
    model = Calls(function, *extra)
    circuit = cl.trace(model, *inputs)
    assert circuit.device == "live"  # these operators have no meta kernels
    report = circuit.verify(model, *inputs)
    assert report.ok, report
    assert look(draw(circuit)).ok
    return circuit


def test_elementwise_with_a_weight():
    circuit = traced(scaled, torch.randn(3, 4), extra=[torch.randn(4)])
    found, op = axes(circuit)
    assert found == {("broadcast", ((0, 0, 0),), ((0, 0, 0),)), ("diagonal", ((0, 1, 0), (1, 0, 0)), ((0, 1, 0),))}
    assert op.attrs["probed"] is True
    assert "scaled (probed)" in circuit.text()
    assert "hatch" in circuit.svg()  # it stays without a rule, and looks so


def test_contraction_and_normalisation():
    found, _ = axes(traced(mixed, torch.randn(3, 4), extra=[torch.randn(4, 6)]))
    assert found == {
        ("broadcast", ((0, 0, 0),), ((0, 0, 0),)),
        ("contracted", ((0, 1, 0), (1, 0, 0)), ()),
        ("normalised", ((1, 1, 0),), ((0, 1, 0),)),
    }


def test_several_results_and_square_arrays():
    found, _ = axes(traced(turned, torch.randn(4, 4)))
    assert ("broadcast", ((0, 1, 0),), ((0, 0, 0), (1, 0, 0))) in found
    assert all(ins != ((0, 0, 0),) or outs == ((0, 1, 0),) for _, ins, outs in found)


def test_what_depends_on_positions_is_not_claimed():
    found, _ = axes(traced(summed, torch.randn(3, 4)))
    assert found == {("broadcast", ((0, 0, 0),), ((0, 0, 0),))}
    assert not any(wire.permutable for wire in traced(summed, torch.randn(3, 4)).wires.values())


@pytest.mark.parametrize(("function", "inputs"), [
    (noisy, (torch.randn(3, 4),)),
    (cut, (torch.randn(3, 4), torch.tensor([4, 4, 4]))),
    (summed, (torch.arange(12).view(3, 4),)),
])
def test_chance_and_whole_numbers_are_left_opaque(function, inputs):
    found, op = axes(traced(function, *inputs))
    assert not found
    assert "probed" not in op.attrs


def test_what_writes_is_not_called_again():
    calls.clear()
    assert probe(written, "written", ((torch.randn(3),), {}), [torch.randn(3)]) == ()
    assert not calls


def test_numbers_at_hand_that_hide_a_dependence_do_not_mislead():
    # a mask of ones and a weight of zeros look as if they did not matter
    masked = operator("masked(Tensor x, Tensor mask) -> Tensor")(lambda x, mask: x * mask)
    found, _ = axes(traced(masked, torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)))
    assert found == {("diagonal", ((0, 0, 0), (1, 0, 0)), ((0, 0, 0),)), ("diagonal", ((0, 1, 0), (1, 1, 0)), ((0, 1, 0),))}
    weighed = operator("weighed(Tensor x, Tensor w) -> Tensor")(lambda x, w: x * (1 + w))
    found, _ = axes(traced(weighed, torch.randn(3, 3), torch.zeros(3)))
    assert ("broadcast", ((0, 1, 0),), ((0, 1, 0),)) not in found


def test_probing_leaves_random_state_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cl.trace(Calls(scaled, torch.ones(4)), torch.ones(3, 4))
    assert torch.equal(state, torch.get_rng_state())


known = operator("known(Tensor x, Tensor w) -> Tensor")(lambda x, w: torch.tanh(x) * w)
LIBRARY.impl("known", lambda x, w: torch.empty_like(x), "Meta")


def test_a_small_model_is_run_live_to_probe_what_meta_leaves_opaque(monkeypatch):
    model, x = Calls(known, torch.randn(4)), torch.randn(3, 4)
    found, op = axes(circuit := cl.trace(model, x))
    assert circuit.device == "live" and op.attrs["probed"]
    assert found == {("broadcast", ((0, 0, 0),), ((0, 0, 0),)), ("diagonal", ((0, 1, 0), (1, 0, 0)), ((0, 1, 0),))}
    assert cl.trace(model, x, device="meta").device == "meta"
    assert cl.trace(Calls(known, torch.randn(4, device="meta")), x.to("meta")).device == "meta"
    import circuitlab.trace.record as record

    monkeypatch.setattr(record, "_SMALL", 15)
    circuit = cl.trace(model, x)
    assert circuit.device == "meta" and {axis.role for op in circuit.opaque for axis in op.axes} == {"opaque"}


def test_a_model_that_does_not_run_live_keeps_what_meta_tells():
    broken = operator("broken(Tensor x) -> Tensor")(lambda x: 1 / 0)
    LIBRARY.impl("broken", torch.empty_like, "Meta")
    assert cl.trace(Calls(broken), torch.randn(3, 4)).device == "meta"
