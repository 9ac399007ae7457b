"""Neurons and modules over training: similarities against libraries, chance, and checkpoints that leave the model alone."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn import metrics
from torch import nn

import circuitlab as cl
from circuitlab.analysis.functional import functional
from circuitlab.analysis.neurons import observe
from circuitlab.analysis.stability import Stability, observe_checkpoints, stability

X, Y = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)), torch.arange(60) % 2


def net():
    return nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 2))


def trained():
    """A model, and its state dict after each of five steps of training."""
    torch.manual_seed(0)
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    states = {}
    for step in range(5):
        states[step * 10] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimiser.step()
    model.zero_grad()
    return model, states


def drift(n=120, k=6, seed=0):
    """Partitions that wander, then stay from step 3 on."""
    rng = np.random.default_rng(seed)
    last = np.repeat(np.arange(k), n // k)
    steps = {}
    for step, share in enumerate([1.0, 0.7, 0.4, 0.02, 0.0, 0.0]):
        labels = last.copy()
        moved = rng.permutation(n)[: round(share * n)]
        labels[moved] = rng.permutation(labels[moved])
        steps[step] = labels
    return steps


def test_scores_are_compared_by_rank():
    rng = np.random.default_rng(0)
    scores = {step: np.round(rng.normal(size=50) + step, 1) for step in (0, 1, 5)}
    got = stability(scores)
    for a, one in enumerate(scores.values()):
        for b, other in enumerate(scores.values()):
            assert got.similarity["spearman"][a, b] == pytest.approx(spearmanr(one, other).statistic)
    assert got.chance["spearman"] == pytest.approx(1.645 / 7, rel=0.25)
    assert got.stable_from() is None
    assert got.score == "score"


def test_partitions_are_compared_by_rand_index_and_information():
    steps = drift()
    got = stability(steps)
    for a, one in steps.items():
        for b, other in steps.items():
            assert got.similarity["ari"][a, b] == pytest.approx(metrics.adjusted_rand_score(one, other))
            assert got.similarity["nmi"][a, b] == pytest.approx(metrics.normalized_mutual_info_score(one, other))
    assert got.stable_from() == 3
    assert got.stable_from(0.99) == 4
    assert got.stable_from(0.8, "nmi") == 3
    assert "at least 0.8 to the last from step 3 on" in repr(got)
    assert abs(got.similarity["ari"][0, -1]) < 2 * got.chance["ari"]
    assert got.similarity["nmi"][0, -1] < 2 * got.chance["nmi"]


@pytest.mark.parametrize(("one", "other"), [
    ([0] * 6, [0] * 6), (range(6), range(6)), ([0] * 6, range(6)), ([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]), ([0, 0, 3, 3], [1, 1, 0, 0]),
])
def test_partitions_at_their_limits(one, other):
    got = stability({0: list(one), 1: list(other)}, shuffles=3)
    assert got.similarity["ari"][0, 1] == pytest.approx(metrics.adjusted_rand_score(list(one), list(other)))
    assert got.similarity["nmi"][0, 1] == pytest.approx(metrics.normalized_mutual_info_score(list(one), list(other)))


def test_names_of_modules_do_not_matter():
    steps = drift()
    other = {step: (labels + step) % 6 for step, labels in steps.items()}
    got, same = stability(other), stability(steps)
    assert np.allclose(got.similarity["ari"], same.similarity["ari"])
    assert np.mean(got.tracks[3][other[3]] == got.tracks[4][other[4]]) > 0.9
    for step in (4, 5):  # the same modules by other names are the same tracks
        assert np.array_equal(got.tracks[step][other[step]], got.tracks[4][other[4]])


def test_flows_are_counts_and_tracks_end_and_start():
    got = stability({0: [0, 0, 0, 1, 1, 1], 10: [1, 1, 2, 0, 0, 0], 20: [0, 0, 0, 0, 0, 0]}, shuffles=9)
    assert got.flows[0].tolist() == [[0, 2, 1], [3, 0, 0]]
    assert got.flows[1].tolist() == [[3], [2], [1]]
    assert [track.tolist() for track in got.tracks] == [[0, 1], [1, 0, 2], [1]]
    frame = got.flows_frame()
    assert frame["neurons"].sum() == 12
    assert frame.iloc[0].tolist() == [0, 0, 0, 10, 1, 0, 2, 1.0]


def test_checkpoints_are_observed_one_by_one(tmp_path):
    model, states = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(states[10], tmp_path / "ten.pt")
    given = {**states, 10: tmp_path / "ten.pt", 20: lambda: states[20]}
    found = observe_checkpoints(model, given, [(X, Y)], labels=Y, progress=False)
    assert list(found) == ["f"]
    for step, state in states.items():
        alone = net()
        alone.load_state_dict(state)
        assert torch.equal(found["f"][step].cofiring, observe(alone, [(X, Y)], progress=False)["f"].cofiring)
        assert torch.equal(found["f"][step].keys, state["0.weight"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    got = stability(found["f"])
    assert got.wire == "f"
    assert got.score == "magnitude"
    assert got.similarity["spearman"][0, 1] == pytest.approx(spearmanr(found["f"][0].magnitude, found["f"][10].magnitude).statistic)
    other = stability(found["f"], score=lambda stats: functional(stats).precision[0])
    assert other.similarity["spearman"][0, -1] != got.similarity["spearman"][0, -1]


def test_what_is_kept_of_each_checkpoint():
    model, states = trained()
    found = observe_checkpoints(model, states.items(), [X], each=lambda stats: stats.firing > 30, progress=False)
    assert found["f"][0].dtype == torch.bool
    got = stability({step: fires.long() for step, fires in found["f"].items()})
    assert got.similarity["ari"].shape == (5, 5)


def test_neurons_that_are_all_alike_are_like_nothing():
    got = stability({0: np.zeros(9), 1: np.arange(9.0), 2: np.arange(9.0)})
    assert np.isnan(got.similarity["spearman"][0]).all()
    assert got.stable_from() == 1


def test_frames_and_disk(tmp_path):
    got = stability(drift(), shuffles=9)
    frame = got.to_frame()
    assert list(frame.columns) == ["step", "ari to next", "ari to last", "ari by chance", "nmi to next", "nmi to last", "nmi by chance"]
    assert frame["ari to last"].iloc[-1] == 1
    assert got.plot().data[0].type == "sankey"
    assert got.plot("nmi").data[0].z.shape == (6, 6)
    again = Stability.load(got.save(tmp_path / "s.safetensors"))
    assert again.steps == got.steps
    assert np.array_equal(again.flows[0], got.flows[0])


class Part:
    def __init__(self, wire):
        self.wire, self.labels = wire, torch.tensor([0, 1, 1])


@pytest.mark.parametrize(("given", "message"), [
    ({0: [0, 1]}, "at least two"),
    ({1: [0, 1], 0: [0, 1]}, "steps must rise, and are 1, 0"),
    ({0: [0, 1], 1: [0, 1, 1]}, "different numbers of neurons: 0: 2, 1: 3"),
    ({0: [0, 1], 1: [0.5, 1.5]}, "partitions at some steps and scores at others"),
    ({0: Part("f"), 1: Part("g")}, "different wires: f, g"),
    ([1, 2], "checkpoints must be"),
    ({0: "a", 1: "b"}, "one number for each neuron"),
])
def test_bad_input_of_stability(given, message):
    with pytest.raises(cl.CircuitlabError, match=message):
        stability(given)


def test_bad_measure_and_score():
    with pytest.raises(cl.CircuitlabError, match="measure='x' is not known here; give one of ari, nmi"):
        stability(drift(), shuffles=3).stable_from(measure="x")
    model, states = trained()
    found = observe_checkpoints(model, states, [X], progress=False)
    with pytest.raises(cl.CircuitlabError, match="score='x' is no attribute"):
        stability(found["f"], score="x")


@pytest.mark.parametrize(("checkpoints", "message"), [
    ({5: {"0.weight": torch.zeros(1)}}, "checkpoint 5 does not fit this Sequential"),
    ({5: {"model": {}, "epoch": 3}}, "checkpoint 5 is a dict, which holds model, epoch"),
    ({5: "/nowhere.pt"}, "checkpoint 5: /nowhere.pt could not be read"),
    ({}, "checkpoints holds none"),
    ({5: {name: torch.zeros_like(t) for name, t in net().state_dict().items()}}, "checkpoint 5: no neuron of f fires"),
])
def test_bad_checkpoints(checkpoints, message):
    with pytest.raises(cl.CircuitlabError, match=message):
        observe_checkpoints(net(), checkpoints, [X], progress=False)
