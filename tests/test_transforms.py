"""Code under torch.func, flex_attention and packed weights: the wires, and that nothing of the watching stays behind."""

import threading
import warnings

import pytest
import torch
from tests.zoo import ZOO
from torch import nn
from torch._functorch import eager_transforms, vmap
from torch.nn.attention import flex_attention as flex

import circuitlab as cl
from circuitlab.errors import TraceError

PATCHED = [(vmap, "_remove_batch_dim"), (eager_transforms, "grad_impl"), (eager_transforms, "_vjp_with_argnums"),
           (flex, "flex_attention_hop"), (flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG")]


def circuit_of(name, **options):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    return cl.trace(model, *args, **options, **kwargs)


class Heads(nn.Module):
    def __init__(self, mapped):
        super().__init__()
        self.q, self.k, self.v, self.mapped = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 8), mapped

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, -1)) for part in (self.q, self.k, self.v))
        if self.mapped:
            one = torch.vmap(self.one, in_dims=(1, 1, 1), out_dims=1)
            return torch.vmap(one)(q, k, v).flatten(-2)
        return self.one(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(-2)

    def one(self, q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v


@pytest.mark.parametrize("device", ["meta", "live"])
def test_a_mapped_axis_is_the_wire_that_it_is_without_vmap(device):
    mapped, plain = (cl.trace(Heads(mapped), torch.randn(3, 5, 8), device=device) for mapped in (True, False))
    assert mapped.parameters.keys() == plain.parameters.keys()
    for name, dims in mapped.parameters.items():
        assert [[w.label for w in dim] for dim in dims] == [[w.label for w in dim] for dim in plain.parameters[name]]
        assert [[w.permutable for w in dim] for dim in dims] == [[w.permutable for w in dim] for dim in plain.parameters[name]]
    (one,), (other,) = mapped.outputs, plain.outputs
    assert mapped.tensor(one).dims == plain.tensor(other).dims


def test_members_of_an_ensemble_are_a_wire_of_their_own():
    circuit = circuit_of("vmap_ensemble")
    first = next(op for op in circuit.ops if op.fn == "linear")
    stacked = circuit.tensor(first.inputs[1])
    (member,), _, _ = stacked.dims
    assert circuit.wires[member].size == 3
    assert member in {axis.wire for axis in first.axes if axis.role == "diagonal"}
    assert circuit.tensor(first.outputs[0]).dims[0] == (member,)


def test_a_derivative_reads_what_its_function_closes_over():
    for name in ("inner_step", "jacobians"):
        box = circuit_of(name).opaque[0]
        assert {"a.weight", "a.bias"} <= set(box.inputs)
    gradients = circuit_of("per_sample_gradients")
    (box,) = gradients.opaque
    assert "batch" in {axis.wire for axis in box.axes if axis.role == "broadcast"}
    force = circuit_of("force_field")
    assert len(force.opaque) == 1
    assert "x" in {*force.opaque[0].inputs}


class Closes(nn.Module):
    def forward(self, x):
        return torch.vmap(lambda row: torch.func.grad(lambda each: (each * row).sum())(row))(x)


def test_a_derivative_that_reads_around_its_arguments_is_not_run_again():
    model, x = Closes(), torch.randn(4, 6)
    report = cl.trace(model, x, device="live").verify(model, x)
    assert report.ok
    assert any("it was not given" in claim.why for claim in report.untestable)


class Largest(nn.Module):
    def forward(self, x):
        return torch.ops.circuitlab_test.scaled(x)


def test_what_depends_on_the_largest_entry_is_not_taken_for_broadcast():
    with torch.library._scoped_library("circuitlab_test", "FRAGMENT") as library:
        library.define("scaled(Tensor x) -> Tensor")
        library.impl("scaled", lambda x: x / x.abs().max(), "CPU")
        circuit = cl.trace(Largest(), torch.randn(16, 9), device="live")
        assert {axis.role for axis in circuit.opaque[0].axes} == {"normalised"}


class Raises(nn.Module):
    def forward(self, x):
        return torch.vmap(lambda row: torch.func.grad(lambda each: each.sum().view(7))(row))(x)


def test_nothing_stays_behind():
    before = [getattr(module, name) for module, name in PATCHED]
    for _ in range(2):
        with pytest.raises(TraceError, match="shape"):
            cl.trace(Raises(), torch.randn(3, 4))
    model, args, kwargs = ZOO["vmap_heads"]()
    threads = [threading.Thread(target=lambda: cl.trace(model, *args, **kwargs)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(getattr(module, name) is value for (module, name), value in zip(PATCHED, before, strict=True))
    assert torch._C._functorch.peek_interpreter_stack() is None


@pytest.mark.parametrize("device", ["meta", "live"])
def test_flex_attention_has_the_wires_of_attention(device):
    circuit = circuit_of("flex_attention_groups", device=device)
    softmax = next(op for op in circuit.ops if op.kind == "softmax")
    scores = circuit.tensor(softmax.inputs[0]).dims
    assert [[circuit.wires[name].kind for name in dim] for dim in scores][0] == ["batch"]
    assert scores[3] == scores[4] == circuit.tensor("x").dims[1]
    assert circuit.parameters["qkv.0.weight"][0][:2] == tuple(circuit.wires[name] for (name,) in scores[1:3])
    assert circuit.parameters["qkv.1.weight"][0][0].name == scores[1][0]
    plain = circuit_of("flex_attention", device=device)
    assert plain.parameters["qkv.1.weight"][0][0].permutable  # heads, which its mask does not tell apart
    assert not circuit.parameters["qkv.1.weight"][0][0].permutable


def test_packed_weights_are_named_and_have_axes():
    circuit = circuit_of("quantised_dynamic")
    first, second = (op for op in circuit.ops if op.kind == "linear")
    assert first.inputs == ("input", "0._packed_params._packed_params")
    assert circuit.tensor(first.inputs[1]).dims == (circuit.tensor(second.inputs[0]).dims[-1], circuit.tensor("input").dims[-1])
    assert first.attrs["bias"]
    assert first.attrs["dynamic"]


def test_weights_that_cannot_be_moved_are_told():
    circuit = circuit_of("wrapped_weight")
    assert "is a EightBits" in circuit.parameters["0.weight"][0][0].why


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.compile(nn.Linear(4, 4))
        self.f = torch.compile(lambda x: torch.tanh(x) * 2)

    def forward(self, x):
        return self.f(self.a(x))


def test_compiled_parts_are_traced_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        circuit = cl.trace(Inside(), torch.randn(2, 4))
    assert [op.fn for op in circuit.ops] == ["linear", "tanh", "mul"]
