"""Functional neurons against scikit-learn, calibration without any, and what is lost without neurons."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

import circuitlab as cl
from circuitlab.analysis.functional import Functional, average_precision, functional
from circuitlab.analysis.neurons import BINS, observe
from circuitlab.analysis.prune import PruneMatrix, prune_matrix


class Given(nn.Module):
    """A block whose hidden values are the inputs, or the positive part of them."""

    def __init__(self, neurons, act=nn.ReLU, outputs=3):
        super().__init__()
        self.key, self.act, self.value = nn.Linear(neurons, neurons, bias=False), act(), nn.Linear(neurons, outputs)
        with torch.no_grad():
            self.key.weight.copy_(torch.eye(neurons))

    def forward(self, x):
        return self.value(self.act(self.key(x)))


class Gated(nn.Module):
    def __init__(self, neurons):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(neurons, neurons, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def seen(h, labels, model=None, **options):
    return observe(model or Given(h.shape[1]), [h], labels=labels, progress=False, **options)["f"]


def values(n=400, f=24, seed=0):
    """Values of neurons, and labels 0, 1, 2, of which neurons 0-4 detect 0, and 5-9 detect 1."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=rng)
    h = torch.randn(n, f, generator=rng)
    h[:, 0:5] += 2 * (labels == 0)[:, None]
    h[:, 5:10] += 2 * (labels == 1)[:, None]
    return h, labels


def binned(h):
    edges = torch.tensor([-edge for edge in reversed(BINS)] + list(BINS))
    return torch.bucketize(h, edges).numpy()


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Tanh])
def test_average_precision_is_that_of_scikit_learn(act):
    h, labels = values()
    model = Given(24, act)
    got = functional(seen(h, labels, model))
    hidden = model.act(h).detach()
    same = np.array([[average_precision_score(labels == k, column) for column in binned(hidden).T] for k in range(3)])
    assert np.allclose(got.precision, same, atol=1e-12)
    near = np.array([[average_precision_score(labels == k, column) for column in hidden.numpy().T] for k in range(3)])
    assert np.abs(got.precision - near).max() < 0.04
    assert got.by == "value"
    assert np.allclose(got.chance, [float((labels == k).double().mean()) for k in range(3)])


def test_gated_blocks_detect_by_magnitude():
    h, labels = values()
    model = Gated(24)
    got = functional(observe(model, [h], labels=labels, progress=False)["f"])
    hidden = (nn.functional.silu(model.gate(h)) * model.up(h)).abs().detach().numpy()
    near = np.array([[average_precision_score(labels == k, column) for column in hidden.T] for k in range(3)])
    assert got.by == "magnitude"
    assert np.abs(got.precision - near).max() < 0.04
    assert functional(observe(model, [h], labels=labels, progress=False)["f"], by="value").by == "value"


def test_positions_without_a_label_do_not_count():
    h, labels = values()
    some = torch.where(torch.arange(400) % 4 == 0, -1, labels)
    keep = some >= 0
    assert np.allclose(functional(seen(h, some)).precision, functional(seen(h[keep], labels[keep])).precision)


def test_neurons_that_detect_are_found():
    h, labels = values(2000)
    h[:, 23] = -1  # dead
    got = seen(h, labels).functional(share=0.2)
    assert set(got.sets["0"]) == set(range(5))
    assert set(got.sets["1"]) == set(range(5, 10))
    assert 23 not in got.top("2", 24)
    assert not got.live[23]
    assert np.all(np.diff(got.precision[0, got.top(0, 24)]) <= 0)
    overlaps = got.overlaps()
    assert np.array_equal(overlaps.shared[:2, :2], [[5, 0], [0, 5]])
    assert overlaps.jaccard[0, 1] == 0
    assert overlaps.population == 23
    frame = got.to_frame()
    assert len(frame) == 72
    assert frame["functional"].sum() == sum(map(len, got.sets.values()))
    assert "0: 5, 1: 5" in repr(got)
    assert len(overlaps.to_frame()) == 3
    assert overlaps.plot().data[0].z.shape == (3, 3)
    assert got.plot(4).data[0].z.shape == (3, 12)


def test_jaccard_and_its_chance():
    h, labels = values(1000)
    got = functional(seen(h, labels), share=1.0, level=0.99)
    a, b = (set(got.sets[name]) for name in "01")
    assert got.overlaps().jaccard[0, 1] == pytest.approx(len(a & b) / len(a | b))
    assert got.overlaps().expected[0, 1] == pytest.approx(len(a) * len(b) / 24)


def test_pvalues_are_those_of_the_rank_sum_test():
    from scipy.stats import mannwhitneyu

    h, labels = values()
    got, bins = functional(seen(h, labels)), binned(torch.relu(h))
    for k in range(3):
        inside = (labels == k).numpy()
        p = mannwhitneyu(bins[inside], bins[~inside], alternative="greater", method="asymptotic", use_continuity=False).pvalue
        assert np.allclose(got.pvalue[k], p, rtol=1e-6, atol=1e-12)


def relabelled(stats, h, labels):
    """The same statistics with other labels, without a run."""
    hot, bins = np.eye(3)[labels], binned(torch.relu(h))
    histogram = np.stack([(hot.T @ (bins == b)) for b in range(stats.histogram.shape[2])], -1)
    return replace(stats, histogram=torch.from_numpy(histogram).int(), label_n=torch.from_numpy(hot.sum(0)).long())


def test_random_labels_have_no_neurons_and_no_modules():
    """At level 0.05, a false neuron, and so a false module, turns up in at most about one of twenty trials."""
    rng = np.random.default_rng(0)
    base = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    h = base.repeat_interleave(5, 1) + 0.3 * torch.randn(200, 30, generator=torch.Generator().manual_seed(1))  # six modules
    modules = np.arange(30) // 5
    stats = seen(h, torch.arange(200) % 3)
    false, module, p = 0, 0, []
    for _ in range(60):
        got = functional(relabelled(stats, h, rng.permutation(200) % 3), share=1.0)
        p.append(got.pvalue.ravel())
        false += any(map(len, got.sets.values()))
        module += bool(got.enrichment(modules).significant.any())
    assert false <= 8
    assert module <= 8
    assert abs(np.mean(np.concatenate(p) < 0.1) - 0.1) < 0.03


def test_labels_of_examples_with_many_positions_need_a_null():
    """Positions of an example are alike, so independent positions find what is not there; shuffled examples do not."""
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(40, 1, 30, generator=rng).expand(40, 25, 30) + 0.5 * torch.randn(40, 25, 30, generator=rng)
    labels = torch.arange(40) % 2
    orders = [labels[torch.randperm(40, generator=rng)] for _ in range(12)]
    model = Given(30)
    draws = [observe(model, [h], labels=order, progress=False)["f"] for order in orders]
    naive = [functional(draw, share=1.0) for draw in draws]
    honest = [functional(draw, share=1.0, null=draws[:at] + draws[at + 1 :]) for at, draw in enumerate(draws)]
    assert sum(any(map(len, got.sets.values())) for got in naive) >= 10
    assert sum(any(map(len, got.sets.values())) for got in honest) <= 2
    assert honest[0].null == 11


def test_modules_that_specialise():
    h, labels = values(2000)
    got = functional(seen(h, labels), share=0.25)
    modules = np.repeat([0, 1, 2], [5, 5, 14])
    found = got.enrichment(modules)
    assert found.significant[0].tolist() == [True, False, False]
    assert found.significant[1].tolist() == [False, True, False]
    assert found.specialists["0"].tolist() == [0]
    assert found.overlap.sum(1).tolist() == found.chosen.tolist()
    assert np.allclose(found.expected[0], found.chosen[0] * np.array([5, 5, 14]) / 24)
    frame = found.to_frame()
    assert frame.loc[(frame.label == "0") & (frame.module == 0), "fold"].item() > 3
    assert "0: 0, 1: 1" in repr(found)
    assert found.plot().data[0].z[0, 0] > 3


def test_dead_neurons_are_no_chance_to_miss():
    h, labels = values(2000)
    h[:, 15:] = -1  # dead: of those that fire, modules 0 and 1 hold the neurons evenly
    found = functional(seen(h, labels), share=0.5).enrichment(np.repeat([0, 1, 0, 1, 2], [3, 3, 5, 4, 9]))
    assert found.module.tolist() == [8, 7, 0]
    assert (found.pvalue[:, 2] == 1).all()


def test_enrichment_of_random_modules_is_calibrated():
    h, labels = values(2000, f=60)
    h[:, 10:40] += 1.0 * (labels == 2)[:, None]
    got, rng = functional(seen(h, labels), share=0.5), np.random.default_rng(0)
    found = [got.enrichment(rng.permutation(60) % 6) for _ in range(200)]
    p = np.stack([each.pvalue for each in found])
    assert np.mean(p <= 0.05) <= 0.055
    assert np.mean([each.significant.any() for each in found]) <= 0.07


def test_results_come_back_from_disk(tmp_path):
    h, labels = values()
    got = functional(seen(h, labels))
    again = Functional.load(got.save(tmp_path / "f.safetensors"))
    assert again.label_names == got.label_names
    assert np.array_equal(again.precision, got.precision)
    assert {k: v.tolist() for k, v in again.sets.items()} == {k: v.tolist() for k, v in got.sets.items()}


def test_bad_input_of_functional():
    h, labels = values()
    stats = seen(h, labels)
    for arguments, message in [
        ((seen(h, None),), "know no labels"),
        ((seen(h, torch.zeros(400, dtype=torch.long)),), "label '0' alone"),
    ]:
        with pytest.raises(cl.CircuitlabError, match=message):
            functional(*arguments)
    for options, message in [
        (dict(by="size"), "by='size'"), (dict(share=0), "share=0"), (dict(null=seen(h, labels % 2)), "null must be statistics of f"),
    ]:
        with pytest.raises(cl.CircuitlabError, match=message):
            functional(stats, **options)
    got = functional(stats)
    with pytest.raises(cl.CircuitlabError, match="'x' is no label of f; its labels are 0, 1, 2"):
        got.top("x")
    with pytest.raises(cl.CircuitlabError, match="of 3 neurons, and f has 24"):
        got.enrichment([0, 1, 1])
    with pytest.raises(cl.CircuitlabError, match="labels of shape"):
        got.enrichment(np.full(24, 0.5))


# prune ------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier():
    """Neurons 0-3 vote for class 0, 4-7 for class 1, 8-11 for class 2; 12-23 do nothing."""
    torch.manual_seed(0)
    model = Given(24)
    with torch.no_grad():
        model.value.weight.zero_()
        for k in range(3):
            model.value.weight[k, 4 * k : 4 * k + 4] = 1
    labels = torch.arange(90) % 3
    h = torch.rand(90, 24)
    for k in range(3):
        h[labels == k, 4 * k : 4 * k + 4] += 1
    return model.double(), h.double(), labels


def by_hand(model, h, labels, dropped):
    hidden = torch.relu(model.key(h)).detach().clone()
    hidden[:, list(dropped)] = 0
    losses = nn.functional.cross_entropy(model.value(hidden), labels, reduction="none").detach()
    return np.array([float(losses[labels == k].mean()) for k in range(3)])


@pytest.mark.parametrize("sizes", [(90,), (1, 1, 88), (7, 43, 40)])
def test_a_prune_matrix_is_what_is_lost(classifier, sizes):
    model, h, labels = classifier
    groups = {k: range(4 * k, 4 * k + 4) for k in range(3)}
    batches = list(zip(h.split(list(sizes)), labels.split(list(sizes)), strict=True))
    got = prune_matrix(model, {"f": groups}, batches, "cross_entropy", labels, draws=3, progress=False)
    assert got.groups == got.label_names == ("0", "1", "2")
    assert np.allclose(got.baseline, by_hand(model, h, labels, []), rtol=1e-12)
    for k, chosen in groups.items():
        assert np.allclose(got.loss[k], by_hand(model, h, labels, chosen), rtol=1e-12)
    assert got.weight.tolist() == [30, 30, 30]
    assert (got.increase.diagonal() > 0.5).all()
    assert (got.increase[~np.eye(3, dtype=bool)] < 0).all()
    assert (got.random_increase < got.increase.diagonal()[:, None]).all()
    assert (got.random_spread > 0).all()
    assert (got.pvalue.diagonal() == 0.25).all()


def test_groups_of_partitions_and_of_labels(classifier):
    model, h, labels = classifier
    parts = prune_matrix(model, {"f": np.arange(24) // 4}, [(h, labels)], "cross_entropy", labels, draws=2, progress=False)
    assert parts.groups == tuple(f"module {k}" for k in range(6))
    assert np.allclose(parts.loss[1], by_hand(model, h, labels, range(4, 8)), rtol=1e-12)
    assert len(np.unique(parts.random.reshape(6, -1), axis=0)) == 1  # modules of equal size share their random sets
    found = functional(observe(model, [(h, labels)], labels=labels, progress=False)["f"], share=4 / 24)
    own = prune_matrix(model, found, [(h, labels)], "cross_entropy", lambda batch: batch[1], draws=2, progress=False)
    assert np.allclose(own.loss, parts.loss[:3], rtol=1e-12)
    assert own.to_frame().shape == (9, 8)
    assert np.allclose(own.plot().data[0].z, own.increase)
    assert np.allclose(own.plot(beyond_random=True).data[0].z, own.increase - own.random_increase)
    assert "without 0 (4 neurons)" in repr(own)


def test_an_empty_group_loses_nothing(classifier):
    model, h, labels = classifier
    got = prune_matrix(model, {"f": {"none": []}}, [(h, labels)], "cross_entropy", labels, progress=False)
    assert np.array_equal(got.loss[0], got.baseline)
    assert (got.pvalue == 1).all()


def test_all_value_maps_miss_the_neurons():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            h = torch.relu(self.key(x))
            return self.one(h) + self.two(h)

    torch.manual_seed(0)
    model, x, y = Two(), torch.randn(20, 6), torch.randn(20, 4)
    got = prune_matrix(model, {"f": {"all": range(16)}}, [(x, y)], "mse", ["a"] * 20, draws=1, progress=False)
    rest = (model.one.bias + model.two.bias).expand(20, 4)
    assert got.loss[0, 0] == pytest.approx(nn.functional.mse_loss(rest, y).item(), rel=1e-5)


def test_pruning_leaves_the_model_alone(classifier, tmp_path):
    model, h, labels = classifier
    model.train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    got = prune_matrix(model, {"f": {0: [1, 2]}}, [(h, labels)], "cross_entropy", labels, progress=False)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    again = PruneMatrix.load(got.save(tmp_path / "p.safetensors"))
    assert np.array_equal(again.random, got.random)


class Mixes(Given):
    """Examples of a batch see each other."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize(("change", "message"), [
    (dict(neurons={"g": {0: [1]}}), "'g' is no hidden wire"),
    (dict(neurons={"f": {0: [24]}}), "group '0' must hold indices of neurons of f, integers from 0 to 23"),
    (dict(neurons={"f": {0: [-1]}}), "integers from 0 to 23"),
    (dict(neurons={"f": {0: np.zeros(24, dtype=bool)}}), "integers from 0 to 23"),
    (dict(neurons={"f": [0, 1, 1]}), "another number of neurons than its 24"),
    (dict(neurons={}), "neurons must be"),
    (dict(neurons={"f": {}}), "holds no group"),
    (dict(neurons={"f": {0: [1]}, "0": {0: [1]}}), "'0' is no hidden wire"),
    (dict(labels=None), "labels is missing"),
    (dict(labels=[1, 2]), "labels has 2 entries, and the batches hold 90"),
    (dict(labels=torch.zeros(90, 4)), "labels must be one for each"),
    (dict(draws=0), "draws=0"),
    (dict(batches=[]), "batches is empty"),
    (dict(loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1], reduction="sum")), "no mean over examples"),
    (dict(model=Mixes(24).double()), "the model mixes examples"),
    (dict(loss="l3"), "loss='l3' is not known"),
])
def test_bad_input_of_prune_matrix(classifier, change, message):
    model, h, labels = classifier
    given = dict(model=model, neurons={"f": {0: [1]}}, batches=[(h, labels)], loss="cross_entropy", labels=labels) | change
    with pytest.raises(cl.CircuitlabError, match=message):
        prune_matrix(**given, progress=False)


@pytest.mark.parametrize("act", [torch.tanh, torch.sigmoid, torch.relu, torch.nn.functional.gelu])
def test_precision_from_bins_is_close_to_that_of_values(act):
    """Also where the activation saturates, so that values differ in their distance to 1 alone."""
    g = torch.Generator().manual_seed(0)
    label = (torch.rand(4000, generator=g) < 0.1).numpy()
    level, shift = torch.linspace(1, 6, 8), torch.linspace(0, 5, 8)
    h = act(torch.randn(4000, 8, generator=g) * level + torch.linspace(0, 4, 8) + torch.from_numpy(label)[:, None] * shift).T.contiguous()
    for values_, row in zip(h.numpy(), binned(h), strict=True):
        positive, total = (np.bincount(part, minlength=2 * len(BINS) + 1) for part in (row[label], row))
        assert average_precision(positive, total) == pytest.approx(average_precision_score(label, values_), abs=0.03)
