"""Feed-forward blocks are found from wires alone, and are what they are said to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import circuitlab as cl
from circuitlab.analysis.feedforward import blocks
from circuitlab.analysis.tap import Tap


class Gated(nn.Module):
    def __init__(self, act=F.silu):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)
        self.act = act

    def forward(self, x):
        return x + self.down(self.up(x) * self.act(self.gate(x)))


class Fused(nn.Module):
    """Gate and up in one matrix; cut tells how the two are told apart."""

    def __init__(self, cut):
        super().__init__()
        self.both, self.down = nn.Linear(6, 32), nn.Linear(16, 6)
        self.cut = cut

    def forward(self, x):
        gate, up = self.cut(self.both(x))
        return self.down(F.gelu(gate) * up)


class Bare(nn.Module):
    """Parameters without modules, and a weight that is turned and cast on the way."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(6, 16))

    def forward(self, x):
        return torch.einsum("bf,df->bd", torch.relu(x @ self.a + self.b), self.c.to(x.dtype))


class Low(nn.Module):
    """A low-rank adapter beside the keys."""

    def __init__(self):
        super().__init__()
        self.key, self.a, self.b, self.value = nn.Linear(6, 16), nn.Linear(6, 2, False), nn.Linear(2, 16, False), nn.Linear(16, 6)

    def forward(self, x):
        return self.value(torch.tanh(self.key(x) + 0.5 * self.b(self.a(x))))


class HandMade(nn.Module):
    """Swish written out, and a learned scale of each neuron."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.scale = nn.Linear(6, 16), nn.Linear(16, 6), nn.Parameter(torch.rand(16))

    def forward(self, x):
        h = self.key(x)
        return self.value(h * torch.sigmoid(h) * self.scale)


class Residual(nn.Module):
    """A residual stream is no hidden wire, though linear maps write and read it."""

    def __init__(self):
        super().__init__()
        self.inp, self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.inp(x))
        return self.out(torch.relu(x + self.b(torch.relu(self.a(x)))))


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.three = nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 6, 1), nn.Conv2d(6, 6, 3)

    def forward(self, x):
        return self.three(self.b(F.relu(self.n(self.a(x)))))


class Nothing(nn.Module):
    """Maps in a chain, a softmax between, a norm between: no feed-forward block."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 6), nn.LayerNorm(9)

    def forward(self, x):
        return self.c(self.norm(F.relu(self.b(self.a(x)))).softmax(-1))


class Two(nn.Module):
    """One hidden layer with two heads."""

    def __init__(self):
        super().__init__()
        self.key, self.policy, self.value = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x):
        h = F.relu(self.key(x))
        return self.policy(h), self.value(h)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 16, 6)), nn.Parameter(torch.randn(3, 6, 16))

    def forward(self, x):
        return sum(F.linear(F.relu(F.linear(x, self.w1[e])), self.w2[e]) for e in range(3))


torch.manual_seed(0)
X = torch.randn(5, 6)
FOUND = {
    "gated": (Gated(), X, [("", ["up.weight"], ["gate.weight"], ["down.weight"], "silu")]),
    "bilinear": (Gated(lambda x: x), X, [("", ["gate.weight"], ["up.weight"], ["down.weight"], "mul")]),
    "chunk": (Fused(lambda h: h.chunk(2, -1)), X, [("", ["both.weight"], ["both.weight"], ["down.weight"], "gelu")]),
    "interleaved": (Fused(lambda h: (h[..., ::2], h[..., 1::2])), X, [("", ["both.weight"], ["both.weight"], ["down.weight"], "gelu")]),
    "unbind": (Fused(lambda h: h.view(-1, 2, 16).unbind(1)), X, [("", ["both.weight"], ["both.weight"], ["down.weight"], "gelu")]),
    "narrow": (Fused(lambda h: (h.narrow(-1, 16, 16), h.narrow(-1, 0, 16))), X,
               [("", ["both.weight"], ["both.weight"], ["down.weight"], "gelu")]),
    "bare": (Bare(), X, [("", ["a"], [], ["c"], "relu")]),
    "adapter": (Low(), X, [("", ["key.weight", "b.weight"], [], ["value.weight"], "tanh")]),
    "hand-made": (HandMade(), X, [("", ["key.weight"], [], ["value.weight"], "sigmoid")]),
    "residual": (Residual(), X, [("", ["a.weight"], [], ["b.weight"], "relu")]),
    "pointwise": (Pointwise().eval(), torch.randn(2, 6, 5, 5), [("", ["a.weight"], [], ["b.weight"], "relu")]),
    "nothing": (Nothing(), X, []),
    "two heads": (Two(), X, [("", ["key.weight"], [], ["policy.weight", "value.weight"], "relu")]),
    "experts": (Experts(), X, [("", ["w1"], [], ["w2"], "relu")]),
    "mlp": (nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 3)), X,
            [("0", ["0.weight"], [], ["2.weight"], "relu"), ("2", ["2.weight"], [], ["4.weight"], "gelu")]),
    "encoder layer": (nn.TransformerEncoderLayer(6, 2, 16, batch_first=True).eval(), X[None],
                      [("", ["linear1.weight"], [], ["linear2.weight"], "relu")]),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    model, x, expected = FOUND[name]
    found = blocks(cl.trace(model, x))
    assert [(path, [w.parameter for w in b.keys], [w.parameter for w in b.gates], [w.parameter for w in b.values], b.activation)
            for path, b in found.items()] == expected


@pytest.mark.parametrize("name", [name for name in FOUND if FOUND[name][2] and name not in ("experts", "residual")])
def test_rows_are_the_neurons(name):
    """Other numbers in the rows of one neuron change the hidden values of that neuron, and of no other."""
    model, x, _ = FOUND[name]
    circuit = cl.trace(model, x)
    for block in blocks(circuit).values():
        seen = {}

        def hidden(model, block=block, seen=seen):
            with torch.no_grad(), Tap(model, {block.wire: block}, lambda wire, h: seen.update({wire: h.clone()})):
                model(x)
            return seen[block.wire].flatten(0, -2)

        before = hidden(model)
        assert before.shape[1] == block.size
        for weight in (*block.keys, *block.gates):
            parameter = model.get_parameter(weight.parameter)
            kept = parameter.detach().clone()
            start, _, step = weight.rows
            assert weight.of(parameter).shape[0] == block.size
            with torch.no_grad():
                parameter.movedim(weight.dim, 0)[start + 3 * step] = 9 * torch.randn(parameter.numel() // parameter.shape[weight.dim]).view(
                    parameter.movedim(weight.dim, 0)[0].shape)
            changed = (hidden(model) != before).any(0).nonzero().flatten().tolist()
            with torch.no_grad():
                parameter.copy_(kept)
            assert changed == [3], weight
            if weight.bias:
                bias = model.get_parameter(weight.bias)
                kept = bias.detach().clone()
                with torch.no_grad():
                    bias[start + 3 * step] = 9.0
                    changed = (hidden(model) != before).any(0).nonzero().flatten().tolist()
                    bias.copy_(kept)
                assert changed == [3], weight


def test_the_tap_replaces_what_the_value_map_reads():
    for name in ("gated", "bare", "pointwise", "encoder layer", "mlp"):
        model, x, _ = FOUND[name]
        found = blocks(cl.trace(model, x))
        block = list(found.values())[-1]
        with torch.no_grad():
            with Tap(model, {block.wire: block}, lambda wire, h: h):
                same = model(x)
            with Tap(model, {block.wire: block}, lambda wire, h: torch.zeros_like(h)):
                without = model(x)
        assert torch.equal(same, model(x))
        assert not torch.equal(without, same)


def test_ffn_of_a_circuit_are_wires():
    circuit = cl.trace(Gated(), X)
    wire = circuit.ffn[""]
    assert wire is circuit.wires[wire.name]
    assert wire.size == 16


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "bert", "t5"])
def test_language_models(family):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
        "t5": dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=64),
        "phi3": dict(sizes, num_key_value_heads=2, pad_token_id=0),
    }.get(family, sizes)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **config)).eval()
    ids = torch.randint(0, 64, (2, 5))
    circuit = cl.trace(model, **{"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {}))
    found = blocks(circuit)
    assert len(found) == (4 if family == "t5" else 2)
    assert all(block.gated == (family in ("llama", "phi3")) for block in found.values())
