"""Whatever is done with a model, and however it ends: nothing of it, of its inputs or of torch's global state changes."""

import gc
import linecache
import random
import sys
import threading
import weakref
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import circuitlab as cl


class Stateful(nn.Module):
    """Keeps state in every way that a module can, and draws from every source of chance."""

    def __init__(self, fails=None):
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.down = nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(()))
        self.cache, self.table, self.steps = [torch.ones(2)], {"seen": torch.zeros(3), "deep": [{"x": 0}]}, 0
        self.last = None
        self.own = torch.Generator().manual_seed(1)
        self.numbers, self.coins = np.random.default_rng(0), random.Random(0)
        self.array = np.zeros(3)
        self.lock = threading.Lock()
        self.weights = [self.up.weight, self.down.weight]
        self.fails = fails

    def forward(self, x):
        with self.lock:
            self.count += 1
            self.steps += 1
            self.array[0] += 1
            self.table["seen"][0] += 1
            self.table["deep"][0]["x"] += 1
        noise = random.random() + np.random.rand() + self.coins.random() + float(self.numbers.random())
        y = self.drop(self.norm(x @ self.weights[0].T + self.up.bias)).relu() + torch.rand(8, dtype=x.dtype) + torch.rand(8, generator=self.own, dtype=x.dtype)
        self.cache.append(y)
        self.last = y
        if self.fails:
            raise self.fails("midway")
        return self.down(y) + noise


def plain(value, seen=()):
    """Everything within a value that can be compared; of modules, their whole ``__dict__``."""
    if id(value) in seen:
        return "..."
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        bytes_ = value.detach().clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        grad = None if value.grad_fn is not None or value.grad is None else plain(value.grad, seen)
        return (id(value), tuple(value.shape), str(value.dtype), value.requires_grad, value._version, bytes_, grad)
    if isinstance(value, np.ndarray):
        return (id(value), value.tobytes())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, dict):
        return [(str(key), plain(item, seen)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [plain(item, seen) for item in value]
    if isinstance(value, nn.Module):
        return (id(value), plain(vars(value), seen))
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if hasattr(value, "__dict__") and not callable(value):
        return (id(value), plain(vars(value), seen))
    return id(value)


def world():
    """torch's, NumPy's and Python's global state."""
    hooks = nn.modules.module
    return {
        "cpu": torch.get_rng_state().tolist(), "numpy": str(np.random.get_state()), "python": random.getstate(),
        "cuda": [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"), "autocast cache": torch.is_autocast_cache_enabled(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "anomaly": torch.is_anomaly_enabled(), "threads": torch.get_num_threads(), "functions": _len_torch_function_stack(),
        "dispatch": len(_get_current_dispatch_mode_stack()),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "fast path": torch.backends.mha.get_fastpath_enabled(), "matmul": torch.get_float32_matmul_precision(),
        "hooks": [len(h) for h in (hooks._global_forward_hooks, hooks._global_forward_pre_hooks, hooks._global_backward_hooks,
                                   hooks._global_parameter_registration_hooks, hooks._global_module_registration_hooks)],
        "python's": (gc.isenabled(), sys.gettrace(), sys.getprofile(), sys.getrecursionlimit(), threading.active_count()),
    }


@contextmanager
def unchanged(*things):
    before, around = [plain(thing) for thing in things], world()
    yield
    for thing, was in zip(things, before, strict=True):
        assert plain(thing) == was
    now = world()
    assert {key: (around[key], now[key]) for key in now if now[key] != around[key]} == {}


def stateful(fails=None):
    torch.manual_seed(0)
    model = Stateful()
    model(torch.randn(5, 4)).sum().backward()
    model.norm.eval()
    model.up.bias.requires_grad_(False)
    model.fails = fails
    return model, torch.randn(5, 4)


def everything(model, *args, device="auto", **kwargs):
    """All that can be done with a model."""
    circuit = cl.trace(model, *args, device=device, **kwargs)
    report = circuit.verify(model, *args, **kwargs)
    assert report.ok, report
    circuit.permute(model, circuit.symmetry().random())
    try:
        circuit.to_torch(model)
    except cl.CircuitlabError as error:
        assert "to_torch" in str(error)
    return circuit


@pytest.mark.parametrize("device", ["meta", "live"])
def test_state_of_every_kind_stays(device):
    model, x = stateful()
    x.requires_grad_()
    x.sum().backward()
    with unchanged(model, x):
        everything(model, x, device=device)


def set_to(setter, value, back):
    @contextmanager
    def during():
        setter(value)
        try:
            yield
        finally:
            setter(back)

    return during


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", [
    torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16), Functions, Dispatches,
    lambda: torch.device("cpu"), set_to(torch.set_default_dtype, torch.float64, torch.float32),
    set_to(torch.use_deterministic_algorithms, True, False), set_to(torch.autograd.set_detect_anomaly, True, False),
    set_to(lambda on: gc.enable() if on else gc.disable(), False, True),
], ids="no_grad inference enable_grad autocast functions dispatches device float64 deterministic anomaly uncollected".split())
@pytest.mark.parametrize("device", ["meta", "live"])
def test_surroundings_stay_and_do_not_matter(around, device):
    model, x = stateful()
    expected = cl.trace(model, x, device=device)
    with around(), unchanged(model, x):
        circuit = everything(model, x, device=device)
        assert [op.fn for op in circuit.ops] == [op.fn for op in expected.ops]
        assert {name: (w.size, w.permutable) for name, w in circuit.wires.items()} == {
            name: (w.size, w.permutable) for name, w in expected.wires.items()}


@pytest.mark.parametrize("device", ["auto", "meta", "live"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_failure_midway_changes_nothing(failure, device):
    model, x = stateful()
    circuit = cl.trace(model, x)
    model.fails = failure
    expected = cl.CircuitlabError if issubclass(failure, Exception) else failure
    with unchanged(model, x):
        with pytest.raises(expected):
            cl.trace(model, x, device=device)
        with pytest.raises(expected):
            circuit.verify(model, x)
    assert type(torch.zeros(2) + 1) is torch.Tensor


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_late_in_verify_changes_nothing(failure):
    """The run of the permuted copy is interrupted."""

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
            self.usual = self.up.weight.detach().double().clone()

        def forward(self, x):
            y = self.up(x)
            with torch._C.DisableTorchFunction():
                moved = not torch.equal(self.up.weight.double(), self.usual)
            if moved:
                raise failure("permuted")
            return self.down(y)

    model, x = Later(), torch.randn(2, 4)
    circuit = cl.trace(model, x, device="live")
    with unchanged(model, x):
        if failure is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                circuit.verify(model, x)
        else:
            assert [claim.kind for claim in circuit.verify(model, x).failed] == ["permutable"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_weights_of_every_precision_stay(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x = torch.randn(5, 4).to(dtype)
    with unchanged(model, x):
        circuit = everything(model, x)
    assert any(wire.permutable for wire in circuit.wires.values())


def test_hooks_of_the_model_run_on_the_copy_and_stay():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(5, 4)
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[1].register_full_backward_hook(lambda module, grads, others: None)
    model[2].register_forward_hook(lambda module, args, out: out, always_call=True)
    model.register_state_dict_pre_hook(lambda *args: None)
    with unchanged(model, x):
        circuit = everything(model, x)
    assert {"mul", "add"} <= {op.fn for op in circuit.ops}


def test_caches_given_as_inputs_stay():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 20, (1, 4))
    cache = model(tokens, use_cache=True).past_key_values
    length = cache.get_seq_length()
    with unchanged(model, tokens, cache):
        cl.trace(model, tokens[:, :2], past_key_values=cache, use_cache=True, attention_mask=torch.ones(1, 6))
    assert cache.get_seq_length() == length


def test_what_can_be_read_only_once_is_an_error_and_is_not_read():
    class Reads(nn.Module):
        def __init__(self, source=None):
            super().__init__()
            self.source = source

        def forward(self, x, more=()):
            return sum((next(self.source) if self.source else x, *more), x)

    x, stream = torch.zeros(2), (torch.ones(2) for _ in range(3))
    with pytest.raises(cl.CircuitlabError, match=r"inputs\[1\] is a generator.*put a list"):
        cl.trace(Reads(), x, stream)
    with pytest.raises(cl.CircuitlabError, match=r"Reads.source is a generator"):
        cl.trace(Reads(stream), x)
    assert len(list(stream)) == 3


def test_what_cannot_be_copied_is_not_run_in_its_place():
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    with pytest.raises(cl.CircuitlabError, match=r"Sequential\._modules\['0'\]|Sequential\.0"):
        cl.trace(nn.Sequential(Single(2, 2)), torch.zeros(1, 2))
    with pytest.raises(cl.CircuitlabError, match=r"Single \(Single\) cannot be copied"):
        cl.trace(Single(2, 2), torch.zeros(1, 2))


def test_a_generator_of_chance_given_as_input_stays():
    class Noisy(nn.Module):
        def forward(self, x, generator):
            return x + torch.rand(3, generator=generator)

    x, generator = torch.zeros(2, 3), torch.Generator().manual_seed(3)
    with unchanged(generator, x):
        everything(Noisy(), x, generator)


# nothing is kept ------------------------------------------------------------------------------------------------


SEEN = []


class Watched(nn.Module):
    """Tells of every activation, and keeps one as an attribute, one in a list."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.fails, self.kept = nn.Linear(4, 8), nn.Linear(8, 3), False, []

    def forward(self, x):
        self.first = self.up(x)
        y = self.first.relu()
        self.kept.append(y)
        SEEN.extend([weakref.ref(self.first), weakref.ref(y)])
        if self.fails:
            raise ValueError("midway")
        return self.down(y)


@pytest.mark.parametrize("device", ["meta", "live"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_activation_is_kept_alive(device, fails):
    SEEN.clear()
    model, x = Watched(), torch.randn(2, 4)
    circuit = cl.trace(model, x, device=device)
    model.fails = fails
    with pytest.raises(cl.CircuitlabError) if fails else nullcontext():
        circuit = cl.trace(model, x, device=device)
    with pytest.raises(cl.CircuitlabError) if fails else nullcontext():
        report = circuit.verify(model, x)
    assert len(SEEN) > 4
    gc.collect()
    assert [ref for ref in SEEN if ref() is not None] == []
    assert model.kept == []
    assert not hasattr(model, "first")
    assert circuit.ops
    if not fails:
        assert report.ok


def test_inputs_and_models_are_not_kept_alive():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)
    circuit = everything(model, x, device="live")
    refs = [weakref.ref(thing) for thing in (model, x, model[0].weight)]
    del model, x
    gc.collect()
    assert [ref() for ref in refs] == [None, None, None]
    assert circuit.ops


def grown(action, times):
    """How many more memory blocks Python holds, and bytes the process, after doing something many times."""

    def now():
        gc.collect()
        with open("/proc/self/statm") as file:
            return sys.getallocatedblocks(), int(file.read().split()[1]) * 4096

    for _ in range(20):
        action()
    blocks, size = now()
    for _ in range(times):
        action()
    after, wide = now()
    return after - blocks, wide - size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("device", ["meta", "live"])
def test_two_hundred_traces_do_not_grow_memory(device):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), torch.randn(2, 4)
    blocks, size = grown(lambda: cl.trace(model, x, device=device), 200)
    assert blocks < 2000
    assert size < 8 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("what", ["verify", "permute", "to_torch", "failure"])
def test_repeating_anything_does_not_grow_memory(what):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), torch.randn(2, 4)
    circuit = cl.trace(model, x)

    def fail():
        with pytest.raises(cl.CircuitlabError):
            cl.trace(model, torch.randn(2, 5))

    action = {
        "verify": lambda: circuit.verify(model, x), "permute": lambda: circuit.permute(model, circuit.symmetry().random()),
        "to_torch": lambda: circuit.to_torch(model)(x), "failure": fail,
    }[what]
    blocks, size = grown(action, 60)
    assert blocks < 1200
    assert size < 8 << 20


def test_compiled_code_is_forgotten_with_its_module():
    model, x = nn.Linear(4, 8), torch.randn(2, 4)
    circuit = cl.trace(model, x)
    before = len(linecache.cache)
    compiled = [circuit.to_torch(model) for _ in range(5)]
    assert len(linecache.cache) == before + 5  # tracebacks show its lines
    del compiled
    gc.collect()
    assert len(linecache.cache) == before


def test_no_activations_wait_for_the_garbage_collector():
    """On a GPU they would fill it: it is only collected when many Python objects were made."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 61), nn.ReLU(), nn.Linear(61, 3)) for _ in range(2))
    batches = [(torch.randn(7, 4), torch.randint(0, 3, (7,))) for _ in range(3)]
    inputs = [x for x, _ in batches]
    wire, stats = next(iter(cl.observe(a, batches, progress=False).items()))
    part = cl.partition(stats, "random", k=61, controls=0)
    options = {"loss": "cross_entropy", "progress": False}
    runs = {
        "trace": lambda: cl.trace(a, inputs[0], device="live"),
        "verify": lambda: cl.trace(a, inputs[0]).verify(a, inputs[0]),
        "observe": lambda: cl.observe(a, batches, progress=False, sample=0),
        "expert_curve": lambda: cl.expert_curve(a, {wire: part}, batches, **options),
        "match": lambda: cl.match(a, b, method="activations", batches=inputs, progress=False),
        "interpolate": lambda: cl.interpolate(a, b, batches, points=3, correct="repair", **options),
        "curve": lambda: cl.curve(a, b, batches, steps=2, points=3, **options),
        "ridge": lambda: cl.ridge(a, b, batches, points=5, **options),
        "stitch": lambda: cl.stitch(a, b, "0", "0", inputs, progress=False),
    }
    gc.collect()
    gc.disable()
    try:
        for name, run in runs.items():
            run()
            left = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and not thing.is_nested and thing.shape == (7, 61)]
            assert not left, name
    finally:
        gc.enable()
