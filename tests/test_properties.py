"""Laws on random programs: one size per wire, every claim holds on numbers, JSON round trips, drawings without faults.

A program is a chain of a few tensor operations, some in place, some with parameters, chosen by a seed.
"""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import circuitlab as cl
from circuitlab.diagram.check import look
from circuitlab.diagram.layout import draw

CROSSING = {"unflatten", "flatten", "mul"}  # reshapes that cut across wires are opaque, and what then does not fit


def written(x, axis):
    y = x.clone()
    y.select(axis, 0).mul_(2)
    return y


def masked(x):
    y = x.clone()
    y[y > 0.3] = 0.5
    return y


def row_copied(x):
    y = x.clone()
    y[0] = y[-1]
    return y


def choices(rng, x, program):
    """What can be done to an array."""
    found = [lambda: F.gelu(x), lambda: x + 1, lambda: x * x, lambda: program.added(x)]
    if not x.ndim:
        return found
    axis = rng.randrange(x.ndim)
    size = x.shape[axis]
    order = rng.sample(range(x.ndim), x.ndim)
    found += [
        lambda: program.mapped(x), lambda: program.mapped(x), lambda: program.scaled(x), lambda: written(x, axis),
        lambda: masked(x), lambda: row_copied(x), lambda: x.permute(order), lambda: x.unsqueeze(axis), lambda: x.squeeze(),
        lambda: torch.cat([x, x * 2], axis), lambda: torch.stack([x, -x], axis), lambda: x.repeat_interleave(2, axis),
        lambda: F.pad(x, (1, 1)), lambda: x[torch.tensor([0, 0])], lambda: torch.where(x > 0, x, -x),
        lambda: x.select(axis, 0), lambda: x[..., ::2], lambda: x.expand(2, *x.shape), lambda: x.softmax(axis),
        lambda: x.sum(axis), lambda: x.amax(axis), lambda: x.cumsum(axis), lambda: x.flip(axis), lambda: x.sort(axis).values,
        lambda: x.gather(0, torch.zeros_like(x).long()), lambda: x.norm(dim=axis), lambda: x.roll(1, axis),
    ]
    if x.ndim > 1:
        found += [
            lambda: x.flatten(0, 1), lambda: x @ x.transpose(-1, -2), lambda: F.layer_norm(x, x.shape[-1:]),
            lambda: torch.einsum("...ij,...kj->...ik", x, x), lambda: x - x.mean(-1, keepdim=True), lambda: x.tril(),
            lambda: x.diagonal(), lambda: x.movedim(0, -1), lambda: x.max(axis).values,
        ]
    for part in (2, 3):
        if size % part == 0 and size > part:
            found += [
                lambda part=part: x.unflatten(axis, (part, size // part)),
                lambda part=part: torch.cat(x.chunk(part, axis)[::-1], axis),
                lambda part=part: x.chunk(part, axis)[0] * x.chunk(part, axis)[-1],
                lambda: x.narrow(axis, 0, size - 1),
            ]
    return found


class Program(nn.Module):
    """The program of a seed; its parameters are made in its first run."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        self.maps, self.scales = nn.ModuleList(), nn.ParameterList()

    def mapped(self, x):
        width = self.rng.choice([2, 3, 4, 6])
        if self.used[0] == len(self.maps):
            self.maps.append(nn.Linear(x.shape[-1], width))
        self.used[0] += 1
        return self.maps[self.used[0] - 1](x)

    def scaled(self, x):
        if self.used[1] == len(self.scales):
            self.scales.append(nn.Parameter(torch.randn(x.shape[-1])))
        self.used[1] += 1
        return x * self.scales[self.used[1] - 1]

    def added(self, x):
        other = self.rng.choice(self.past)
        return x + other if other.shape == x.shape else x

    def forward(self, x):
        self.rng, self.used, self.past = random.Random(self.seed), [0, 0], [x]
        for _ in range(self.rng.randrange(3, 9)):
            if x.numel() > 2000 or x.ndim > 4:
                x = x.flatten()[:24]
            x = self.rng.choice(choices(self.rng, x, self))()
            self.past.append(x)
        self.past = []
        return x


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3))
def test_laws_on_random_programs(seed, sizes):
    torch.manual_seed(seed)
    x, model = torch.randn(sizes), Program(seed)
    model(x)
    circuit = cl.trace(model, x)
    for tensor in circuit.tensors:
        for size, dim in zip(tensor.shape, tensor.dims, strict=True):
            product = 1
            for name in dim:
                product *= circuit.wires[name].size
            assert product == size
    report = circuit.verify(model, x)
    assert report.ok, report
    assert {op.fn for op in circuit.opaque} <= CROSSING
    assert type(circuit).from_json(circuit.to_json()) == circuit
    for depth in (0, 1):
        found = look(draw(circuit, depth=depth))
        assert not found.through
        assert not found.outside
        assert not found.struck


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_permuting_a_permutable_wire_keeps_the_outputs(seed):
    torch.manual_seed(seed)
    x, model = torch.randn(3, 4, dtype=torch.float64), Program(seed)
    model(x.float())
    model.double()
    circuit = cl.trace(model, x)
    free = {w.name: torch.randperm(w.size) for w in circuit.wires.values() if w.permutable}
    before, after = model(x), circuit.permute(model, free)(x)
    assert torch.allclose(before, after, rtol=1e-9, atol=1e-9, equal_nan=True)


class Pieces(nn.Module):
    """Arrays of positions (2, n, 3) that are cut, put together, shifted and added, as the seed says."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def made(self, rng, past):
        x = rng.choice(past)
        n = x.shape[1]
        first = rng.randrange(n)
        same = [other for other in past if other.shape == x.shape]
        moved = x.clone()
        moved[:, : n - 1].copy_(x[:, 1:])
        return rng.choice([
            lambda: x[:, first : rng.randint(first + 1, n)], lambda: x[:, first : rng.randint(first + 1, n)],
            lambda: torch.cat([x, rng.choice(past)], 1), lambda: torch.cat([x[:, :1], x[:, :-1]], 1), lambda: moved,
            lambda: x * 1.5 + rng.choice(same), lambda: x * 1.5 + rng.choice(same), lambda: F.pad(x, (0, 0, rng.randint(0, 2), rng.randint(0, 2))),
            lambda: x.flip(1), lambda: x.roll(1, 1), lambda: x.chunk(2, 1)[-1], lambda: torch.cat(x.chunk(2, 1)[::-1], 1),
        ])()

    def forward(self, x):
        rng, past, picked = random.Random(self.seed), [x], []
        for _ in range(rng.randrange(3, 12)):
            past.append(self.made(rng, past)[:, :16])
            if rng.random() < 0.2:
                picked.append(past[-1][:, rng.randrange(past[-1].shape[1])])
        return (*past[1:], *picked)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 6, 7]))
def test_pieces_of_an_axis_are_told_where_they_stand(seed, n):
    torch.manual_seed(seed)
    x, model = torch.randn(2, n, 3), Pieces(seed)
    report = cl.trace(model, x).verify(model, x)
    assert report.ok, report
