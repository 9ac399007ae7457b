"""Tracing, verifying and permuting where the caller's new tensors are made without numbers."""

import pytest
import torch
from torch import nn

import circuitlab as cl


class Mask(nn.Module):
    """Makes tensors in its forward, and asks for a number, which a run on meta does not have."""

    def __init__(self):
        super().__init__()
        self.map, self.out = nn.Linear(3, 5, device="cpu"), nn.Linear(5, 2, device="cpu")

    def forward(self, x):
        before = torch.ones(x.shape[0], x.shape[0]).tril()
        y = before @ self.map(x)
        return self.out(y if y.sum().item() < 1e9 else y * 2) + torch.arange(2)


def test_default_meta():
    model, x = Mask(), torch.rand(4, 3)
    with torch.device("meta"):
        circuit = cl.trace(model, x)
        report = circuit.verify(model, x)
        (wire,) = (wire for wire in circuit.wires.values() if wire.permutable)
        permuted = circuit.permute(model, {wire.name: [4, 2, 0, 1, 3]})
    assert circuit.device == "live"
    assert report.ok
    assert not report.untestable
    assert "permutable" in {claim.kind for claim in report.held}
    torch.testing.assert_close(permuted(x), model(x))


def test_inputs_without_numbers():
    model = nn.Linear(3, 2)
    circuit = cl.trace(model, torch.rand(4, 3))
    with pytest.raises(cl.CircuitlabError, match=r"the input 'input' is on the meta device.*rand_like"):
        circuit.verify(model, torch.zeros(4, 3, device="meta"))
