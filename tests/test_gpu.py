"""On a GPU: the same wires, claims, statistics and curves as on a processor, and memory as the allocator counts it."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from tests.test_cost import models
from tests.test_experts import SPARSE, found, parts
from tests.zoo import ZOO
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import circuitlab as cl
from circuitlab.analysis.experts import _grouped

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def on_gpu(model, args, kwargs=None):
    """A copy there, and the inputs; what is one tensor here is one there."""
    known = {}
    return copy.deepcopy(model).cuda(), *tree_map_only(torch.Tensor, lambda t: known.setdefault(id(t), t.cuda()), (args, kwargs or {}))


@pytest.mark.parametrize("name", [name for name in ZOO if "quantised" not in name])  # torch's quantised kernels crash there
def test_a_circuit_is_the_same_and_true_there(name):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    here = cl.trace(copy.deepcopy(model), *args, **kwargs)
    try:
        model, args, kwargs = on_gpu(model, args, kwargs)
        copy.deepcopy(model)(*args, **kwargs)
    except Exception as error:
        pytest.skip(f"it does not run on a GPU by itself: {error}")
    drawn = torch.cuda.get_rng_state()
    there = cl.trace(model, *args, **kwargs)
    report = there.verify(model, *args, **kwargs)
    assert torch.equal(drawn, torch.cuda.get_rng_state())
    assert report.ok, report
    assert [op.name for op in there.opaque] == [op.name for op in here.opaque]
    assert {t.name: t.dims for t in there.tensors} == {t.name: t.dims for t in here.tensors}


class Allocated(TorchDispatchMode):
    """What the allocator has given away after each op: what a kernel took for itself while it ran is back by then."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.most = max(self.most, torch.cuda.memory_allocated())
        return result


def test_a_live_trace_keeps_nothing_and_holds_no_more_than_the_model():
    model, (x,), _ = on_gpu(nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.ReLU())]), (torch.randn(4096, 512),))
    with torch.no_grad():
        model(x)
    peaks = []
    for run in (lambda: model(x), lambda: cl.trace(model, x, device="live")):
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            kept = run()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if isinstance(kept, torch.Tensor):
            del kept
        gc.collect()
        assert torch.cuda.memory_allocated() == before
    assert peaks[1] <= 1.01 * (peaks[0] + x.nbytes)  # a copy of the input: the model might write into it


@pytest.mark.parametrize(("name", "model", "args", "kwargs"), [pytest.param(*case, id=case[0]) for case in models(8)])
def test_the_peak_of_live_memory_is_the_allocators_within_a_fifth(name, model, args, kwargs):
    model, args, kwargs = on_gpu(model, args, kwargs)
    costs = cl.trace(model, *args, **kwargs).cost()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*args, **kwargs)  # libraries take their workspaces
        gc.collect()
        before, allocated = torch.cuda.memory_allocated(), Allocated()
        with allocated:
            model(*args, **kwargs)
    held = allocated.most - before
    mine = costs.live[0] - sum(tensor.nbytes for tensor in (*args, *kwargs.values()) if isinstance(tensor, torch.Tensor))
    assert 0.8 * held <= mine <= 1.2 * held


def test_counts_of_neurons_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).double()
    batches = [torch.randn(9001, 16).double() for _ in range(3)]  # counts that bfloat16 does not hold
    here = next(iter(cl.observe(model, batches, progress=False).values()))
    there = next(iter(cl.observe(copy.deepcopy(model).cuda(), batches, progress=False).values()))
    assert torch.equal(here.cofiring, there.cofiring)
    assert torch.equal(here.firing, there.firing)
    torch.testing.assert_close(here.mean, there.mean)
    assert (cl.partition(here, controls=0).labels == cl.partition(there, controls=0).labels).all()


@pytest.mark.parametrize("name", SPARSE)
def test_chosen_experts_are_those_of_the_processor(name):
    model, x = found(name)
    model, x = model.double(), x.double()
    sparse = cl.to_moe(model, parts(model, x), top_k=2)
    there, (y,), _ = on_gpu(sparse, (x,))
    torch.testing.assert_close(there(y).cpu(), sparse(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [64, 60])  # 60 is no multiple of 16 bytes
def test_groups_of_bfloat16_are_multiplied_one_by_one_or_at_once(size):
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 300, 1, 78], device="cuda")
    rows, weight = torch.randn(384, 48, device="cuda").bfloat16(), torch.randn(5, 48, size, device="cuda").bfloat16()
    want = torch.cat([part.double() @ weight[e].double() for e, part in enumerate(rows.split(counts.tolist()))])
    torch.testing.assert_close(_grouped(rows, weight, counts.cumsum(0).int()).double(), want, rtol=1e-2, atol=1e-2 * float(want.std()))


def trained(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def test_landscapes_are_the_same():
    a, b, c = (trained(seed) for seed in range(3))
    torch.manual_seed(9)
    batches = [(torch.randn(20, 6).double(), torch.randint(0, 3, (20,))) for _ in range(2)]

    def all_of(a, b, c):
        options = {"progress": False}
        yield torch.as_tensor(cl.interpolate(a, b, batches, "cross_entropy", 9, **options).of())
        yield torch.as_tensor(cl.plane(a, b, c, batches, "cross_entropy", **options).of())
        yield torch.as_tensor(cl.curve(a, b, batches, "cross_entropy", steps=20, **options).loss)
        yield torch.as_tensor(cl.ridge(a, b, batches, "cross_entropy", **options).total)
        matched = cl.match(a, b, batches[0][0].to(next(a.parameters()).device))
        yield torch.as_tensor(cl.interpolate(a, matched.apply(b), batches, "cross_entropy", 5, **options).of())

    there = [copy.deepcopy(model).cuda() for model in (a, b, c)]
    for number, (one, other) in enumerate(zip(all_of(a, b, c), all_of(*there), strict=True)):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-9, msg=lambda text, n=number: f"{n}: {text}")


def test_code_runs_there_and_models_stay():
    model, args, kwargs = on_gpu(*ZOO["gallery_gpt"]())
    circuit = cl.trace(model, *args, **kwargs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.testing.assert_close(circuit.to_torch(model)(*args, **kwargs), model(*args, **kwargs))
    circuit.permute(model, circuit.symmetry().random())
    assert all(torch.equal(tensor, before[key]) and tensor.is_cuda for key, tensor in model.state_dict().items())
