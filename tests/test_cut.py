"""Wires cut to some of their entries: smaller circuits and modules that compute what masking does, in real architectures."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import circuitlab as cl
from circuitlab.analysis.nested import WidthCurve, importance, width_curve
from circuitlab.cut import parameters
from circuitlab.errors import InputError, VerificationError
from circuitlab.gallery import moe
from circuitlab.gallery.gpt import GPT
from circuitlab.trace.compile import Compiled
from tests.test_symmetry import Encoder, PreNorm, Recurrent, Residual, Vision


class Tied(nn.Module):
    """Read-out with the embedding's own matrix; the hidden size stands in the code as an attribute."""

    def __init__(self, v=11, d=6, f=8):
        super().__init__()
        self.hidden, self.width = f, d
        self.tokens, self.up, self.down = nn.Embedding(v, d), nn.Linear(d, 2 * f), nn.Linear(f, d)
        self.head = nn.Linear(d, v, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens)
        both = self.up(x).view(*x.shape[:-1], 2, self.hidden)
        return self.head(x + self.down(both[..., 0, :] * torch.sigmoid(both[..., 1, :])))


class Sliced(nn.Module):
    """A fused map that is taken apart by slices, narrow and chunk, into parts of different sizes."""

    def __init__(self):
        super().__init__()
        self.maps, self.one, self.two, self.three = nn.Linear(5, 6 + 4 + 4), nn.Linear(6, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = self.maps(x)
        a, rest = y[..., :6], y[..., 6:]
        return self.one(a.relu()) + self.two(rest.narrow(-1, 0, 4).tanh()) + self.three(rest.chunk(2, -1)[1].tanh())


class Uneven(nn.Module):
    """One head's query, key and value in one map: cutting what query and key share leaves parts of different sizes."""

    def __init__(self, d=6):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out((q @ k.transpose(-1, -2) * 6**-0.5).softmax(-1) @ v)


def images(channels=3):
    return (torch.randn(2, channels, 8, 8),), {}


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 1, groups=4), nn.ConvTranspose2d(12, 6, 2, 2), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(24, 10),
    )


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=30,
        max_position_embeddings=16, tie_word_embeddings=True))
    return model, ((), {"input_ids": torch.randint(0, 30, (2, 6)), "use_cache": False})


MODELS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), ((torch.randn(5, 4),), {})),
    "cnn": lambda: (convnet(), images()),
    "group norm": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 5, 1)), images()),
    "resnet": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(8, 8, 1), Residual(8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                     nn.Linear(12, 5)), images()),
    "fused": lambda: (PreNorm(12, 3), ((torch.randn(2, 5, 12),), {})),
    "vision": lambda: (Vision(), images()),
    "encoder": lambda: (Encoder(True), ((torch.randint(0, 10, (2, 5)),), {})),
    "tied": lambda: (Tied(), ((torch.randint(0, 11, (2, 5)),), {})),
    "sliced": lambda: (Sliced(), ((torch.randn(3, 5),), {})),
    "uneven": lambda: (Uneven(), ((torch.randn(2, 5, 6),), {})),
    "experts": lambda: (moe.MixtureOfExperts(8, 16, 4, 2), ((torch.randn(6, 8),), {})),
    "gpt": lambda: (GPT(vocabulary=11, length=8, width=12, layers=1, heads=3), ((torch.randint(0, 11, (2, 5)),), {})),
    "llama": tiny_llama,
}


def made(name):
    torch.manual_seed(0)
    model, (args, kwargs) = MODELS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    return model.eval().double(), tuple(a.double() if a.is_floating_point() else a for a in args), kwargs


def first(output):
    return output.logits if hasattr(output, "logits") else output["logits"] if isinstance(output, dict) else output


def masked(circuit, cut, model):
    """The model with all parameters of dropped entries zero."""
    model = copy.deepcopy(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for tensor in circuit.tensors:
            for dim, kept in enumerate(cut.indices(tensor.name) if tensor.kind == "parameter" else ()):
                if kept is not None:
                    dropped = [n for n in range(tensor.shape[dim]) if n not in kept]
                    named[tensor.name].index_fill_(dim, torch.tensor(dropped), 0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_wire_of_real_models(name):
    """Each permutable wire, cut to odd entries: shapes as the circuit says, masking where it is said to be, the model as it was."""
    model, args, kwargs = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    circuit = cl.trace(model, *args, **kwargs)
    wires = [wire for wire in circuit.wires.values() if wire.permutable and wire.size > 1]
    assert wires
    whole = first(model(*args, **kwargs))
    exact = 0
    for wire in wires:
        cut = circuit.cut(wire.name, keep=list(range(1, wire.size, 2)))
        small = cut.apply(model, *args, **kwargs)
        out = first(small(*args, **kwargs))
        state = dict(small.named_parameters(remove_duplicate=False))
        for tensor in cut.circuit.tensors:
            if tensor.kind == "parameter":
                assert tuple(state[tensor.name].shape) == tensor.shape
        assert out.shape == whole.shape and parameters(cut.circuit) < parameters(circuit)
        if cut.exact:
            exact += 1
            torch.testing.assert_close(out, first(masked(circuit, cut, model)(*args, **kwargs)), rtol=1e-9, atol=1e-9)
            assert not torch.allclose(out, whole)
        else:
            assert not torch.allclose(out, first(masked(circuit, cut, model)(*args, **kwargs)))
        # trained together: the same numbers from the whole model's own parameters, and gradients to them
        again = first(torch.func.functional_call(small, cut.state(model), args, kwargs))
        torch.testing.assert_close(again, out, rtol=0, atol=0)
        everything = circuit.cut(wire.name, wire.size).apply(model)
        assert torch.equal(first(everything(*args, **kwargs)), whole) and type(everything) is type(model)
    assert exact
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_own_class_where_it_fits():
    """The user's own module comes back, smaller, where its code follows; compiled code where it does not."""
    model, args, kwargs = made("cnn")
    small = cl.trace(model, *args).cut("c", 3).apply(model)
    assert type(small) is nn.Sequential
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels, small[3].groups, small[5].in_channels) == (3, 3, 3, 3, 3)
    model, args, kwargs = made("tied")
    small = cl.trace(model, *args).cut("f", 3).apply(model)
    assert type(small) is Tied and small.hidden == 3 and small.width == 6 and small.head.weight is small.tokens.weight
    model, args, kwargs = made("fused")  # the size of a head is width // heads in its code
    circuit = cl.trace(model, *args)
    assert type(circuit.cut("f", 3).apply(model)) is PreNorm
    assert type(circuit.cut("h", 2).apply(model)) is Compiled
    model, args, kwargs = made("llama")
    circuit = cl.trace(model, *args, **kwargs)
    name = next(iter(circuit.ffn.values())).name
    assert type(circuit.cut(name, 5).apply(model, *args, **kwargs)) is type(model)


def test_several_wires_and_wires_within_wires():
    model, args, _ = made("fused")
    circuit = cl.trace(model, *args)
    cut = circuit.cut({"h": 2, "k": [2][0], "k_2": 3, "f": 0.25}, keep={"h": [0, 2], "f": np.arange(24.0)})
    assert cut.kept == {"h": (0, 2), "k": (0, 1), "k_2": (0, 1, 2), "f": tuple(range(18, 24))}
    shapes = {tensor.name: tensor.shape for tensor in cut.circuit.tensors}
    assert shapes["qkv.weight"] == (2 * 2 + 2 * 2 + 2 * 3, 12) and shapes["out.weight"] == (12, 6) and shapes["down.weight"] == (12, 6)
    assert [part[:2] for part in cut.circuit.wires["d"].parts] == [(0, 4), (4, 8), (8, 14)]
    assert ("qkv.weight", 0, 1, (8, 14)) in cut.circuit.wires["k_2"].places
    small = cut.apply(model)
    torch.testing.assert_close(small(*args), masked(circuit, cut, model)(*args), rtol=1e-9, atol=1e-9)
    assert cut.circuit.verify(small, *args).ok
    smaller = cut.circuit.permute(small, {"f": torch.arange(6).flip(0)})  # a circuit like any other
    torch.testing.assert_close(smaller(*args), small(*args))


def test_circuit_is_drawn_costed_compared_and_read_again():
    model, args, _ = made("resnet")
    circuit = cl.trace(model, *args)
    cut = circuit.cut("1.c", 2)
    assert cl.Circuit.from_json(cut.circuit.to_json()) == cut.circuit and pickle.loads(pickle.dumps(cut)) == cut
    assert "<svg" in cut.circuit.svg()
    told = circuit.diff(cut.circuit)
    assert [change.how for change in told.changes if change.what == "wire"] == ["size 8 -> 2"]
    retraced = cl.trace(cut.apply(model), *args)
    assert {t.name: t.shape for t in retraced.tensors} == {t.name: t.shape for t in cut.circuit.tensors}
    assert cut.circuit.cost()["flops"].iloc[0] == retraced.cost()["flops"].iloc[0] < circuit.cost()["flops"].iloc[0]
    assert "1.c 8 -> 2" in repr(cut) and "exact" in repr(cut)


def test_trains_and_saves(tmp_path):
    model, args, _ = made("fused")
    circuit = cl.trace(model, *args)
    small = circuit.cut("h", 2).apply(model)
    optimiser = torch.optim.SGD(small.parameters(), 0.1)
    before = small(*args).square().mean()
    before.backward()
    optimiser.step()
    after = small(*args).square().mean()
    assert after < before
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(loaded(*args), small(*args)) and loaded.code == small.code
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(*args), small(*args))


def test_running_statistics_of_views():
    """Training a narrow network by `state` writes the first entries of the model's own running statistics."""
    model, args, _ = made("cnn")
    cut = cl.trace(model, *args).cut("c", 3)
    small = cut.apply(model).train()
    before = model[1].running_mean.clone()
    torch.func.functional_call(small, cut.state(model), args).sum().backward()
    assert not torch.equal(model[1].running_mean[:3], before[:3]) and torch.equal(model[1].running_mean[3:], before[3:])
    gradient = model[0].weight.grad
    assert gradient[:3].abs().sum() > 0 and gradient[3:].abs().sum() == 0


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(2, 7), min_size=2, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_laws(sizes, seed, data):
    """Cut to full width is the identity; cut to n and then to m is cut to m; cuts of different wires commute."""
    torch.manual_seed(seed)
    layers = [layer for a, b in zip([3, *sizes], [*sizes, 2]) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    circuit = cl.trace(model, x)
    hidden = [wire for wire in circuit.wires.values() if wire.permutable]
    assert [wire.size for wire in hidden] == sizes
    whole = circuit.cut({wire.name: wire.size for wire in hidden})
    assert whole.circuit == circuit and torch.equal(whole.apply(model)(x), model(x))
    wire, other = data.draw(st.permutations(hidden))[:2]
    n = data.draw(st.integers(1, wire.size))
    m = data.draw(st.integers(1, n))
    once = circuit.cut(wire.name, m)
    first = circuit.cut(wire.name, n)
    twice = first.circuit.cut(wire.name, m)
    assert twice.circuit == once.circuit
    one, two = once.apply(model), twice.apply(first.apply(model))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)) and torch.equal(one(x), two(x))
    k = data.draw(st.integers(1, other.size))
    assert once.circuit.cut(other.name, k).circuit == circuit.cut({other.name: k, wire.name: m}).circuit
    kept = data.draw(st.lists(st.integers(0, wire.size - 1), min_size=1, unique=True))
    chosen = circuit.cut(wire.name, keep=kept)
    torch.testing.assert_close(chosen.apply(model)(x), masked(circuit, chosen, model)(x), rtol=1e-12, atol=1e-12)


def test_cut_of_compiled_is_cut_again():
    model, args, _ = made("fused")
    circuit = cl.trace(model, *args)
    two = circuit.cut("h", 2)
    one = two.circuit.cut("h", 1)
    small = one.apply(two.apply(model))
    torch.testing.assert_close(small(*args), circuit.cut("h", 1).apply(model)(*args), rtol=0, atol=0)


def test_what_is_no_masking_is_said():
    model, args, _ = made("vision")
    circuit = cl.trace(model, *args)
    cut = circuit.cut("d", 6)
    assert not cut.exact and "layer_norm" in cut.changes["d"] and "layer_norm" in repr(cut)
    assert circuit.cut("d", 12).exact  # nothing is dropped
    assert circuit.cut("blocks.0.f", 6).exact


def test_errors():
    model, args, _ = made("fused")
    circuit = cl.trace(model, *args)
    for wrong, message in (
        (lambda: circuit.cut("ff", 3), "no wire 'ff'.*did you mean 'f'"),
        (lambda: circuit.cut("seq", 3), "'seq' cannot be cut: it is an axis of the input 'x'"),
        (lambda: circuit.cut("d", 12), "'d' cannot be cut: it is made of parts.*it can permute 'h', 'k'"),
        (lambda: circuit.cut("f", 25), "n=25.*1 to 24"),
        (lambda: circuit.cut("f", 0), "n=0"),
        (lambda: circuit.cut("f", 2.5), "n=2.5"),
        (lambda: circuit.cut("f"), "n=None"),
        (lambda: circuit.cut("f", True), "n=True"),
        (lambda: circuit.cut("f", 3, keep="last"), "keep='last' is not known"),
        (lambda: circuit.cut("f", keep=[1, 1]), "different numbers"),
        (lambda: circuit.cut("f", keep=[24]), "0 to 23"),
        (lambda: circuit.cut("f", 3, keep=[1, 2]), "n=3.*2 indices"),
        (lambda: circuit.cut("f", 3, keep=[0.5, 0.1]), "24 entries, and needs as many importances"),
        (lambda: circuit.cut("f", 3, keep=[[1, 2]]), "along one axis"),
        (lambda: circuit.cut({"f": 3}, 4), "n=4 was given as well"),
        (lambda: circuit.cut({}), "no wire was given"),
        (lambda: circuit.cut({"f": 3}, keep={"h": [1]}), "keep tells of the wire 'h', which is not cut"),
        (lambda: circuit.cut(7, 3), "a int was given"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
    with pytest.raises(VerificationError, match="not the one that was traced"):
        circuit.cut("f", 3).apply(PreNorm(16, 4))


class Strided(nn.Module):
    """A size that is a number in a call."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.down(self.up(x).as_strided((4, 6), (6, 1)).relu())


def test_sizes_that_do_not_follow_are_refused():
    """Strides are numbers."""
    model = Strided().eval()
    circuit = cl.trace(model, torch.randn(4, 3))
    assert circuit.wires["f"].permutable
    with pytest.raises(InputError, match="as_strided in 'as_strided'.*gives shapes"):
        circuit.cut("f", 2).apply(model)


class Reader(nn.Module):
    """A fused recurrent net, read at all times, at the last one, or at its state in the end."""

    def __init__(self, kind, read, **options):
        super().__init__()
        self.read, self.net = read, kind(4, 6, batch_first=True, **options)
        self.out = nn.Linear(options.get("proj_size", 6) * (2 if options.get("bidirectional") and read != "state" else 1), 3)

    def forward(self, x):
        every, state = self.net(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.out({"all": every, "last": every[:, -1], "state": state[-1]}[self.read])


@pytest.mark.parametrize(("kind", "read", "options", "wires"), [
    (nn.LSTM, "all", {}, ["f"]),
    (nn.LSTM, "state", {"num_layers": 2}, ["f"]),
    (nn.LSTM, "last", {"num_layers": 2}, ["f", "f_2"]),
    (nn.GRU, "all", {"num_layers": 2, "bidirectional": True}, ["f", "f_2", "f_3", "f_4"]),
    (nn.RNN, "state", {"bias": False}, ["f"]),
    (nn.LSTM, "all", {"proj_size": 4}, ["f"]),
    (nn.LSTM, "all", {"proj_size": 4}, ["f_2"]),
])
def test_recurrent_nets_are_cut_with_their_states(kind, read, options, wires):
    torch.manual_seed(0)
    model, x = Reader(kind, read, **options).double().eval(), torch.randn(2, 5, 4).double()
    circuit = cl.trace(model, x)
    smaller = circuit.cut(dict.fromkeys(wires, 3)).apply(model, x)
    assert isinstance(smaller, Reader) and (smaller.net.hidden_size == 3 or smaller.net.proj_size == 3)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        named = dict(masked.named_parameters())
        for wire in wires:
            for name, dim, _, part in circuit.wires[wire].places:
                start, stop = part or (0, named[name].shape[dim])
                named[name].narrow(dim, start + 3, stop - start - 3).zero_()
        torch.testing.assert_close(smaller(x), masked(x), rtol=1e-12, atol=1e-12)


def test_layers_of_a_recurrent_net_are_cut_alike():
    """Their states stand in one array; run with others, torch reads what is beyond its end."""
    model = Reader(nn.LSTM, "all", num_layers=2).eval()
    circuit = cl.trace(model, torch.zeros(2, 5, 4))
    with pytest.raises(InputError, match="lstm in 'net.lstm'.*one array, and they would have 3 of 'f', 6 of 'f_2'; cut these wires alike"):
        circuit.cut("f", 3)


def test_label_and_wire_are_names_too():
    model, args, _ = made("vision")
    circuit = cl.trace(model, *args)
    assert circuit.cut(circuit.wires["blocks.0.f"], 3) == circuit.cut("blocks.0.f", 3)
    with pytest.raises(InputError, match="2 wires have the label 'f'|have the label 'f'"):
        circuit.cut("f", 3)
    assert circuit.cut({wire.name: 5 for wire in circuit.ffn.values()}).kept.keys() == {"blocks.0.f", "blocks.1.f"}


# the curve ------------------------------------------------------------------------------------------------


def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1300]], y[order[:1300]]), (x[order[1300:]], y[order[1300:]])


def trained(nested, steps=400):
    """An MLP on digits; nested: at each step the parameters of a width that is drawn are trained (SortedNet)."""
    (x, y), test = digits()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    circuit = cl.trace(model, x[:2])
    wires = [wire.name for wire in circuit.wires.values() if wire.permutable]
    cuts = [circuit.cut(dict.fromkeys(wires, width)) for width in ((8, 16, 32, 64) if nested else (64,))]
    small = [cut.apply(model) for cut in cuts]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        at, batch = int(torch.randint(len(cuts), ())), torch.randint(len(x), (128,))
        loss = F.cross_entropy(torch.func.functional_call(small[at], cuts[at].state(model), (x[batch],)), y[batch])
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return circuit, model, wires, test


def accuracy(model, test):
    return float((model(test[0]).argmax(1) == test[1]).float().mean())


def test_nested_training_keeps_accuracy_where_ordinary_training_does_not(tmp_path):
    found = {}
    for nested in (True, False):
        circuit, model, wires, test = trained(nested)
        quarter = circuit.cut(dict.fromkeys(wires, 0.25)).apply(model)
        found[nested] = (accuracy(model, test), accuracy(quarter, test))
    assert found[True][0] > 0.93 and found[True][1] > 0.9, found
    assert found[False][0] > 0.93 and found[False][1] < 0.75, found
    curve = width_curve(circuit, model, wires, (0.25, 0.5, 1.0), [test], "cross_entropy", progress=False)
    assert curve.loss("first", 2) == curve.whole and curve.loss("random", 2) == curve.whole
    assert all(curve.loss(keep, 0) > curve.loss(keep, 1) > curve.whole for keep in ("first", "norm", "random"))
    assert list(curve.flops) == sorted(curve.flops) and curve.flops[-1] == curve.whole_flops and curve.parameters[-1] == curve.whole_parameters
    assert WidthCurve.load(curve.save(tmp_path / "curve.safetensors")) == curve
    rows = curve.to_frame()
    assert len(rows) == len(curve.rows) == 3 + 3 + 3 + 3 + 1 and rows["share"].iloc[0] == 0.25
    for against in ("width", "flops", "parameters"):
        assert len(curve.plot(against).data) == 4
    with pytest.raises(InputError, match="against"):
        curve.plot("time")


def test_curve_does_not_depend_on_batches_and_says_what_is_wrong():
    model, args, _ = made("mlp")
    circuit = cl.trace(model, *args)
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    one = width_curve(circuit, model, "f", (2, 8), [(x, y)], "mse", progress=False)
    many = width_curve(circuit, model, "f", (2, 8), [(x[:7], y[:7]), (x[7:], y[7:])], "mse", progress=False)
    np.testing.assert_allclose([row[3] for row in one.rows], [row[3] for row in many.rows], rtol=1e-12)
    assert [row[:3] for row in one.rows if row[0] == "random"] == [("random", 0, 0), ("random", 0, 1), ("random", 0, 2), ("random", 1, 0)]
    for options, message in (
        ({"widths": (9,)}, "9 is not a number from 1 to 8"), ({"widths": ()}, "widths is empty"), ({"keep": ("best",)}, "keep=.*best"),
        ({"wire": "n"}, "cannot be cut"), ({"batches": []}, "batches is empty"),
    ):
        given = {"wire": "f", "widths": (2,), "batches": [(x, y)], "loss": "mse", "progress": False} | options
        with pytest.raises(InputError, match=message):
            width_curve(circuit, model, **given)


def test_importance_of_fused_parts():
    model, args, _ = made("fused")
    circuit = cl.trace(model, *args)
    found = importance(circuit, model, "k_2")
    weight = model.qkv.weight[24:].reshape(3, 4, 12).square().sum((0, 2)) + model.qkv.bias[24:].reshape(3, 4).square().sum(0)
    weight = weight + model.out.weight.reshape(12, 3, 4).square().sum((0, 1))
    np.testing.assert_allclose(found, weight.sqrt().detach().numpy(), rtol=1e-9)
