"""Mixtures of experts out of dense blocks: exact, sparse, and back again."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.experts import to_moe
from circuitlab.analysis.feedforward import blocks
from circuitlab.analysis.tap import Tap
from tests.test_feedforward import FOUND, X

SPARSE = ["gated", "bilinear", "chunk", "interleaved", "unbind", "narrow", "encoder layer", "mlp", "hand-made", "conv"]


def found(name):
    torch.manual_seed(1)
    if name == "conv":
        return nn.Sequential(nn.Conv2d(6, 16, 1), nn.GELU(), nn.Conv2d(16, 6, 1)), torch.randn(3, 6, 4, 5)
    model, x, _ = FOUND[name]
    return copy.deepcopy(model), x


def parts(model, x, k=4, uneven=False):
    made = {}
    for block in list(blocks(cl.trace(model, x)).values())[:1]:
        labels = torch.arange(block.size) % k
        if uneven:
            labels[0] = labels[1] = 3
        made[block.wire] = SimpleNamespace(labels=labels[torch.randperm(block.size)].numpy(), ffn=block, k=k)
    return made


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_all_experts_are_the_dense_model(name, uneven):
    model, x = found(name)
    model, x = model.double(), x.double()
    moe = to_moe(model, parts(model, x, uneven=uneven), top_k=4)
    assert torch.allclose(moe(x), model(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("top_k", [1, 3, 0.5])
@pytest.mark.parametrize("name", SPARSE)
def test_chosen_experts_are_the_masked_dense_model(name, top_k):
    model, x = found(name)
    model, x = model.double(), x.double()
    given = parts(model, x)
    moe = to_moe(model, given, top_k=top_k)
    number = 2 if top_k == 0.5 else top_k
    inputs = {}

    def enter(wire, x):
        inputs[wire] = x

    def visit(wire, h):
        block, labels = given[wire].ffn, torch.as_tensor(given[wire].labels)
        first = block.first[0]
        keys = first.of(model.get_parameter(first.parameter))
        scores = inputs[wire] @ keys.T + (model.get_parameter(first.bias)[slice(*first.rows)] if first.bias else 0)
        mean = torch.stack([scores[..., labels == e].mean(-1) for e in range(4)], -1)
        chosen = torch.zeros_like(mean).scatter_(-1, mean.topk(number).indices, 1.0)
        return h * chosen[..., labels]

    with torch.no_grad(), Tap(model, {wire: part.ffn for wire, part in given.items()}, visit, enter):
        masked = model(x)
    assert torch.allclose(moe(x), masked, atol=1e-12, rtol=0)
    assert not torch.allclose(masked, model(x))
    one = x[:1]
    with torch.no_grad(), Tap(model, {wire: part.ffn for wire, part in given.items()}, visit, enter):
        assert torch.allclose(moe(one), model(one), atol=1e-12, rtol=0)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_back_again_bit_for_bit(name, uneven):
    model, x = found(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    moe = to_moe(model, parts(model, x, uneven=uneven), top_k=2)
    dense = moe.to_dense()
    assert type(dense) is type(model)
    assert list(dense.state_dict()) == list(before)
    assert all(torch.equal(dense.state_dict()[key], tensor) for key, tensor in before.items())
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert torch.equal(dense(x), model(x))
    assert repr(dense) == repr(model)
    assert [m.training for m in dense.modules()] == [m.training for m in model.modules()]
    assert not hasattr(dense, "to_dense")


def test_it_trains_saves_and_copies():
    model, x = found("gated")
    moe = to_moe(model, parts(model, x), top_k=2)
    optimizer = torch.optim.SGD(moe.parameters(), 0.1)
    moe(x).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in moe.parameters())
    optimizer.step()
    assert model.gate.weight.grad is None
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    other = to_moe(model, parts(model, x), top_k=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), moe(x))
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(twin(x), moe(x))
        assert torch.equal(twin.to_dense().gate.weight, moe.to_dense().gate.weight)
        with torch.no_grad():
            twin.down.weight.zero_()
        assert bool(moe.to_dense().down.weight.any())
        assert not bool(twin.to_dense().down.weight.any())
    torch.testing.assert_close(to_moe(model, parts(model, x), top_k=2).to(torch.bfloat16)(x.bfloat16()).float(),
                               to_moe(model, parts(model, x), top_k=2)(x), atol=1.0, rtol=1.0)


def test_gradients_are_those_of_the_masked_dense_model():
    model, x = found("gated")
    model, x = model.double(), x.double()
    given = parts(model, x)
    moe = to_moe(model, given, top_k=4)
    moe(x).square().sum().backward()
    model(x).square().sum().backward()
    for got, want in zip((moe.to_dense(),), (model,), strict=True):
        assert torch.equal(got.down.weight, want.down.weight)
    labels = torch.as_tensor(next(iter(given.values())).labels)
    order = torch.cat([(labels == e).nonzero().flatten() for e in range(4)])
    assert torch.allclose(moe.gate.weight.grad.flatten(0, 2), model.gate.weight.grad[order])
    assert torch.allclose(moe.down.weight.grad.flatten(0, 1), model.down.weight.grad.T[order])
    assert torch.allclose(moe.down.bias.grad, model.down.bias.grad)


def test_a_language_model_generates():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=64)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 64, (2, 5))
    stats = cl.observe(model, [ids])
    given = {wire: SimpleNamespace(labels=torch.arange(48) % 8, ffn=s.ffn) for wire, s in stats.items()}
    dense, moe = to_moe(model, given, top_k=8), to_moe(model, given, top_k=2)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(dense.generate(ids, **options), model.generate(ids, **options))
    assert moe.generate(ids, **options).shape == (2, 9)


@pytest.mark.parametrize(("change", "message"), [
    (dict(top_k=0), "top_k=0 of .*: between 1 and its 4 experts"),
    (dict(top_k=5), "top_k=5 of"),
    (dict(top_k=1.5), r"top_k=1.5 of"),
    (dict(selection="best"), "selection='best' is not one of"),
    (dict(labels=torch.arange(7)), "has 7 neurons, and the wire 16"),
    (dict(ffn=None), "made of a matrix"),
])
def test_bad_input(change, message):
    model, x = found("gated")
    given = parts(model, x)
    for part in given.values():
        vars(part).update({key: value for key, value in change.items() if key in ("labels", "ffn")})
    options = {"top_k": 2} | {key: value for key, value in change.items() if key in ("top_k", "selection")}
    with pytest.raises(cl.CircuitlabError, match=message):
        to_moe(model, given, **options)


@pytest.mark.parametrize(("name", "message"), [
    ("bare", "not the weight of a module"), ("adapter", "more than one map"), ("experts", "one of 3 experts that share the parameter w2"), ("two heads", "more than one map"),
])
def test_blocks_that_cannot_be_made_sparse(name, message):
    model, x, _ = FOUND[name]
    with pytest.raises(cl.CircuitlabError, match=message):
        to_moe(model, parts(model, x), top_k=2)


def test_a_map_of_two_blocks():
    model, x = found("mlp")
    given = {b.wire: SimpleNamespace(labels=torch.arange(b.size) % 4, ffn=b) for b in blocks(cl.trace(model, x)).values()}
    with pytest.raises(cl.CircuitlabError, match="its map '2' belongs to another block as well"):
        to_moe(model, given, top_k=2)


def test_another_model():
    model, x = found("gated")
    with pytest.raises(cl.CircuitlabError, match="is of another model"):
        to_moe(nn.Linear(2, 2), parts(model, x), top_k=2)


assert X is not None


@pytest.mark.parametrize("whole", [False, True])
def test_fused_encoders_of_torch_call_the_experts_in_eval_mode_too(whole):
    """Without gradients they read the weights of the maps themselves, and pack padded sequences."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    model = (nn.TransformerEncoder(layer, 2) if whole else layer).eval()
    x, padding = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    moe = to_moe(model, parts(model, x), top_k=4)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), model(x))
        kept = ~padding
        torch.testing.assert_close(moe(x, src_key_padding_mask=padding)[kept], model(x, src_key_padding_mask=padding)[kept])
    back = to_moe(moe, {}, top_k=1).to_dense()
    flags = ("activation_relu_or_gelu", "use_nested_tensor")
    for one, other in zip(back.modules(), model.modules(), strict=True):
        assert [vars(one).get(flag) for flag in flags] == [vars(other).get(flag) for flag in flags] and "_fused" not in vars(one)


class SharedDown(nn.Module):
    """Two blocks whose neurons write along the same vectors."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        x = x + self.down(torch.relu(self.one(x)))
        return x + self.down(torch.relu(self.two(x)))


def test_a_map_that_another_block_shares_is_not_replaced():
    model, x = SharedDown(), torch.randn(4, 6)
    block = blocks(cl.trace(model, x))["two"]
    with pytest.raises(cl.CircuitlabError, match=r"down.weight is not the weight of a module that does this map alone"):
        to_moe(model, {block.wire: SimpleNamespace(labels=torch.arange(8) % 2, ffn=block, k=2)}, top_k=1)
