"""Feed-forward blocks are found from wires alone, and are what they are said to be."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import circuitlab as cl
from circuitlab.analysis.feedforward import blocks
from circuitlab.analysis.rows import Rows, run
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
    "product of two positions": Calls(lambda m, x: m.b(m.a(x)[:2] * m.a(x)[2:4]), **PAIR),
    "product of two halves": Calls(lambda m, x: (lambda h: m.b(F.relu(h[:2]) * h[2:4]))(m.a(x)), **PAIR),
    "product of two steps": Calls(lambda m, x: (lambda h: m.b(h[:, 0] * torch.sigmoid(h[:, 1])))(m.a(x[:4].view(2, 2, 6))), **PAIR),
    "neurons in another order": Calls(lambda m, x: m.b(F.relu(F.linear(x, m.a.weight.flip(0)))), **PAIR),
    "values in another order": Calls(lambda m, x: F.linear(F.relu(m.a(x)), m.b.weight.roll(1, 1)), **PAIR),
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


# experts ----------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Four experts, of which each position is sent to two, written in one of many ways."""

    def __init__(self, form, experts=4, width=8, hidden=16):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.router = form, nn.Linear(width, experts)
        self.up, self.down = (nn.Parameter(torch.randn(experts, *size) / 2) for size in ((width, hidden), (hidden, width)))
        self.bias, self.offset = nn.Parameter(torch.randn(experts, hidden) / 2), nn.Parameter(torch.randn(experts, width) / 2)
        if form in (loop_over_modules, boolean_masks, sorted_slices):
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(experts))
            for e, expert in enumerate(self.experts):
                expert[0].weight.data, expert[0].bias.data = self.up[e].detach().T.clone(), self.bias[e].detach().clone()
                expert[2].weight.data, expert[2].bias.data = self.down[e].detach().T.clone(), self.offset[e].detach().clone()
        if form is one_long_matrix:
            self.flat_up = nn.Parameter(self.up.detach().transpose(1, 2).flatten(0, 1).clone())
            self.flat_down = nn.Parameter(self.down.detach().flatten(0, 1).clone())

    def route(self, x):
        return self.router(x).softmax(-1).topk(2, -1)

    def hidden(self, x):
        """What each expert's neurons do, and at which positions: one by one, as it is meant."""
        chosen = self.route(x).indices
        for e in range(len(self.up)):
            sent = (chosen == e).any(-1)
            yield sent, F.relu(x[sent] @ self.up[e] + self.bias[e]).detach()

    def meant(self, x):
        out, (weights, chosen) = torch.zeros_like(x), self.route(x)
        for e, (sent, hidden) in enumerate(self.hidden(x)):
            out[sent] += (hidden @ self.down[e] + self.offset[e]) * (weights * (chosen == e)).sum(-1)[sent, None]
        return out

    def forward(self, x):
        return self.form(self, x, *self.route(x))


def loop_over_modules(m, x, weights, chosen):
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(chosen == e)
        if token.numel():
            out.index_add_(0, token, expert(x[None, token].reshape(-1, x.shape[-1])) * weights[token, slot, None])
    return out


def boolean_masks(m, x, weights, chosen):
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        sent = (chosen == e).any(-1)
        out[sent] = out[sent] + expert(x[sent]) * (weights * (chosen == e)).sum(-1)[sent, None]
    return out


def sorted_slices(m, x, weights, chosen):
    order, start, parts = chosen.flatten().argsort(), 0, []
    rows = x[order // 2]
    for expert, count in zip(m.experts, torch.bincount(chosen.flatten(), minlength=4).tolist(), strict=True):
        parts.append(expert(rows[start : start + count]))
        start += count
    return torch.zeros_like(x).index_add(0, order // 2, torch.cat(parts) * weights.flatten()[order, None])


def loop_over_hits(m, x, weights, chosen):
    """As transformers' eager experts."""
    out, mask = torch.zeros_like(x), F.one_hot(chosen, 4).permute(2, 1, 0)
    for hit in mask.sum((-1, -2)).nonzero():
        e = hit[0]
        slot, token = torch.where(mask[e])
        h = F.relu(x[token] @ m.up[e] + m.bias[e])
        out.index_add_(0, token, (h @ m.down[e] + m.offset[e]) * weights[token, slot, None])
    return out


def unbound(m, x, weights, chosen):
    out = torch.zeros_like(x)
    for e, (up, bias, down, offset) in enumerate(zip(m.up.unbind(), m.bias, m.down.double().float(), m.offset, strict=True)):
        token, slot = (chosen == e).nonzero(as_tuple=True)
        h = F.relu(torch.addmm(bias, x.index_select(0, token), up))
        out = out.index_add(0, token, torch.addmm(offset, h, down) * weights[token, slot, None])
    return out


def one_long_matrix(m, x, weights, chosen):
    out, ups, downs = torch.zeros_like(x), m.flat_up.view(4, -1, 8), m.flat_down.view(4, -1, 8).chunk(4, 0)
    for e in range(4):
        token, slot = torch.where(chosen == e)
        h = F.relu(F.linear(x[token], ups[e]) + m.bias[e])
        out.index_add_(0, token, (h @ downs[e].squeeze(0) + m.offset[e]) * weights[token, slot, None])
    return out


def a_matrix_for_each_position(m, x, weights, chosen):
    rows, number = x.repeat_interleave(2, 0), chosen.flatten()
    h = F.relu(torch.bmm(m.up.transpose(1, 2)[number], rows[:, :, None]).squeeze(-1) + m.bias[number])
    y = torch.bmm(h[:, None], m.down[number]).squeeze(1) + m.offset[number]
    return (y * weights.flatten()[:, None]).view(len(x), 2, -1).sum(1)


def weighed_in_one(m, x, weights, chosen):
    h = F.relu(torch.einsum("td,tkdf->tkf", x, m.up[chosen]) + m.bias[chosen])
    return torch.einsum("tkf,tkfd,tk->td", h, m.down[chosen], weights) + (m.offset[chosen] * weights[..., None]).sum(1)


def grouped(m, x, weights, chosen):
    number, order = chosen.flatten().sort()
    ends = torch.bincount(number, minlength=4).cumsum(0).int()
    h = F.relu(torch._grouped_mm(x[order // 2], m.up, offs=ends) + m.bias[number])
    y = (torch._grouped_mm(h, m.down, offs=ends) + m.offset[number]) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // 2, y)


def split_and_joined(m, x, weights, chosen):
    """As the parallel experts of JetMoE: all keys first, then what is between, then all values."""
    order, counts = chosen.flatten().argsort(), torch.bincount(chosen.flatten(), minlength=4).tolist()
    h = F.relu(torch.cat([torch.addmm(m.bias[e], rows, m.up[e]) for e, rows in enumerate(x[order // 2].split(counts))]))
    y = torch.cat([torch.addmm(m.offset[e], rows, m.down[e]) for e, rows in enumerate(h.split(counts))])
    return torch.zeros_like(x).index_add(0, order // 2, y * weights.flatten()[order, None])


FORMS = (loop_over_modules, boolean_masks, sorted_slices, loop_over_hits, unbound, one_long_matrix, a_matrix_for_each_position,
         weighed_in_one, grouped, split_and_joined)
ROWS = torch.randn(60, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_found_and_observed_one_by_one(form):
    model, labels = Mixture(form), torch.arange(60) % 3
    assert torch.allclose(model(ROWS), model.meant(ROWS), atol=1e-5)
    found = blocks(cl.trace(model, ROWS))
    assert [b.stacked for b in found.values()] == ([1] * 4 if hasattr(model, "experts") else [4]) and all(b.told for b in found.values())
    stats = cl.observe(model, [ROWS[:25], ROWS[25:28], ROWS[28:]], labels=labels, progress=False)
    assert len(stats) == 4
    for e, (one, (sent, hidden)) in enumerate(zip(stats.values(), model.hidden(ROWS), strict=True)):
        fires = (hidden > 0).double()
        assert one.n == int(sent.sum()) and torch.equal(one.cofiring.double(), fires.T @ fires)
        assert all(torch.equal(one.label_firing[n].double(), fires[labels[sent] == n].sum(0)) for n in range(3))
        assert torch.equal(one.keys, model.up[e].T) and torch.equal(one.values, model.down[e])
        if one.sample is not None:
            assert torch.allclose(F.relu(one.sample.inputs @ one.keys.T + one.sample.bias), one.sample.hidden, atol=1e-5)
    assert (one.sample is None) == (form is weighed_in_one)  # a position's input is read by two experts at once


@pytest.mark.parametrize("form", [form for form in FORMS if form not in (loop_over_modules, boolean_masks, sorted_slices)])
def test_numbers_of_neurons_and_experts(form):
    """Another key, bias or value of one neuron of one expert is seen there, and nowhere else."""
    model = Mixture(form).requires_grad_(False)
    block = next(iter(blocks(cl.trace(model, ROWS)).values()))

    def hidden(e):
        return torch.cat(Rows(run(model, (ROWS, None), {block.wire: block})[block.wire], replace(block, expert=e), 60, None, None, "").hidden)

    before, (key,), (value,) = [hidden(e) for e in range(4)], block.keys, block.values
    assert key.bias == "bias" and all(weight.bias for weight in block.keys)
    for name, rows in ((key.parameter, key.of), (key.bias, key.of_bias)):
        parameter = model.get_parameter(name)
        kept = parameter.clone()
        parameter.view(-1)[rows(torch.arange(parameter.numel()).view(parameter.shape), 2)[5]] += 3
        assert [(hidden(e) != before[e]).any(0).nonzero().flatten().tolist() for e in range(4)] == [[], [], [5], []], name
        parameter.copy_(kept)
    parameter, out = model.get_parameter(value.parameter), model(ROWS)
    parameter.view(-1)[value.of(torch.arange(parameter.numel()).view(parameter.shape), 2)[5]] = 0
    sent, acts = list(model.hidden(ROWS))[2]
    assert (model(ROWS) != out).any(-1).nonzero().flatten().tolist() == sent.nonzero().flatten()[acts[:, 5] != 0].tolist()


def picked(up=lambda m, i: m.up[i], down=lambda m, i: m.down[i], add=lambda m, i: 0):
    """Experts by number for each position, that differ between keys and values, or in what is added."""
    def form(m, x, weights, chosen):
        i = chosen[:, 0]
        return torch.bmm(F.relu(torch.bmm(x[:, None], up(m, i)) + add(m, i)), down(m, i))[:, 0]

    return form


@pytest.mark.parametrize("form", [
    picked(down=lambda m, i: m.down[(i + 1) % 4]), picked(up=lambda m, i: m.up.flip(0)[i]), picked(up=lambda m, i: m.up[1:][i.clamp(max=2)]),
    picked(up=lambda m, i: torch.cat([m.up, m.up])[i]), lambda m, x, w, c: F.relu(x @ torch.einsum("e,edf->df", m.offset[:, 0], m.up)) @ m.down[0],
])
def test_experts_that_cannot_be_told_apart_are_refused(form):
    model = Mixture(form)
    assert [b.told for b in blocks(cl.trace(model, ROWS)).values()] == [False]
    with pytest.raises(InputError, match="neuron j of its 4 experts, which share one parameter, is another in each"):
        cl.observe(model, [ROWS], progress=False)


@pytest.mark.parametrize("form", [
    picked(add=lambda m, i: m.bias[(i + 1) % 4][:, None]),  # the bias of another expert
    lambda m, x, w, c: torch.bmm(F.relu(torch.bmm(x[:, None], torch.einsum("te,edf->tdf", m.router(x), m.up))), m.down[c[:, 0]])[:, 0],
])
def test_experts_that_are_none(form):
    assert blocks(cl.trace(Mixture(form), ROWS)) == {}


def test_experts_under_vmap_are_found_but_not_observed():
    model = Mixture(lambda m, x, w, c: torch.vmap(lambda up, down: F.relu(x @ up) @ down)(m.up, m.down).sum(0))
    assert [(b.stacked, b.told) for b in blocks(cl.trace(model, ROWS)).values()] == [(4, True)]
    with pytest.raises(InputError, match=r"were met in no batch: .*torch\.vmap"):
        cl.observe(model, [ROWS], progress=False)


def test_experts_that_the_first_batch_does_not_reach():
    model = Mixture(loop_over_modules)
    wires = cl.trace(model, ROWS).ffn.values()
    assert len(cl.observe(model, [ROWS[:1], ROWS[1:]], wires=wires, progress=False)) == 4
    assert len(cl.observe(model, [ROWS[:1], ROWS[1:]], progress=False)) == 2
    with pytest.raises(InputError, match="none of the first batches reaches all"):
        cl.observe(model, [ROWS[:1]], wires=wires, progress=False)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_transformers(family, implementation):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, experts_implementation=implementation)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    ids, mask, read = torch.randint(1, 64, (6, 5)), torch.ones(6, 5, dtype=torch.long), []
    mask[2, 3:] = 0
    (path, experts), = ((path, module) for path, module in model.named_modules() if path.endswith(".experts"))
    hook = experts.register_forward_pre_hook(lambda module, args: read.append(args))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    hook.remove()
    (x, chosen, _), kept = read[0], mask.flatten().bool()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = cl.observe(model, [dict(input_ids=ids[:2], attention_mask=mask[:2]), dict(input_ids=ids[2:], attention_mask=mask[2:])],
                           threshold=0.05, progress=False)
    assert next(iter(stats.values())).ffn.path == path
    for e in range(4):
        sent = (chosen == e).any(-1) & kept
        both = x[sent] @ (experts.gate_up_proj[e] if experts.is_transposed else experts.gate_up_proj[e].T)
        hidden = experts._apply_gate(both + experts.gate_up_proj_bias[e] if experts.has_bias else both).detach()
        name, = [name for name in stats if name.endswith(f"[{e}]")] or [None]
        assert stats[name].n == len(hidden)
        assert torch.equal(stats[name].firing, (hidden.abs() > 0.05).sum(0)), e
        assert torch.allclose(stats[name].mean, hidden.double().mean(0), atol=1e-5)


def test_what_a_recurrent_net_reads_is_no_hidden_wire():
    """Its gates are no linear map of what it reads."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.GRU(5, 4, batch_first=True))
    assert not blocks(cl.trace(model, X))
