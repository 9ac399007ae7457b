"""Variance along a path between two models."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.collapse import Collapse, collapse
from circuitlab.errors import InputError


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def setting():
    one, two = net(0), net(1)

    def at(alpha):
        made = copy.deepcopy(one)
        made.load_state_dict({name: (1 - alpha) * a + alpha * two.state_dict()[name] for name, a in one.state_dict().items()})
        return made

    torch.manual_seed(2)
    batches = [torch.randn(n, 1, 4, 4) for n in (7, 12, 1)]
    return at, batches, collapse(at, batches, (0, 0.3, 1), progress=False)


def test_variances_are_those_of_the_layers(setting):
    at, batches, found = setting
    whole = torch.cat(batches)
    for row, alpha in zip(found.variance, found.alphas, strict=True):
        model = at(alpha)
        conv = model[0](whole).detach().double()
        first = model[:4](whole).detach().double()
        last = model(whole).detach().double()
        expected = [conv.var((0, 2, 3), unbiased=False).mean(), first.var(0, unbiased=False).mean(), last.var(0, unbiased=False).mean()]
        assert np.allclose(row, [float(v) for v in expected], rtol=1e-5)
    assert np.allclose(found.ratio[[0, -1]], 1)


def test_it_is_drawn_on_the_diagram_and_kept(setting, tmp_path):
    at, batches, found = setting
    circuit = cl.trace(at(0), batches[0])
    assert set(found.overlay(0.28)) == {op.name for op in circuit.ops if op.kind in ("linear", "conv")}
    assert circuit.svg(overlay=found.overlay(0.28), span=(0, 1)) != circuit.svg(overlay=found.overlay(1.0), span=(0, 1))
    again = Collapse.load(found.save(tmp_path / "collapse.safetensors"))
    assert np.array_equal(again.variance, found.variance)
    assert len(found.to_frame()) == 9
    assert [trace.name for trace in found.plot().data] == list(found.ops)
    assert "least at" in repr(found)


def test_what_cannot_be_measured_is_told(setting):
    at, batches, _ = setting
    with pytest.raises(InputError, match="both among them"):
        collapse(at, batches, (0, 0.5))
    with pytest.raises(InputError, match="no linear map"):
        collapse(lambda _: nn.ReLU(), batches, 3, progress=False)
    with pytest.raises(InputError, match="is empty"):
        collapse(at, [], 3, progress=False)
