"""Every model of the zoo is traced, verified on numbers, drawn without a fault, and left as it was."""

import pytest
import torch
from tests.zoo import ZOO

import circuitlab as cl
from circuitlab.circuit import Circuit
from circuitlab.diagram.check import look
from circuitlab.diagram.layout import draw

# calls that no rule covers yet: they are drawn as opaque boxes, which is the honest answer
OPAQUE = {
    "cross_reshape", "cross_reshape_mapped", "per_sample_gradients", "inner_step", "jacobians", "force_field", "quantised_lstm",
    "strides_over_more_than_the_array", "relative_shift",
}


@pytest.mark.parametrize("name", ZOO)
def test_model(name):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    state = model.state_dict()
    plain = {key for key, value in state.items() if type(value) is torch.Tensor and not (value.is_meta or value.is_quantized)}
    before = {key: state[key].clone() for key in plain}
    drawn = torch.get_rng_state()
    circuit = cl.trace(model, *args, **kwargs)
    report = circuit.verify(model, *args, **kwargs)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in plain)
    assert report.ok, report.failed
    assert bool(circuit.opaque) == (name in OPAQUE), circuit.opaque
    assert report.held or name in OPAQUE
    assert Circuit.from_json(circuit.to_json()) == circuit
    for depth in (0, 1, 2, 9):
        found = look(draw(circuit, depth=depth))
        assert found.ok, (depth, found)
    circuit.text(depth=2)
