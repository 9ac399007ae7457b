"""Feed-forward blocks are found from wires alone, and are what they are said to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import circuitlab as cl
from circuitlab.analysis.feedforward import blocks
from circuitlab.analysis.tap import Tap
from circuitlab.errors import InputError


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


class Calls(nn.Module):
    """Linear maps of these sizes, and a function that calls them."""

    def __init__(self, call, **sizes):
        super().__init__()
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(*size) if isinstance(size, tuple) else size)
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def fused_adapter(m, x):
    gate, up = (m.both(x) + m.two(m.one(x))).chunk(2, -1)
    return m.down(F.gelu(gate) * up)


def recurrent(m, x):
    h = x.new_zeros(len(x), 16)
    for _ in range(3):
        h = torch.tanh(m.a(x) + m.h(h))
    return m.b(h)


def fused_norm(m, x):
    h = m.both(x)
    gate, up = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))).chunk(2, -1)
    return m.down(F.silu(gate) * up)


torch.manual_seed(0)
X = torch.randn(5, 6)
PAIR = dict(a=(6, 16), b=(16, 6))
THREE = dict(PAIR, c=(6, 16))
FUSED = dict(both=(6, 32), down=(16, 6))
NONE = {
    "recurrence": Calls(recurrent, h=(16, 16), **PAIR),
    "larger of two": Calls(lambda m, x: m.b(torch.maximum(m.a(x), m.c(x))), **THREE),
    "product and sum": Calls(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.d(x)) + m.c(x)), d=(6, 16), **THREE),
    "activated product": Calls(lambda m, x: m.b(F.gelu(m.a(x) * (1 + m.c(x)))), **THREE),
    "norm of both halves": Calls(fused_norm, **FUSED),
    "masked": Calls(lambda m, x: m.b(m.a(x).masked_fill(x.sum(-1, keepdim=True) > 0, 0.0)), **PAIR),
    "padded by nothing": Calls(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0))), **PAIR),
    "sum over one position": Calls(lambda m, x: m.b(m.a(x[:, None]).softmax(1).sum(1)), **PAIR),
    "norm between": Calls(lambda m, x: m.b(m.n(F.relu(m.a(x)))), n=nn.LayerNorm(16), **PAIR),
}
FOUND = {
    "gated linear unit": (Calls(lambda m, x: m.down(F.glu(m.both(x))), **FUSED), X,
                          [("", ["both.weight"], ["both.weight"], ["down.weight"], "sigmoid")]),
    "adapter of both halves": (Calls(fused_adapter, one=(6, 2), two=(2, 32), **FUSED), X,
                               [("", ["both.weight", "two.weight"], ["both.weight", "two.weight"], ["down.weight"], "gelu")]),
    "scaled product": (Calls(lambda m, x: m.b(0.5 * (m.a(x) * m.c(x))), **THREE), X, [("", ["c.weight"], ["a.weight"], ["b.weight"], "mul")]),
    "added to a stream": (Calls(lambda m, x: torch.addmm(x, torch.relu(m.a(x)), m.w), a=(6, 16), w=nn.Parameter(torch.randn(16, 6))), X,
                          [("", ["a.weight"], [], ["w"], "relu")]),
    "of several wires": (Calls(lambda m, x: m.b(F.relu(m.a(m.conv(x).flatten(1)))), conv=nn.Conv2d(3, 4, 1), a=(4 * 5 * 5, 16), b=(16, 2)),
                         torch.randn(2, 3, 5, 5), [("", ["a.weight"], [], ["b.weight"], "relu")]),
    "activated in two ways": (Calls(lambda m, x: m.b(F.gelu(m.a(m.b(F.relu(m.a(x)))))), **PAIR), X,
                              [("", ["a.weight"], [], ["b.weight"], "relu gelu")]),
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


@pytest.mark.parametrize("name", NONE)
def test_not_found(name):
    assert blocks(cl.trace(NONE[name], X)) == {}


@pytest.mark.parametrize("name", [name for name in FOUND if FOUND[name][2] and name not in ("experts", "residual", "activated in two ways")])
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


def test_all_value_maps_read_what_the_tap_puts_in():
    model, x, _ = FOUND["two heads"]
    block = next(iter(blocks(cl.trace(model, x)).values()))
    for calls in (1, 2):
        with torch.no_grad(), Tap(model, {block.wire: block}, lambda wire, h: torch.zeros_like(h)):
            found = [model(x) for _ in range(calls)]
        for policy, value in found:
            assert torch.equal(policy, model.policy.bias.expand(5, 4))
            assert torch.equal(value, model.value.bias.expand(5, 1))
    cast = Calls(lambda m, x: (m.b((h := F.relu(m.a(x)))), m.c(h.clone())), a=(6, 16), b=(16, 6), c=(16, 6))
    block = next(iter(blocks(cl.trace(cast, X)).values()))
    assert [value.parameter for value in block.values] == ["b.weight", "c.weight"]
    with torch.no_grad(), pytest.raises(InputError, match=r"c\.weight reads are not those that were changed"):
        with Tap(cast, {block.wire: block}, lambda wire, h: torch.zeros_like(h)):
            cast(X)


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


def test_what_a_recurrent_net_reads_is_no_hidden_wire():
    """Its gates are no linear map of what it reads."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.GRU(5, 4, batch_first=True))
    assert not blocks(cl.trace(model, X))
