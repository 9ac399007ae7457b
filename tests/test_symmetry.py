"""Permutation symmetry of real architectures, read off their circuits: what moves, what is frozen and why, and group laws."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import circuitlab as cl
from circuitlab.gallery import gpt, llama, moe


class Residual(nn.Module):
    """A ResNet's block, with a projection where the width changes."""

    def __init__(self, width, wide, stride):
        super().__init__()
        self.a = nn.Conv2d(width, wide, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)
        self.short = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(width, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        return F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))) + self.short(x))


class PreNorm(nn.Module):
    """A transformer's block with fused query, key and value."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        b, n, d = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.view(b, n, self.heads, d // self.heads).transpose(1, 2) for t in parts)
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vision(nn.Module):
    """Bare parameters: a class token, positions, a scale for each layer."""

    def __init__(self, d=12, heads=3):
        super().__init__()
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 5, d))
        self.scale = nn.Parameter(torch.randn(d))
        self.blocks = nn.Sequential(PreNorm(d, heads), PreNorm(d, heads))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x) * self.scale)[:, 0])


class Encoder(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=norm_first)
        self.tokens, self.head = nn.Embedding(10, 12), nn.Linear(12, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens):
        return self.head(self.encoder(self.tokens(tokens)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.tokens, self.cell = nn.Embedding(10, 6), kind(6, 8, 2, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 5)

    def forward(self, tokens):
        return self.head(self.cell(self.tokens(tokens))[0][:, -1])


class Dense(nn.Module):
    """Concatenated channels, as in a DenseNet or U-Net."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(10, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        a = self.a(x).relu()
        return self.head(self.norm(self.c(torch.cat([a, self.b(a).relu()], dim=1))).mean((2, 3)))


class SoftExperts(nn.Module):
    """Experts as one array, mixed by a softmax."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x):
        hidden = torch.einsum("nd,edf->nef", x, self.up).relu()
        return (self.router(x).softmax(-1)[..., None] * torch.einsum("nef,efd->ned", hidden, self.down)).sum(1)


def image(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def text(high=10):
    return torch.randint(0, high, (2, 6))


# name -> (model, input, sizes of the permutable wires, moved parameters and buffers, a reason among the frozen ones)
ZOO = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)),
            lambda: image(3, 6), [8, 12], 5, "input"),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3),
                                  nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
            lambda: image(2, 3, 12, 12), [6, 8], 13, "slides a window"),
    "resnet": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Residual(4, 4, 1),
                                     Residual(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
               lambda: image(2, 3, 8, 8), [4, 4, 8, 8], 32, "slides a window"),
    "conv_flatten": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 7), nn.ReLU(),
                                           nn.Linear(7, 4)),
                     lambda: image(2, 3, 6, 6), [6, 7], 5, "slides a window"),
    "vision": (Vision, lambda: image(2, 3, 8, 8), [12, 24, 24, 3, 3, 4, 4, 4, 4], 32, "by their number"),
    "llama": (lambda: llama.Llama(32, 16, 4, 2, 2), lambda: text(32), [16, 48, 48, 2, 2, 2, 2, 4, 4], 21, "numbers its entries"),
    "gpt_tied": (lambda: gpt.GPT(32, 16, 16, 4, 2), lambda: text(32), [16, 64, 64, 4, 4, 4, 4, 4, 4], 28, "output"),
    "groupnorm": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 1)),
                  lambda: image(2, 3, 6, 6), [2, 3], 5, "output"),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
                                        nn.Conv2d(8, 4, 1)),
                  lambda: image(2, 3, 6, 6), [8], 9, "is the window"),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(),
                                      nn.Conv2d(12, 4, 1)),
                lambda: image(2, 3, 6, 6), [4, 2, 3], 5, "is the window"),
    "encoder": (lambda: Encoder(False), text, [12, 20, 20, 3, 3, 4, 4], 26, "by their number"),
    "encoder_pre_norm": (lambda: Encoder(True), text, [12, 20, 20, 3, 3, 4, 4], 26, "by their number"),
    "lstm": (lambda: Recurrent(nn.LSTM), text, [6, 8, 8], 10, "order"),
    "gru_both_ways": (lambda: Recurrent(nn.GRU, bidirectional=True), text, [6, 8, 8, 8, 8], 18, "order"),
    "moe": (lambda: moe.MixtureOfExperts(8, 12, 3), lambda: image(10, 8), [12, 12, 12], 9, "sorts it"),
    "soft_moe": (SoftExperts, lambda: image(5, 8), [3, 12], 4, "input"),
    "dense": (Dense, lambda: image(2, 3, 6, 6), [4, 6, 8], 11, "parts"),
}


def made(name):
    torch.manual_seed(0)
    make, values, *expected = ZOO[name]
    model = make().double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.ndim == 1:
            buffer.uniform_(0.5, 2)  # running statistics that differ for each channel
    x = values()
    return model, x, cl.trace(model, x).symmetry(), expected


def moves(model, other):
    one, two = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, other))
    return {name for name in one if not torch.equal(one[name], two[name])}


@pytest.mark.parametrize("name", ZOO)
def test_random_elements_leave_the_outputs(name):
    model, x, symmetry, (sizes, moved, reason) = made(name)
    assert sorted(wire.size for wire in symmetry.wires.values()) == sorted(sizes), symmetry
    assert any(reason in why for why in symmetry.frozen.values()), symmetry
    assert all(symmetry.frozen.values())
    with torch.no_grad():
        expected = model(x)
        for seed in range(3):
            other = symmetry.apply(model, symmetry.random(seed))
            assert (other(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert len(symmetry.actions) == moved, sorted(symmetry.actions)


@pytest.mark.parametrize("name", ZOO)
def test_each_wire_alone_moves_what_it_says(name):
    model, x, symmetry, _ = made(name)
    expected = model(x)
    for wire in symmetry.wires:
        one = symmetry.element({wire: torch.arange(symmetry.wires[wire].size).roll(1)})
        other = symmetry.apply(model, one)
        assert (other(x) - expected).abs().max() <= 1e-9 * expected.abs().max(), wire
        assert moves(model, other) <= {place[0] for place in symmetry.wires[wire].places}
        assert moves(model, other)


@pytest.mark.parametrize("name", ["mlp", "vision", "llama", "gpt_tied", "groupnorm", "grouped", "gru_both_ways", "dense"])
def test_group_laws(name):
    model, _, symmetry, _ = made(name)
    p, q, r = (symmetry.random(seed) for seed in (1, 2, 3))

    def same(one, other):
        return all(torch.equal(one[wire], other[wire]) for wire in symmetry.wires)

    def state(element):
        return symmetry.apply(model, element).state_dict()

    both, one_by_one = state(symmetry.compose(p, q)), symmetry.apply(symmetry.apply(model, p), q).state_dict()
    assert all(torch.equal(both[key], one_by_one[key]) for key in both)
    assert same(symmetry.compose(symmetry.compose(p, q), r), symmetry.compose(p, symmetry.compose(q, r)))
    assert same(symmetry.compose(p, symmetry.inverse(p)), symmetry.identity())
    assert same(symmetry.compose(symmetry.inverse(p), p), symmetry.identity())
    assert not same(p, q)
    back = symmetry.apply(symmetry.apply(model, p), symmetry.inverse(p))
    assert not moves(model, back)
    assert len(moves(model, symmetry.apply(model, p))) > len(symmetry.actions) / 2


def test_heads_move_as_blocks_and_each_has_its_own_order_within():
    model, x, symmetry, _ = made("vision")
    inner, value, head = "blocks.0.k", "blocks.0.k_2", "blocks.0.h"
    assert symmetry.within[inner] == symmetry.within[value] == (head,)
    assert symmetry.shape(inner) == (3, 4)
    assert symmetry.shape(head) == (3,)
    element = symmetry.random(0)
    assert not torch.equal(element[inner][0], element[inner][1])
    moved = symmetry.apply(model, element)
    old = model.blocks[0].qkv.weight[:12].view(3, 4, 12)
    new = moved.blocks[0].qkv.weight[:12].view(3, 4, 12)
    for h in range(3):
        assert torch.equal(new[h], old[element[head][h]][element[inner][h]][:, element["d"]])


def test_grouped_queries_move_with_their_key_value_head_and_rotary_pins_query_and_key():
    _, _, symmetry, _ = made("llama")
    head, group = "layers.0.attention.h", "layers.0.attention.g"
    places = {(name, dim, factor) for name, dim, factor, _ in symmetry.wires[head].places}
    attention = "layers.0.attention"
    assert places == {(f"{attention}.q.weight", 0, 0), (f"{attention}.k.weight", 0, 0), (f"{attention}.v.weight", 0, 0),
                      (f"{attention}.o.weight", 1, 0)}
    assert {name for name, *_ in symmetry.wires[group].places} == {f"{attention}.q.weight", f"{attention}.o.weight"}
    assert symmetry.within[group] == (head,)
    pinned = next(why for name, why in symmetry.frozen.items() if name.endswith("attention.k"))
    assert "arange" in pinned
    assert "numbers its entries" in pinned


def test_what_stands_in_an_array_without_the_heads_is_one_order_for_all_heads():
    class Normed(nn.Module):
        """Queries and keys are normalised with one weight for all heads."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            q, k, v = (part(x).view(2, 5, 3, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
            mixed = (self.norm(q) @ self.norm(k).transpose(-1, -2)).softmax(-1) @ v
            return self.o(mixed.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Normed().double(), image(2, 5, 12)
    model.norm.weight.data.normal_()
    symmetry = cl.trace(model, x).symmetry()
    shared = next(name for name, wire in symmetry.wires.items() if ("norm.weight", 0, 0, None) in wire.places)
    assert symmetry.shape(shared) == (4,)
    assert sorted(map(symmetry.shape, symmetry.wires)) == [(3,), (3, 4), (4,)]
    assert torch.allclose(symmetry.apply(model, symmetry.random(5))(x), model(x), rtol=1e-9, atol=1e-12)


def test_a_sum_over_heads_lets_no_head_have_an_order_of_its_own():
    class Talking(nn.Module):
        """Heads are mixed, entry by entry."""

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(4, 6)
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return self.down(torch.einsum("bhk,h->bk", self.up(x).view(-1, 3, 4).relu(), self.weight))

    model, x = Talking().double(), image(2, 6)
    symmetry = cl.trace(model, x).symmetry()
    assert set(map(symmetry.shape, symmetry.wires)) == {(3,), (4,)}
    assert torch.allclose(symmetry.apply(model, symmetry.random(1))(x), model(x), rtol=1e-9, atol=1e-12)


def test_the_order_of_the_group():
    _, _, symmetry, _ = made("mlp")
    assert math.isclose(symmetry.log_order, math.log(math.factorial(8) * math.factorial(12)))
    _, _, symmetry, _ = made("groupnorm")
    assert math.isclose(math.exp(symmetry.log_order), 2 * 6 * 6)  # two groups of three
    assert "72 permutations of 2 wires" in repr(symmetry)


def test_the_random_elements_of_a_seed_are_the_same_and_touch_no_global_state():
    _, _, symmetry, _ = made("vision")
    before = torch.get_rng_state()
    one, two = symmetry.random(7), symmetry.random(7)
    assert all(torch.equal(one[wire], two[wire]) for wire in one)
    assert torch.equal(before, torch.get_rng_state())


def test_a_frame_tells_wires_places_and_reasons():
    _, _, symmetry, _ = made("gpt_tied")
    frame = symmetry.to_frame().set_index("wire")
    assert frame.loc["d", "permutable"]
    assert "tokens.weight" in frame.loc["d", "places"]
    assert frame.loc["v", "why"] == symmetry.frozen["v"]
    assert frame.loc["blocks.0.attention.k", "within"] == "blocks.0.attention.h"


@pytest.mark.parametrize(("permutations", "message"), [
    ({"d": torch.arange(16).flip(0)[:-1]}, "has 16 entries"),
    ({"d": torch.zeros(16, dtype=torch.long)}, "a permutation of 0..15 is needed"),
    ({"d": torch.rand(16)}, "holds integers"),
    ({"v": torch.arange(32)}, "not permutable: it is an axis of the output"),
    ({"e": torch.arange(3)}, "no permutable wire 'e'"),
    ({"blocks.0.attention.k": torch.arange(4).expand(3, 4)}, r"of shape \[4\] or \[4, 4\]"),
])
def test_what_is_no_permutation_is_an_error(permutations, message):
    model, _, symmetry, _ = made("gpt_tied")
    for call in (lambda: symmetry.apply(model, permutations), lambda: symmetry.element(permutations)):
        with pytest.raises(cl.CircuitlabError, match=message):
            call()


def test_another_model_is_an_error():
    _, _, symmetry, _ = made("mlp")
    with pytest.raises(cl.CircuitlabError, match=r"'0.weight' is of shape \[9, 6\]"):
        symmetry.apply(nn.Sequential(nn.Linear(6, 9)), symmetry.random())
    with pytest.raises(cl.CircuitlabError, match="missing"):
        symmetry.apply(nn.Linear(6, 8), symmetry.random())


def test_the_copy_shares_nothing_and_keeps_ties():
    model, x, symmetry, _ = made("gpt_tied")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = symmetry.apply(model, symmetry.random())
    assert other.readout.weight is other.tokens.weight
    for parameter in other.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
