"""Matching two models: a permuted copy comes back bit for bit, models of different seeds come nearer, and what is refused."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

import circuitlab as cl
from circuitlab.analysis import alignment
from circuitlab.analysis.alignment import Alignment
from circuitlab.analysis.alignment_soft import Sinkhorn
from circuitlab.analysis.matching import Match
from circuitlab.gallery import digits
from tests.test_symmetry import ZOO


def made(name, seed=0):
    """A model whose norms and statistics are no longer as they are made, inputs, and its symmetry."""
    torch.manual_seed(seed)
    make, values, *_ = ZOO[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.ndim == 1:
                buffer.uniform_(0.5, 2)
    x = values()
    x = x.float() if x.is_floating_point() else x
    return model, x, cl.trace(model, x).symmetry()


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def rising(history):
    return all(after >= before - 1e-6 * abs(before) for before, after in itertools.pairwise(history))


class GroupedQueries(nn.Module):
    """Four query heads share two key-value heads; queries and keys are free to be permuted within heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 32), nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(32, 12)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.q(x).view(b, n, 2, 2, 8), self.k(x).view(b, n, 2, 8), self.v(x).view(b, n, 2, 8)
        weights = (torch.einsum("bihgk,bjhk->bhgij", q, k) / math.sqrt(8)).softmax(-1)
        return self.o(torch.einsum("bhgij,bjhv->bihgv", weights, v).reshape(b, n, 32))


# a permuted copy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_a_permuted_copy_comes_back_bit_for_bit(name):
    for seed in range(2):
        model, x, symmetry = made(name, seed)
        other = symmetry.apply(model, symmetry.random(seed + 1))
        assert not equal(model, other)
        match = cl.match(model, other, x)
        assert equal(model, match.apply(other))
        assert match.distance[0] > 0 == match.distance[1]
        assert set(match.permutations) == set(symmetry.wires)
        assert match.frozen == symmetry.frozen
        assert all(match.frozen.values())


@pytest.mark.parametrize("name", ["mlp", "resnet", "vision", "llama", "gpt_tied", "grouped", "moe", "lstm"])
def test_descent_from_the_identity_never_falls_and_finds_it_too(name):
    from circuitlab.analysis import alignment_arrays as arrays

    model, x, symmetry = made(name)
    other = symmetry.apply(model, symmetry.random(3))
    state = arrays.states(model, other, symmetry)
    found = Alignment(arrays.terms(symmetry, state), *arrays.wired(symmetry))
    starts = [{}, *(symmetry.random(seed) for seed in range(20))]
    generator = torch.Generator().manual_seed(0)
    value, element, histories = found.best(starts, generator)
    assert all(map(rising, histories))
    assert math.isclose(value, found.bound, rel_tol=1e-6)
    assert equal(model, symmetry.apply(other, element))


def test_heads_whose_wires_meet_in_an_array_come_back():
    torch.manual_seed(0)
    model, x = GroupedQueries().eval(), torch.randn(2, 5, 12)
    symmetry = cl.trace(model, x).symmetry()
    assert sorted(map(symmetry.shape, symmetry.wires)) == [(2,), (2, 2), (2, 8), (2, 8)]
    for seed in range(4):
        other = symmetry.apply(model, symmetry.random(seed))
        assert equal(model, cl.match(model, other, x, seed=seed).apply(other))


def test_a_trained_model_comes_back(data):
    for make in (lambda: digits.MLP(32), lambda: digits.CNN(8, nn.BatchNorm2d), lambda: digits.Transformer(16, 2, 1)):
        model = digits.train(make, data, epochs=2)
        x = data.test[0][:2]
        symmetry = cl.trace(model, x).symmetry()
        other = symmetry.apply(model, symmetry.random(1))
        assert equal(model, cl.match(model, other, x).apply(other))


def test_units_that_a_product_cannot_tell_apart_are_told_apart():
    """Weight decay leaves units whose weights are far below the rounding of others; and equal ones by their statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for side in (model[0].weight, model[0].bias, model[2].weight.T):
            side[:5] *= 1e-18
        for side in (model[2].weight, model[2].bias, model[5].weight.T):
            side[:4] = side[0]
        model[3].running_mean.normal_()
    x = torch.randn(3, 6)
    symmetry = cl.trace(model, x).symmetry()
    for seed in range(3):
        other = symmetry.apply(model, symmetry.random(seed))
        assert equal(model, cl.match(model, other, x).apply(other))


def test_permutations_of_other_types():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float64):
        model, x = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 4)).to(dtype), torch.randn(3, 6, dtype=dtype)
        symmetry = cl.trace(model, x).symmetry()
        other = symmetry.apply(model, symmetry.random(1))
        assert equal(model, cl.match(model, other, x).apply(other))


class Biased(nn.Module):
    """Each head sees with a slope of its own, so that heads cannot be permuted, and the entries of each can."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        distance = torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]
        slopes = 2.0 ** -torch.arange(1, 4)
        return self.o(((q @ k.mT - distance.abs() * slopes[:, None, None]).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", ["weights", "activations", "sinkhorn", "straight-through"])
def test_wires_within_a_frozen_one(method):
    torch.manual_seed(0)
    model, given = Biased().eval(), [(torch.randn(2, 5, 12), torch.zeros(2, 5, 12)) for _ in range(3)]
    symmetry = cl.trace(model, given[0][0]).symmetry()
    assert sorted(map(symmetry.shape, symmetry.wires)) == [(3, 4), (3, 4)]
    other = symmetry.apply(model, symmetry.random(1))
    match = cl.match(model, other, method=method, batches=given, loss="mse", steps=2, progress=False)
    assert equal(model, match.apply(other))
    assert any("numbers its entries" in why for why in match.frozen.values())


# against all permutations -----------------------------------------------------------------------------


def test_one_wire_is_matched_as_well_as_any_permutation_can():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(2))
    match = cl.match(a, b, torch.zeros(1, 3))

    @torch.no_grad()
    def distance(order):
        rows = [(a[0].weight, b[0].weight), (a[0].bias, b[0].bias), (a[2].weight.T, b[2].weight.T)]
        return math.sqrt(sum(float(((one - two[list(order)]) ** 2).sum()) for one, two in rows))

    best = min(itertools.permutations(range(6)), key=distance)
    assert match.permutations["f"].tolist() == list(best)
    # the readout's bias has no wire
    assert math.isclose(match.distance[1], distance(best), rel_tol=1e-5)
    assert math.isclose(match.distance[0], distance(range(6)), rel_tol=1e-5)


@pytest.mark.parametrize("many", [False, True])
def test_heads_are_judged_by_the_best_order_within_each_pair(many, monkeypatch):
    """All ways to match 3 heads of 3 entries, by brute force; and by bounds, where pairs are too many to be solved."""
    if many:
        monkeypatch.setattr(alignment, "PAIRS", 0)
    generator = torch.Generator().manual_seed(0)
    exact = 0
    for _ in range(8):
        a, b = (torch.randn(3, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
        scores = torch.einsum("hkr,ijr->hikj", a, b).numpy()
        pairs = np.zeros((3, 3))
        for h, i in itertools.product(range(3), repeat=2):
            rows, columns = linear_sum_assignment(scores[h, i], maximize=True)
            pairs[h, i] = scores[h, i][rows, columns].sum()
        best = max(sum(pairs[h, order[h]] for h in range(3)) for order in itertools.permutations(range(3)))
        found = Alignment([(a, b, ("h", "k", ""))], {"h": 3, "k": 3}, {"k": ("h",)}, ("h", "k"))
        value, element, histories = found.best([{}], None)
        assert rising(histories[0])
        permuted = torch.stack([b[element["h"][h]][element["k"][h]] for h in range(3)])
        assert math.isclose(value, float((a * permuted).sum()), rel_tol=1e-9)
        exact += math.isclose(value, best, rel_tol=1e-9)
        assert value <= best + 1e-9
    assert exact == 8 or (many and exact >= 4)


def test_three_levels_of_wires():
    """Groups, in them heads, in them entries."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    within = {"h": ("g",), "k": ("g", "h")}
    found = Alignment([(a, a, ("g", "h", "k", ""))], {"g": 3, "h": 4, "k": 5}, within, ("g", "h", "k"))
    found.permute("g", torch.randperm(3, generator=generator))
    found.permute("h", torch.stack([torch.randperm(4, generator=generator) for _ in range(3)]))
    found.permute("k", torch.stack([torch.randperm(5, generator=generator) for _ in range(12)]).view(3, 4, 5))
    other = found.terms[0].b
    again = Alignment([(a, other, ("g", "h", "k", ""))], {"g": 3, "h": 4, "k": 5}, within, ("g", "h", "k"))
    for start in (None, {}):
        assert math.isclose(again.best([start], None)[0], float((a * a).sum()), rel_tol=1e-9)
        assert torch.equal(again.terms[0].b, a)


# models of different seeds ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return digits.digits()


@pytest.fixture(scope="module")
def pair(data):
    return [digits.train(lambda: digits.MLP(32), data, seed, epochs=25) for seed in (0, 1)]


def loss_of(model, batch):
    with torch.no_grad():
        return float(F.cross_entropy(model(batch[0]), batch[1]))


def barrier(a, b, batch):
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for one, two in zip(middle.parameters(), b.parameters(), strict=True):
            one.lerp_(two, 0.5)
    return loss_of(middle, batch) - (loss_of(a, batch) + loss_of(b, batch)) / 2


def batches(data, size=128):
    x, y = data.train
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize(("method", "options"), [
    ("weights", {}),
    ("activations", {}),
    ("sinkhorn", {"steps": 40}),
    ("sinkhorn", {"loss": "cross_entropy", "steps": 40}),
    ("straight-through", {"loss": "cross_entropy", "steps": 25}),
])
def test_the_barrier_falls(method, options, data, pair):
    a, b = pair
    given = [data.test[0][:2]] if "loss" not in options and method != "activations" else []
    if not given:
        options = {**options, "batches": batches(data)}
    match = cl.match(a, b, *given, method=method, progress=False, **options)
    aligned = match.apply(b)
    assert barrier(aligned, b, data.test) > 0  # the copy is another point of parameter space
    assert torch.allclose(aligned(data.test[0]), b(data.test[0]), atol=1e-4)
    assert barrier(a, aligned, data.test) < 0.35 * barrier(a, b, data.test)
    assert match.distance[1] < 0.8 * match.distance[0]
    history = match.objective[match.best]
    assert rising(history) if method in ("weights", "activations") else history[-1] == min(history)


def test_gradients_find_less_loss_half_way_than_weights_do(data, pair):
    a, b = pair
    match = cl.match(a, b, method="straight-through", batches=batches(data), loss="cross_entropy", steps=40, progress=False)
    by_weights = match.objective[0][0]
    assert match.objective[0][-1] < by_weights
    middle = copy.deepcopy(a)
    aligned = match.apply(b)
    with torch.no_grad():
        for one, two in zip(middle.parameters(), aligned.parameters(), strict=True):
            one.lerp_(two, 0.5)
    seen = (torch.cat([x for x, _ in batches(data)[:8]]), torch.cat([y for _, y in batches(data)[:8]]))
    assert math.isclose(loss_of(middle, seen), match.objective[0][-1], rel_tol=1e-4)


def test_the_best_start_is_kept_and_a_seed_gives_one_answer(data, pair):
    a, b = pair
    x = data.test[0][:2]
    before = torch.get_rng_state()
    one, two = (cl.match(a, b, x, restarts=5, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one.permutations[name], two.permutations[name]) for name in one.permutations)
    assert len(one.objective) == 6
    assert one.objective[one.best][-1] == max(row[-1] for row in one.objective)
    assert len({row[0] for row in one.objective}) == 6
    assert one.objective == two.objective
    assert cl.match(a, b, x, restarts=0).objective == one.objective[:1]


def test_batch_norm_statistics_and_modes_are_left_alone(data):
    a, b = (digits.train(lambda: digits.CNN(8, nn.BatchNorm2d), data, seed, epochs=1) for seed in (0, 1))
    a.train()
    a.zero_grad()
    given = batches(data, 240)
    grads = [[parameter.grad for parameter in model.parameters()] for model in (a, b)]
    states = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    for method in ("weights", "activations", "sinkhorn", "straight-through"):
        cl.match(a, b, method=method, batches=given, loss="cross_entropy", steps=2, progress=False)
    for model, state, held in zip((a, b), states, grads, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is grad and parameter.requires_grad for parameter, grad in zip(model.parameters(), held, strict=True))
    assert all(module.training for module in a.modules())
    assert not any(module.training for module in b.modules())


@pytest.mark.parametrize("method", ["activations", "sinkhorn", "straight-through"])
def test_an_interrupted_search_leaves_the_models(method, data, pair):
    a, b = pair
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    state = torch.get_rng_state()

    class Stopped(list):
        def __iter__(self):
            yield self[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cl.match(a, b, data.test[0][:2], method=method, batches=Stopped(batches(data)), loss="cross_entropy", progress=False)
    for model, kept in zip((a, b), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "vision", "llama", "gpt_tied", "groupnorm", "depthwise", "encoder", "moe", "dense"])
def test_activations_find_a_permuted_copy(name):
    model, x, symmetry = made(name)
    given = [(x, 0)] + [(made(name, seed)[1], 0) for seed in range(1, 6)]
    model.train()
    with torch.no_grad():
        for _ in range(20):
            for inputs, _ in given:
                model(inputs)  # statistics that fit, or whole layers would never fire
    other = symmetry.apply(model, symmetry.random(2))
    match = cl.match(model, other, method="activations", batches=given, progress=False)
    assert equal(model, match.apply(other))


def test_batches_of_different_sizes_count_by_their_examples(pair, data):
    a, b = pair
    x, y = data.train
    whole = cl.match(a, b, method="activations", batches=[(x, y)], progress=False)
    parts = cl.match(a, b, method="activations", batches=[(x[:7], y[:7]), (x[7:900], y[7:900]), (x[900:], y[900:])], progress=False)
    assert math.isclose(whole.objective[whole.best][-1], parts.objective[parts.best][-1], rel_tol=1e-9)
    assert all(torch.equal(whole.permutations[name], parts.permutations[name]) for name in whole.permutations)
    # and it is the correlation of what the first hidden wire holds
    with torch.no_grad():
        values = [(model.first(x.flatten(1)), model.first(x.flatten(1)).relu()) for model in (a, b)]
    total = 0
    for one, two in zip(*values, strict=True):
        found = np.corrcoef(one.double().T, two.double().T)[:32, 32:]
        total = total + np.nan_to_num(found)
    assert whole.permutations["f"].tolist() == linear_sum_assignment(total, maximize=True)[1].tolist()


def test_the_gradient_of_sinkhorn():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    matrix = Sinkhorn.apply(logits)
    assert torch.allclose(matrix.sum(-1), torch.ones(2, 5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(matrix.sum(-2), torch.ones(2, 5, dtype=torch.float64), atol=1e-5)
    assert torch.autograd.gradcheck(Sinkhorn.apply, (logits,), atol=1e-4, rtol=1e-3)


# the result -------------------------------------------------------------------------------------------


def test_it_is_saved_loaded_tabulated_and_drawn(tmp_path):
    model, x, symmetry = made("vision")
    other = symmetry.apply(model, symmetry.random(1))
    match = cl.match(model, other, x)
    again = Match.load(match.save(tmp_path / "match.safetensors"))
    assert equal(again.apply(other), model)
    assert again.frozen == match.frozen
    assert again.objective == match.objective
    table = match.to_frame().set_index("wire")
    assert table.loc["d", "after"] == pytest.approx(1)
    assert table.loc["d", "before"] < 0.5
    assert table.loc["d", "moved"] == float((match.permutations["d"] != torch.arange(12)).double().mean())
    assert "by their number" in " ".join(table["frozen"])
    assert "d (12,)" in repr(match)
    assert "is frozen" in repr(match)
    figure = match.plot()
    assert list(figure.data[2].y) == list(match.permutations)
    assert np.allclose(figure.data[2].x, 1)


def test_parameters_that_the_run_does_not_read_are_told():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(self.a(x).relu())

    match = cl.match(Two(), Two(), torch.randn(2, 3))
    assert match.unread == ("spare.weight", "spare.bias")
    assert "spare.weight" in repr(match)


# bad input --------------------------------------------------------------------------------------------


def mlp(width=5, act=nn.ReLU, last=2):
    return nn.Sequential(nn.Linear(3, width), act(), nn.Linear(width, last))


class Headed(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def broken(value):
    model = mlp()
    model[2].weight.data[0, 0] = value
    return model


X = torch.zeros(2, 3)


@pytest.mark.parametrize(("one", "two", "options", "message"), [
    (mlp(), mlp(7), {}, r"wires f \(5 and 7\) differ in size; in shape differ 0.weight \[5, 3\] and \[7, 3\]"),
    (mlp(), nn.Sequential(*mlp(), nn.Linear(2, 2)), {}, "different architectures: only model_b has 3.weight, 3.bias"),
    (mlp(), mlp(act=nn.GELU), {}, "where model_a computes relu in '1.relu'.* model_b computes gelu"),
    (mlp(), broken(math.nan), {}, "'2.weight' of model_b has values that are not finite"),
    (broken(math.inf), mlp(), {}, "'2.weight' of model_a has values that are not finite"),
    (mlp(), mlp().to("meta"), {}, "'0.weight' of model_b is on the meta device"),
    (mlp(), mlp(), {"method": "weight"}, "method='weight' is not known; give one of 'weights', 'activations'"),
    (mlp(), mlp(), {"method": "activations"}, "give batches="),
    (mlp(), mlp(), {"method": "straight-through"}, "give batches="),
    (mlp(), mlp(), {"method": "activations", "batches": []}, "batches is empty"),
    (mlp(), mlp(), {"method": "sinkhorn", "batches": iter([X])}, "can be walked only once"),
    (mlp(), mlp(), {"restarts": -1}, "restarts=-1 must be a whole number"),
    (mlp(), mlp(), {"method": "sinkhorn", "steps": 0}, "steps=0"),
    (mlp(), mlp(), {"method": "sinkhorn", "rate": -1.0}, "rate=-1.0"),
    (mlp(), "b", {}, "model_b must be a torch.nn.Module"),
    (nn.Linear(3, 2), nn.Linear(3, 2), {}, "no wire that can be permuted"),
    (mlp(), mlp(), {"method": "straight-through", "batches": [(X, X)]}, "no loss of its own"),
    (mlp(), mlp(), {"method": "sinkhorn", "batches": [(X, X)], "loss": lambda output, batch: output.argmax(-1).float().mean()}, "has no gradient"),
])
def test_what_cannot_be_matched_is_an_error(one, two, options, message):
    with pytest.raises(cl.CircuitlabError, match=message):
        cl.match(one, two, X, **options)


def test_one_module_twice_and_other_heads_are_errors():
    model = mlp()
    with pytest.raises(cl.CircuitlabError, match="are the same module"):
        cl.match(model, model, X)
    with pytest.raises(cl.CircuitlabError, match="number of heads"):
        cl.match(Headed(3), Headed(4), torch.randn(2, 5, 12))
    with pytest.raises(TypeError, match="restart"):
        cl.match(model, mlp(), X, restart=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moves_in_single(dtype):
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype) for _ in range(2))
    batches = [(torch.randn(9, 6).to(dtype), torch.arange(9) % 3)]
    for method in ("sinkhorn", "straight-through"):
        match = cl.match(a, b, method=method, batches=batches, loss="cross_entropy", steps=20, progress=False)
        assert all(math.isfinite(value) for value in match.objective[0])
        torch.testing.assert_close(match.apply(b)(batches[0][0]), b(batches[0][0]))


@pytest.mark.parametrize("method", ["sinkhorn", "straight-through"])
def test_a_loss_that_is_no_number_is_told(method):
    a, b = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    with pytest.raises(cl.CircuitlabError, match=r"the loss half-way between the models is nan"):
        cl.match(a, b, method=method, batches=[torch.randn(4, 6)], loss=lambda output, batch: output.sum() * math.nan, steps=3, progress=False)


def test_a_batch_of_one_example_is_left_out_where_batchnorm_takes_its_statistics():
    a, b = (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(2))
    x = torch.randn(9, 6)
    found = [cl.match(a, b, method="straight-through", batches=batches, loss=lambda out, batch: out.square().mean(), steps=4, progress=False)
             for batches in ([x[:1], x[1:]], [x[1:]])]
    assert found[0].objective == found[1].objective
    with pytest.raises(cl.CircuitlabError, match="no batch has 2 examples"):
        cl.match(a, b, method="straight-through", batches=[x[:1]], loss=lambda out, batch: out.square().mean(), progress=False)
