"""What a model costs grows in proportion to its ops: function calls are counted, which no other load disturbs."""

import cProfile
import pstats

import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.diagram.check import look
from circuitlab.diagram.scene import Mark, Scene
from circuitlab.trace.compile import source

MORE = 4
"""How much longer the longer of two loops is."""


class Loop(nn.Module):
    """A recurrence written as a loop, whose states are all kept to the end."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.map = steps, nn.Linear(8, 8)

    def forward(self, x):
        state, states = torch.zeros(x.shape[0], 8), []
        for step in range(self.steps):
            state = torch.tanh(self.map(x[:, step]) + state)
            states.append(state)
        return torch.stack(states, 1)


def calls(function, *args):
    profile = cProfile.Profile()
    profile.runcall(function, *args)
    return pstats.Stats(profile).total_calls


def circuit_of(steps):
    model, x = Loop(steps).eval(), torch.randn(3, steps, 8)
    return cl.trace(model, x), model, x


@pytest.fixture(scope="module")
def loops():
    circuit_of(5)  # what is done once is done
    return circuit_of(80), circuit_of(80 * MORE)


def test_tracing(loops):
    short, long = (calls(cl.trace, model, x) for _, model, x in loops)
    assert long < 1.2 * MORE * short


def test_verifying(loops):
    short, long = (calls(circuit.verify, model, x) for circuit, model, x in loops)
    assert long < 1.2 * MORE * short


def test_writing_code(loops):
    short, long = (calls(source, circuit) for circuit, *_ in loops)
    assert long < 1.2 * MORE * short


def test_looking():
    def scene(rows):
        marks = []
        for row in range(rows):
            y = 100.0 * row
            marks += [Mark("path", "wire", d=f"M0 {y + n}C300 {y + n} 300 {y + 40 - n} 600 {y + 40 - n}") for n in range(5)]
            marks += [Mark("text", "label", text=f"d{n}", x=40.0 * n, y=y + 80, font="label", size=14.0) for n in range(9)]
            marks += [Mark("rect", "glyph", op=f"op{row}", x=700.0, y=y, w=30.0, h=50.0, fill="ink")]
        return Scene("", "", "", 800.0, 100.0 * rows, tuple(marks))

    short, long = calls(look, scene(40)), calls(look, scene(40 * MORE))
    assert long < 1.2 * MORE * short
    assert look(scene(3)).crossings == 3 * 10


def test_large_calls_are_tested_on_few_numbers():
    """Another axis of a large array need not be there in full to test one."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") == "einsum":
                seen.append(result.numel())
            return result

    class Outer(nn.Module):
        def forward(self, x, y):
            return torch.einsum("bid,bjd->bijd", x, y)

    x, y = torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    circuit = cl.trace(Outer(), x, y)
    with Watch():
        report = circuit.verify(Outer(), x, y)
    assert report.ok
    assert {claim.wire for claim in report.held} >= set(circuit.wires)
    whole = 2 * 64**3
    assert seen
    assert sum(numbers == whole for numbers in seen) <= 3
