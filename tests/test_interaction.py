"""The interaction basis: its identities, against derivatives taken one by one, and on networks whose parts are known."""

import copy

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.func import jacrev

import circuitlab as cl
from circuitlab.analysis import jacobian
from circuitlab.analysis.interaction import InteractionBasis, interaction_affinity, interaction_basis
from circuitlab.errors import InputError


def net(act=nn.GELU, widths=(6, 16, 12, 4)):
    torch.manual_seed(0)
    layers = [nn.Linear(widths[0], widths[1])]
    for a, b in zip(widths[1:], widths[2:], strict=False):
        layers += [act(), nn.Linear(a, b)]
    return nn.Sequential(*layers).double()


def data(n, d, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(model, batches, *wires, **options):
    return interaction_basis(model, batches, *wires, progress=False, **dict(dict(steps=1), **options))


def identities(found, tolerance=1e-8):
    """The largest deviation from each of the three, relative to the numbers in it."""
    one = torch.eye(found.directions, dtype=torch.float64)
    gram = found.C.T @ found.gram @ found.C - found.eigenvalues.diag()
    moment = found.C_pinv @ found.moment @ found.C_pinv.T - one
    return float(gram.abs().max() / found.eigenvalues[0]), float(moment.abs().max()), float((found.C_pinv @ found.C - one).abs().max())


class Attends(nn.Module):
    """Values of a hidden wire act on other positions: a block, attention over positions, a block, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 5)
        self.key, self.value = nn.Linear(5, 7), nn.Linear(7, 5)
        self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def first(self, ids):
        return torch.tanh(self.key(self.embed(ids)))

    def then(self, ids, h, mask):
        x = self.embed(ids) + self.value(h)
        scores = x @ x.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -1e9)
        return torch.tanh(self.second(x + scores.softmax(-1) @ x))

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.then(input_ids, self.first(input_ids), attention_mask))


IDS = torch.randint(0, 11, (5, 4), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(5, 4, dtype=torch.long)
MASK[1, 2:] = MASK[4, 1:] = 0


# what it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_identities(act, centred):
    model, x = net(act), data(90, 6)
    hidden = model[:2](x).detach()
    found = basis(model, [(x,)], "0", "2", centred=centred)
    about = hidden - hidden.mean(0) if centred else hidden
    assert torch.allclose(found.gram, about.T @ about / 90, atol=1e-12)
    assert found.rank == 16
    assert found.directions <= 12  # the next wire has no more
    assert max(identities(found)) < 1e-8
    values = found.transform(hidden)
    assert torch.allclose(values.T @ values / 90, found.eigenvalues.diag(), atol=1e-10)
    assert torch.equal(found.eigenvalues, found.eigenvalues.sort(descending=True).values)


def test_against_derivatives_one_by_one():
    """M' and E over positions that act on each other, with padding, in batches of different sizes."""
    model = Attends().double()
    batches = [dict(input_ids=i, attention_mask=m) for i, m in zip(IDS.split(2), MASK.split(2), strict=True)]
    after = basis(model, batches, model_wire(model, "second"))
    found = basis(model, batches, model_wire(model, "key"), after, steps=3)
    assert basis(model, batches, model_wire(model, "key"), model_wire(model, "second"), steps=3).edges.equal(found.edges)
    points, weights = np.polynomial.legendre.leggauss(3)
    moment, squares, n = torch.zeros(7, 7).double(), torch.zeros(after.directions, found.directions).double(), int(MASK.sum())
    for ids, mask in zip(IDS, MASK, strict=True):
        h = model.first(ids).detach()

        def out(h):
            return (model.then(ids[None], h[None], mask[None])[0] @ after.C)[mask.bool()]

        full = jacrev(out)(h)[:, :, mask.bool()]  # (t, i, s, j)
        moment += torch.einsum("tisj,tisk->jk", full, full)
        total = 0
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            total = total + weight * jacrev(out)(found.mean + point * (h - found.mean))[:, :, mask.bool()] @ found.C_pinv.T
        squares += (total * found.transform(h)[mask.bool()]).sum(2).square().sum(0)
    assert found.n == n
    assert torch.allclose(found.moment, moment / n, atol=1e-12)
    assert torch.allclose(found.edges, (squares / n).sqrt(), atol=1e-12)


def model_wire(model, module):
    circuit = cl.trace(model, IDS[:2])
    return next(w for w in circuit.wires.values() if any(p[0] == f"{module}.weight" and p[1] == 0 for p in w.places))


@pytest.mark.parametrize(("sizes", "pulled"), [((1,) * 24, 2**28), ((7, 17), 1)])
def test_batches_do_not_matter(sizes, pulled, monkeypatch):
    monkeypatch.setattr(jacobian, "PULLED", pulled)
    model, x = net(widths=(4, 6, 5, 3)), data(24, 4)
    whole, split = basis(model, [(x,)], "0", "2", steps=2), basis(model, [(part,) for part in x.split(list(sizes))], "0", "2", steps=2)
    assert torch.allclose(whole.moment, split.moment, atol=1e-13)
    assert torch.allclose(whole.C, split.C, atol=1e-9)
    assert torch.allclose(whole.edges, split.edges, atol=1e-9)


def test_examples_that_mix_are_seen():
    """Whatever an example does to others of its batch counts."""

    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(widths=(4, 6, 3))

        def forward(self, x):
            y = self.net(x)
            return y - 0.5 * y.mean(0)

    model, x = Mixes(), data(9, 4)
    found = basis(model, [(x,)], "net")
    h = model.net[:2](x).detach()
    full = jacrev(lambda h: model.net[2](h) - 0.5 * model.net[2](h).mean(0))(h)
    assert torch.allclose(found.moment, torch.einsum("tisj,tisk->jk", full, full) / 9, atol=1e-12)


def test_positions_may_come_first():
    class Swapped(Attends):
        def forward(self, input_ids):
            h = self.first(input_ids.T)  # (positions, examples, neurons)
            y = self.value(h).transpose(0, 1)
            return self.head(torch.tanh(self.second(y.cumsum(1)))).transpose(0, 1)

    model = Swapped().double()
    found = basis(model, [IDS[:3], IDS[3:]], model_wire(model, "key"), output=lambda out: out.transpose(0, 1), steps=1)
    moment = torch.zeros(7, 7).double()
    for ids in IDS:
        full = jacrev(lambda h: model.head(torch.tanh(model.second(model.value(h).cumsum(0)))))(model.first(ids).detach())
        moment += torch.einsum("tisj,tisk->jk", full, full)
    assert torch.allclose(found.moment, moment / IDS.numel(), atol=1e-12)
    assert found.n == IDS.numel()


def test_values_that_two_maps_read():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.key, self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 2).double(), nn.Linear(6, 3).double()

        def then(self, h):
            return torch.cat([torch.tanh(self.a(h)), torch.sin(self.b(h))], -1)

        def forward(self, x):
            return self.then(torch.relu(self.key(x)))

    model, x = Two(), data(20, 4)
    full = jacrev(lambda h: model.then(h))(torch.relu(model.key(x)).detach()).diagonal(dim1=0, dim2=2)
    found = basis(model, [(x,)], "f", tolerance=0.0)
    assert torch.allclose(found.moment, torch.einsum("ijt,ikt->jk", full, full) / 20, atol=1e-12)


def test_a_direction_is_as_large_as_it_matters():
    """Squared edges of derivatives sum to the eigenvalue, and are those of integrated gradients in a linear section."""
    model, x = net(), data(80, 6)
    found = basis(model, [(x,)], "0", "2", edges="jacobian")
    assert torch.allclose(found.edges.square().sum(0), found.eigenvalues, atol=1e-12)
    last = basis(model, [(x,)], "2", edges="jacobian")
    assert torch.allclose(last.edges, basis(model, [(x,)], "2").edges, atol=1e-12)
    assert last.directions == 4  # of 12: as many as there are outputs


# networks whose parts are known -----------------------------------------------------------------------


BLOCKS = ((3, 4, 3, 4, 2), (2, 3, 3, 4, 2))


def rotation(n, seed=5):
    return torch.linalg.qr(data(n, n, seed)).Q


def modular(turn, undo):
    """Two networks side by side that share nothing; their wires of three neurons each are mixed, by ``turn``, and unmixed."""
    parts = [net(nn.GELU, (a, b, c)) for a, b, c, *_ in BLOCKS]
    torch.manual_seed(1)
    tails = [nn.Sequential(nn.Linear(c, d), nn.GELU(), nn.Linear(d, e)).double() for _, _, c, d, e in BLOCKS]
    made = [nn.Linear(sum(p[n].in_features for p in ps), sum(p[n].out_features for p in ps)).double()
            for ps, n in ((parts, 0), (parts, 2), (tails, 0), (tails, 2))]
    with torch.no_grad():
        for layer, (ps, n) in zip(made, ((parts, 0), (parts, 2), (tails, 0), (tails, 2)), strict=True):
            layer.weight.copy_(torch.block_diag(*(p[n].weight for p in ps)))
            layer.bias.copy_(torch.cat([p[n].bias for p in ps]))
        made[1].weight.copy_(turn @ made[1].weight)
        made[1].bias.copy_(turn @ made[1].bias)
        made[2].weight.copy_(made[2].weight @ undo)
    return nn.Sequential(made[0], nn.GELU(), made[1], made[2], nn.GELU(), made[3])


def crossed(n=7):
    """Inputs of both parts, each of one with each of the other: independent, exactly."""
    a, b = data(n, BLOCKS[0][0], 7), data(n, BLOCKS[1][0], 8)
    return torch.cat([a.repeat_interleave(n, 0), b.repeat(n, 1)], 1)


def wires_of(model, x):
    """The mixed wire, and the hidden wire after it."""
    circuit = cl.trace(model, x[:2])
    return [next(w for w in circuit.wires.values() if any(p[0] == name and p[1] == 0 for p in w.places)) for name in ("2.weight", "3.weight")]


def parts_of(edges):
    """Number of parts of the graph of edges."""
    affinity = edges > 1e-7 * edges.max()
    graph = torch.zeros(sum(edges.shape), sum(edges.shape))
    graph[edges.shape[1] :, : edges.shape[1]] = affinity
    return connected_components(graph.numpy(), directed=False)[0]


def test_parts_that_no_neuron_shows():
    turn, x = rotation(6), crossed()
    model = modular(turn, turn.T)
    mixed, after = wires_of(model, x)
    hidden = model[:3](x)
    assert float((jacrev(lambda h: model[3](h))(hidden[0]) != 0).double().mean()) == 1  # each neuron acts on each of the next
    found = basis(model, [(x,)], mixed, after)
    assert max(identities(found)) < 1e-8
    assert found.directions == 6
    side = (found.C.T @ turn).square()  # which part each direction is of
    first = side[:, :3].sum(1) / side.sum(1)
    assert bool(((first < 1e-9) | (first > 1 - 1e-9)).all())
    assert parts_of(found.edges) == 2
    assert parts_of(basis(model, [(x,)], mixed).edges) >= 2


def test_invariant_to_what_does_not_change_the_network():
    x = crossed()
    turn = data(6, 6, 9) + 2 * torch.eye(6)
    plain, other = modular(torch.eye(6).double(), torch.eye(6).double()), modular(turn, turn.inverse())
    assert torch.allclose(plain(x), other(x), atol=1e-9)
    one, two = (basis(model, [(x,)], *wires_of(model, x)) for model in (plain, other))
    assert torch.allclose(one.eigenvalues, two.eigenvalues, rtol=1e-7)
    assert torch.allclose(one.edges, two.edges, atol=1e-8)
    assert torch.allclose(one.transform(plain[:3](x)).abs(), two.transform(other[:3](x)).abs(), atol=1e-7)
    relu = net(nn.ReLU)
    scaled = copy.deepcopy(relu)
    order, scale = torch.randperm(16, generator=torch.Generator().manual_seed(0)), data(16, 1).abs() + 0.5
    with torch.no_grad():
        scaled[0].weight.copy_((relu[0].weight * scale)[order])
        scaled[0].bias.copy_((relu[0].bias * scale[:, 0])[order])
        scaled[2].weight.copy_((relu[2].weight / scale[:, 0])[:, order])
    x = data(100, 6)
    one, two = (basis(model, [(x,)], "0", "2") for model in (relu, scaled))
    assert torch.allclose(one.eigenvalues, two.eigenvalues, rtol=1e-7)
    assert torch.allclose(one.edges, two.edges, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_that_do_nothing_are_dropped(dtype):
    """Activations that are linearly dependent, and activations that nothing reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
    x = data(50, 4).to(dtype)
    circuit = cl.trace(model, x)
    wide = next(w for w in circuit.wires.values() if ("0.weight", 0) in [p[:2] for p in w.places])
    found = basis(model, [(x,)], wide, "f_2")
    assert (found.size, found.rank, found.directions) == (9, 4, 4)
    assert max(identities(found)) < 1e-8
    with torch.no_grad():
        model[3].weight[:, 3:] = 0  # the next wire has three neurons that matter
        model[1].weight[:3] = 0
        model[1].weight[0, 0] = model[1].weight[1, 1] = 1
    found = basis(model, [(x,)], wide, "f_2")
    assert (found.rank, found.directions) == (4, 2)
    assert max(identities(found)) < 1e-8
    hidden = model[0](x)
    kept = found.inverse(found.transform(hidden)).to(dtype)
    assert not torch.allclose(kept, hidden, atol=1e-3)
    assert torch.allclose(model[1:](kept), model[1:](hidden), atol=1e-5)


def test_controls_are_networks_of_the_same_weights():
    turn, x = rotation(6), crossed()
    found = basis(modular(turn, turn.T), [(x,)], *wires_of(modular(turn, turn.T), x), controls=3, steps=2)
    plain = basis(modular(turn, turn.T), [(x,)], *wires_of(modular(turn, turn.T), x), steps=2)
    assert torch.equal(found.edges, plain.edges)
    assert parts_of(found.edges) == 2
    assert [parts_of(control.edges) for control in found.controls] == [1, 1, 1]


@pytest.mark.parametrize("nodes", ["both", "directions", "neurons"])
def test_affinity(nodes):
    x = crossed()
    model = modular(torch.eye(6).double(), torch.eye(6).double())
    found = basis(model, [(x,)], *wires_of(model, x), steps=2)
    affinity = interaction_affinity(found, nodes)
    assert torch.equal(affinity, affinity.T)
    assert float(affinity.diagonal().abs().max()) == 0
    assert float(affinity.min()) >= 0
    assert connected_components((affinity > 1e-9 * affinity.max()).numpy(), directed=False)[0] == 2
    assert len(affinity) == dict(both=sum(found.edges.shape), directions=found.directions, neurons=6)[nodes]
    if nodes == "neurons":
        assert bool((affinity[:3, 3:] < 1e-9 * affinity.max()).all())


# how it behaves ---------------------------------------------------------------------------------------


def test_the_model_is_left_alone():
    model, x = net(), data(20, 6)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model.register_buffer("extra", torch.zeros(3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    with torch.no_grad(), torch.inference_mode():
        basis(model, [(x,)], "0", "2", controls=2, steps=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[0].weight.requires_grad
    assert bool((model[0].weight.grad == 1).all())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_inference(model[0].weight)
    calls = []

    def fails(output):
        calls.append(1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        basis(model, [(x,)], "2", output=fails, controls=1)
    assert calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saved_and_loaded(tmp_path):
    found = basis(net(), [(data(30, 6),)], "2", controls=1, steps=1)
    back = InteractionBasis.load(found.save(tmp_path / "basis.safetensors"))
    assert torch.equal(back.edges, found.edges)
    assert torch.equal(back.controls[0].edges, found.controls[0].edges)
    assert repr(back) == repr(found)
    frame = found.to_frame()
    assert frame["edge"].is_monotonic_decreasing
    assert len(frame) == found.edges.numel()
    row = frame.iloc[0]
    assert row["edge"] == float(found.edges[int(row["to"]), int(row["from"])])


class Twice(nn.Module):
    def __init__(self, detach=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.detach = detach

    def block(self, x):
        return self.b(torch.relu(self.a(x)))

    def forward(self, x):
        y = self.block(x)
        return self.c(torch.tanh(y.detach() if self.detach else self.block(y)))


@pytest.mark.parametrize(
    ("make", "wires", "options", "words"),
    [
        (net, ("0",), dict(edges="all"), "'integrated' or 'jacobian'"),
        (net, ("0",), dict(steps=0), "steps=0"),
        (net, ("0",), dict(tolerance=2.0), "tolerance=2.0"),
        (net, ("nothing",), {}, "no wire of Sequential.*f, f_2"),
        (net, ("0", "0"), {}, "give a later one"),
        (net, ("2", "0"), {}, "later wire must come second"),
        (net, ("0", "2"), dict(memory=10_000), "16 directions.*memory=10000.*which is 12"),
        (net, ("2",), dict(memory=1000, output=lambda out: out), "memory=1000"),
        (net, ("2",), dict(output=lambda out: 3), "output=function"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)).double().apply(zero), ("f",), {},
         "constant"),
        (lambda: net(widths=(6, 5, 4)).apply(late_zero), ("f",), {}, "same for all inputs"),
    ],
)
def test_bad_input(make, wires, options, words):
    with pytest.raises(InputError, match=words):
        basis(make(), [(data(10, 6),)], *wires, **options)


def zero(module):
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)


def late_zero(module):
    if isinstance(module, nn.Linear) and module.out_features == 4:
        nn.init.zeros_(module.weight)


def test_values_that_cannot_be_differentiated():
    with pytest.raises(InputError, match="without gradients"):
        basis(Twice(detach=True).double(), [(data(10, 4),)], "f")
    with pytest.raises(InputError, match="2 times"):
        basis(Twice().double(), [(data(10, 4),)], "f")
    with pytest.raises(InputError, match="walked only once"):
        basis(net(), iter([(data(10, 6),)]), "0")
    with pytest.raises(InputError, match="empty"):
        basis(net(), [], "0")
    bad = data(10, 6)
    bad[3, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        basis(net(), [(bad,)], "0")


def side_by_side(parts=3):
    """A network of equal parts that share nothing."""
    model = net(widths=(12, 24, 18, 6))
    with torch.no_grad():
        for layer in model[::2]:
            out, own = (torch.arange(size) * parts // size for size in layer.weight.shape)
            layer.weight *= (out[:, None] == own) * parts**0.5
    return model


def test_partition_compares_a_basis_with_its_controls():
    found = basis(side_by_side(), [(data(1500, 12),)], "0", "2", controls=19)
    part = cl.partition(found, method="interaction", progress=False)
    assert part.control == "networks of the same weights" and len(part.null) == 19 and part.wire == found.wire
    assert part.significant and part.k == 3 and (part.labels.reshape(3, 8) == part.labels[::8, None]).all()
    both = cl.partition(found, method="interaction", nodes="both", progress=False)
    assert both.significant and both.wire == "" and len(both.labels) == sum(found.edges.shape)
    assert len(cl.partition(found, method="interaction", controls=3, progress=False).null) == 3
    with pytest.raises(InputError, match="interaction"):
        cl.partition(found, "keys")


def test_a_basis_without_controls_or_modules_is_not_believed():
    plain = basis(net(), [(data(60, 6),)], "0", "2")
    assert not cl.partition(plain, method="interaction", controls=0, progress=False).significant
    with pytest.raises(InputError, match="controls=19"):
        cl.partition(plain, method="interaction")
    found = [basis(net(widths=(6, 16, 12, 4)), [(data(60, 6, seed),)], "0", "2", controls=19, seed=seed) for seed in range(2)]
    assert not all(cl.partition(one, method="interaction", progress=False).significant for one in found)
