"""Circuits compiled back to code: readable, and equal in outputs and gradients, at other sizes too."""

import re
import pytest
import torch
from tests import golden
from tests.zoo import ZOO
from torch import nn

import circuitlab as cl
from circuitlab.errors import InputError
from circuitlab.gallery.gpt import GPT
from circuitlab.trace.events import tensors_in
from circuitlab.trace.record import named_inputs
from circuitlab.trace.events import mapped

DIFFERENT = {
    "residual_in_place",  # the model itself has no gradient: it writes to what backward needs
    "numbers_through_python",  # what it does depends on the inputs' sum: refused, see below
    "torch_lstm_cell",  # a Python loop over positions: as many as were traced
    "torch_unfold_fold",  # fold is told the image's size as a number
    "torch_multihead_attention",  # one tensor given three times
    "buffer_update", "counter_buffer",  # the second run of the model starts from another buffer
    "comprehension_and_zip",  # as many layers as entries: unpacked into so many names
    "sizes_used_as_numbers",  # the number of entries is added as a number
    "sequences_packed",  # the sequences' lengths are numbers
    "strides_over_more_than_the_array",  # what it reads is not in the circuit
    "relative_shift",  # a reshape across axes is told its sizes as numbers
    "dropout_train", "chance", "vmap_noise",  # random
    "per_sample_gradients", "inner_step", "jacobians", "force_field", "quantised_lstm",  # opaque
    "vmap_chunks", "vmap_trees",  # as many chunks, or copies, as were traced
    "vmap_ensemble",  # gradients end where the weights are stacked
    *(name for name in ZOO if name.startswith("flex_attention")),  # torch has no gradient on the CPU: see below
}


def arrays(value):
    return [tensor for _, tensor in tensors_in(value, torch.Tensor) if tensor.is_floating_point()]


def grown(circuit, model, args, kwargs):
    """The inputs with one more entry along each batch and position axis; None where there is none."""
    named = {id(tensor): name for name, tensor in named_inputs(model.forward, args, kwargs)}
    kinds = {"batch", "position"}
    count = 0

    def grow(tensor):
        nonlocal count
        for dim, wires in enumerate(circuit.tensor(named[id(tensor)]).dims if id(tensor) in named else ()):
            if len(wires) == 1 and circuit.wires[wires[0]].kind in kinds:
                tensor, count = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim), count + 1
        return tensor

    changed = mapped((args, kwargs), grow)
    return changed if count else None


@pytest.mark.parametrize("name", sorted(set(ZOO) - DIFFERENT))
def test_outputs_and_gradients_at_other_sizes(name):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    model.eval()
    circuit = cl.trace(model, *args, **kwargs)
    compiled = circuit.to_torch(model)
    sizes = [(args, kwargs)]
    larger = grown(circuit, model, args, kwargs)
    if larger:
        sizes.append(larger)
    for values, keywords in sizes:
        try:
            wanted = arrays(list({id(t): t for t in arrays(model(*values, **keywords))}.values()))
        except (RuntimeError, ValueError, IndexError, AssertionError):
            assert values is not args  # the model itself takes no other sizes
            continue
        found = arrays(compiled(*values, **keywords))
        assert [t.shape for t in found] == [t.shape for t in wanted]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().nan_to_num(0, 0, 0).abs().max() + 1))
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        mine, its = (
            torch.autograd.grad(sum((t**2).sum() for t in outs), learned, allow_unused=True, materialize_grads=True)
            if learned and any(t.requires_grad for t in outs) else []
            for outs in (found, wanted)
        )
        scale = max((float(g.abs().max()) for g in its), default=0.0)
        for one, other in zip(mine, its, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale + 1e-7)


@pytest.mark.parametrize("name", ["flex_attention_groups", "flex_attention_table", "flex_attention_blocks", "vmap_ensemble"])
def test_numbers_are_those_of_torch(name):
    torch.manual_seed(0)
    model, args, _ = ZOO[name]()
    with torch.no_grad():
        for one, other in zip(arrays(cl.trace(model, *args).to_torch(model)(*args)), arrays(model(*args)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "code"), golden.codes())
def test_the_code_is_worth_reading(name, code):
    """Golden code, looked at by people; `python -m tests.golden` writes it anew."""
    assert code == (golden.FOLDER / f"{name}.txt").read_text()
    assert max(map(len, code.splitlines())) < 130


def test_parameters_are_shared_under_their_names():
    model = GPT()
    compiled = cl.trace(model, torch.zeros(2, 16, dtype=torch.long)).to_torch(model)
    theirs, own = dict(model.named_parameters()), dict(compiled.named_parameters())
    assert own.keys() == theirs.keys()
    assert all(own[name] is theirs[name] for name in own)
    compiled.eval()
    assert model.training


def test_a_part_of_a_circuit_takes_its_inputs_in_order():
    model = GPT().eval()
    circuit = cl.trace(model, torch.zeros(2, 16, dtype=torch.long))
    part = circuit["blocks.0"]
    block = part.to_torch(model)
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(block(x), model.blocks[0](x))
    assert len(re.findall(r"^def ", block.code, re.MULTILINE)) == len(re.findall(r"^def ", circuit.to_torch(model).code, re.MULTILINE)) - 1


class Steered(nn.Module):
    def forward(self, x):
        return x * 2 if (x > 0).any() else x - 1


def test_other_numbers_that_steer_python_are_refused():
    model = Steered()
    compiled = cl.trace(model, torch.ones(3)).to_torch(model)
    assert torch.equal(compiled(torch.ones(3)), 2 * torch.ones(3))
    with pytest.raises(ValueError, match="branched on True, and these inputs give False"):
        compiled(-torch.ones(3))


class Numpy(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(x.detach().numpy() * 2)


def test_what_cannot_be_written_is_named():
    model = Numpy()
    circuit = cl.trace(model, torch.ones(3))
    with pytest.raises(InputError, match=r"test_compile.py:\d+\) cannot be written as a call of torch"):
        circuit.to_torch(model)
    other = cl.trace(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="no parameter 'weight': it is not the one that was traced"):
        other.to_torch(nn.ReLU())


def test_inputs_that_do_not_fit_are_told_apart():
    model = nn.Linear(6, 3)
    compiled = cl.trace(model, torch.randn(2, 6)).to_torch(model)
    with pytest.raises(InputError, match=r"was traced with the tensors \['input'\], and is given \[\]"):
        compiled()
    with pytest.raises(InputError, match=r"traced with inputs of the shapes .*\(2, 6\).* does not run with .*\(2, 5\)"):
        compiled(torch.randn(2, 5))


def test_writes_and_casts_keep_their_meaning():
    class Writes(nn.Module):
        def forward(self, x):
            y = x.double().clone()
            y[:, 0] = 1
            y.chunk(2, dim=1)[1].mul_(3)
            torch.nn.functional.relu(y[:, 1], inplace=True)
            return y.half(), {"sum": y.sum(0), "all": (y, None, x)}

    model, x = Writes(), torch.randn(3, 4)
    circuit = cl.trace(model, x)
    assert circuit.verify(model, x).ok
    got, wanted = circuit.to_torch(model)(x), model(x)
    assert torch.equal(got[0], wanted[0])
    assert got[0].dtype == torch.half
    assert torch.equal(got[1]["sum"], wanted[1]["sum"])
    assert torch.equal(got[1]["all"][0], wanted[1]["all"][0])
    assert got[1]["all"][1] is None
    assert torch.equal(got[1]["all"][2], x)


def test_a_module_that_is_not_finite_in_float64_is_compared_as_it_is():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(4, 4)

        def forward(self, x):
            scores = self.map(x)
            seen = torch.ones(4, dtype=torch.float32)  # times the least float64 number, 0 is no number
            return scores + (1 - seen) * torch.finfo(scores.dtype).min

    model, x = Masked(), torch.randn(3, 4)
    report = cl.trace(model, x).verify(model, x)
    assert report.ok, report
    assert "compiled" in {claim.kind for claim in report.held}


def test_operators_that_write_are_said_as_those_that_do_not():
    class Masks(torch.nn.Module):
        def forward(self, x):
            a, b, n = x > 0, x < -1, (4 * x).long()
            a |= b
            a &= x < 2
            a ^= x > 1
            n <<= 2
            return x * a, n

    model, x = Masks(), torch.randn(3, 7)
    circuit = cl.trace(model, x)
    assert circuit.verify(model, x).ok
    for got, meant in zip(circuit.to_torch(model)(x), model(x), strict=True):
        assert torch.equal(got, meant)
