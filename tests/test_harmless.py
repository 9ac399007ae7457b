"""Bad input gets a clear error and harms nothing; looking at a model never changes it."""

import functools
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.errors import TraceError


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.good = nn.Linear(4, 4)
        self.bad = nn.Linear(5, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        torch.rand(3)
        return self.bad(self.good(x))


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()],
        torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(),
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_error_names_module_line_and_carries_the_partial_circuit():
    model = Breaks()
    before = snapshot(model)
    with pytest.raises(TraceError, match=r"Breaks.forward raised RuntimeError in module 'bad'.*test_harmless.py") as info:
        cl.trace(model, torch.zeros(2, 4))
    assert info.value.module == "bad"
    assert "test_harmless.py:" in info.value.source
    assert [op.fn for op in info.value.circuit.ops if op.kind == "linear"] == ["linear"]
    assert info.value.circuit.svg().startswith("<svg")
    assert same(snapshot(model), before)


@pytest.mark.parametrize("device", ["meta", "live"])
def test_nothing_changes_also_under_dropout_and_buffers(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model(torch.randn(3, 4)).sum().backward()
    model[1].eval()
    before = snapshot(model)
    x = torch.randn(3, 4)
    before = snapshot(model)
    circuit = cl.trace(model, x, device=device)
    circuit.verify(model, x)
    assert same(snapshot(model), before)


def test_interrupt_passes_through_and_leaves_no_hook():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    before = len(nn.modules.module._global_forward_hooks)
    with pytest.raises(KeyboardInterrupt):
        cl.trace(Interrupted(), torch.zeros(2))
    assert len(nn.modules.module._global_forward_hooks) == before
    assert type(torch.zeros(2) + 1) is torch.Tensor


def test_activations_are_not_kept_alive():
    kept = []

    class Watched(nn.Module):
        def forward(self, x):
            y = x * 2
            kept.append(weakref.ref(y))
            return y.sum()

    circuit = cl.trace(Watched(), torch.zeros(3), device="live")
    gc.collect()
    assert circuit.ops
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize(("make", "args", "message"), [
    (lambda: nn.Linear, (torch.zeros(1),), "an instance"),
    (lambda: 3, (), "torch.nn.Module"),
    (lambda: nn.Linear(2, 2), ("text",), "no tensor among the inputs"),
    (lambda: nn.Linear(2, 2), (torch.zeros(1, 3),), r"inputs were: input \[1, 3\]"),
    (lambda: torch.jit.script(nn.Linear(2, 2)), (torch.zeros(1, 2),), "scripted"),
    (lambda: nn.Linear(2, 2), (torch.zeros(1, 2).to_sparse(),), "is a sparse tensor.*to_dense"),
    (lambda: nn.Linear(2, 2), (torch.nested.nested_tensor([torch.zeros(1, 2)]),), "is a nested tensor.*to_padded_tensor"),
    (lambda: nn.LazyLinear(3), (torch.zeros(1, 2),), "run the module once"),
])
def test_wrong_inputs_say_what_to_do(make, args, message):
    with pytest.raises(cl.CircuitlabError, match=message):
        cl.trace(make(), *args)


def test_meta_is_refused_where_values_are_needed_and_auto_goes_live():
    class Branches(nn.Module):
        def forward(self, x):
            return x.relu() if x.sum() > 0 else x.tanh()

    assert cl.trace(Branches(), torch.ones(2)).device == "live"
    with pytest.raises(TraceError, match="live"):
        cl.trace(Branches(), torch.ones(2), device="meta")
    with pytest.raises(cl.CircuitlabError, match="device"):
        cl.trace(Branches(), torch.ones(2), device="gpu")


def test_misspelled_arguments_are_errors():
    circuit = cl.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError):
        circuit.svg(dept=2)
    with pytest.raises(cl.CircuitlabError, match="theme"):
        circuit.svg(theme="neon")
    with pytest.raises(cl.CircuitlabError, match="no block"):
        circuit["layer"]
    with pytest.raises(cl.CircuitlabError, match="negative"):
        circuit.svg(depth=-1)
    with pytest.raises(cl.CircuitlabError, match="overlay"):
        circuit.svg(overlay={"nothing": 1.0})


def test_a_model_on_meta_is_traced_and_not_verified():
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    circuit = cl.trace(model, torch.zeros(2, 3, device="meta"))
    assert circuit.device == "meta"
    with pytest.raises(cl.CircuitlabError, match="meta device"):
        circuit.verify(model, torch.zeros(2, 3))


def test_unknown_operations_are_opaque_and_claim_nothing():
    class Model(nn.Module):
        def forward(self, x):
            return torch.from_numpy(np.sort(x.numpy(), axis=0)) * 2

    circuit = cl.trace(Model(), torch.randn(3, 4))
    (op,) = circuit.opaque
    assert not any(axis.passes for axis in op.axes)
    assert "hatch" in circuit.svg()


_TABLES: dict[int, torch.Tensor] = {}


@functools.cache
def _angles(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    steps = torch.arange(size, device=device) / size
    return steps.cos(), steps.sin()


class Remembers(torch.nn.Module):
    """Keeps what it computed outside of itself; with ``values`` it does not run on meta."""

    def __init__(self, values: bool):
        super().__init__()
        self.values = values

    def forward(self, x):
        if x.shape[-1] not in _TABLES:
            _TABLES[x.shape[-1]] = torch.ones(x.shape[-1], device=x.device)
        cos, sin = _angles(x.shape[-1], x.device)
        y = x * cos + x * sin + _TABLES[x.shape[-1]]
        return y if not self.values or y.sum().item() > 0 else -y


@pytest.mark.parametrize("values", [False, True])
def test_what_is_cached_outside_of_the_module_is_not_of_the_run(values):
    _TABLES.clear()
    _angles.cache_clear()
    model, x = Remembers(values), torch.randn(2, 4)
    first = cl.trace(model, x)
    assert first.device == ("live" if values else "meta") and not first.opaque
    expected = model(x)
    again = cl.trace(model, x, device="auto")
    assert torch.equal(model(x), expected)
    if not values:
        assert not again.opaque and any(tensor.kind == "constant" for tensor in again.tensors)
        assert again.verify(model, x).ok


def test_functions_of_torch_that_another_tool_has_wrapped_are_seen(monkeypatch):
    """Tracers and profilers put their own functions in the place of torch's, some for the rest of the process."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).eval()
    x = torch.randn(2, 3, 5, 5)
    plain = cl.trace(model, x)

    def wrapped(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    places = [(torch, "conv2d"), (torch, "flatten"), (torch.Tensor, "__deepcopy__"), (torch.Tensor, "__getitem__")]
    places += [(torch.nn.functional, name) for name in ("conv2d", "linear", "relu", "batch_norm")]
    for owner, name in places:
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    seen = cl.trace(model, x)
    assert plain.symmetry().wires
    assert seen.tensors == plain.tensors
    assert [(op.name, op.kind, op.axes) for op in seen.ops] == [(op.name, op.kind, op.axes) for op in plain.ops]
    assert seen.symmetry().wires == plain.symmetry().wires
    assert seen.verify(model, x).ok
    assert seen.to_torch(model).code == plain.to_torch(model).code


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


THIRD = net()
ANALYSES = {
    "match": lambda a, b, batches: cl.match(a, b, method="activations", batches=batches, progress=False),
    "straight-through": lambda a, b, batches: cl.match(a, b, method="straight-through", batches=batches, loss="cross_entropy", steps=3, progress=False),
    "interpolate": lambda a, b, batches: cl.interpolate(a, b, batches, "cross_entropy", points=3, progress=False),
    "repair": lambda a, b, batches: cl.interpolate(a, b, batches, "cross_entropy", points=3, correct="repair", progress=False),
    "plane": lambda a, b, batches: cl.plane(a, b, THIRD, batches, "cross_entropy", grid=(2, 2), progress=False),
    "curve": lambda a, b, batches: cl.curve(a, b, batches, "cross_entropy", steps=2, points=2, progress=False),
    "ridge": lambda a, b, batches: cl.ridge(a, b, batches, "cross_entropy", points=5, progress=False),
    "observe": lambda a, b, batches: cl.observe(a, batches, progress=False),
    "stitch": lambda a, b, batches: cl.stitch(a, b, "1", "1", batches, loss="cross_entropy", progress=False),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_leave_random_state_also_when_a_loader_draws(name):
    a, b = net(), net()
    loader = torch.utils.data.DataLoader([(torch.randn(6), n % 3) for n in range(8)], 4, shuffle=True)
    before = snapshot(a), snapshot(b)
    ANALYSES[name](a, b, loader)
    assert same((snapshot(a), snapshot(b)), before)


@pytest.mark.parametrize("name", ANALYSES)
def test_a_batch_that_does_not_fit_is_told(name):
    a, b = net(), net()
    good, bad = (torch.randn(5, 6), torch.arange(5) % 3), (torch.randn(5, 4), torch.arange(5) % 3)
    before = snapshot(a), snapshot(b)
    with pytest.raises(cl.CircuitlabError, match=r"does not run on a batch: .*\nthe batch is a tuple of \S+ \[5, 4\] float"):
        ANALYSES[name](a, b, [good, bad])
    assert same((snapshot(a), snapshot(b)), before)
