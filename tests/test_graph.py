"""Hubs, bridges and clustering of neuron graphs, on graphs whose answers are known."""

import networkx
import numpy as np
import pytest
import torch
from scipy import sparse

from circuitlab.analysis.graph import places
from circuitlab.errors import InputError



def noise(n, seed=0, density=1.0):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((n, n)) * (rng.random((n, n)) < density), 1)
    return upper + upper.T


def two_modules(size=15):
    """Two modules, and one node (the last) that alone links them."""
    n = 2 * size + 1
    graph = np.zeros((n, n))
    graph[:size, :size] = graph[size : 2 * size, size : 2 * size] = 1
    graph[-1, [0, 1, size, size + 1]] = graph[[0, 1, size, size + 1], -1] = 1
    np.fill_diagonal(graph, 0)
    return graph, np.r_[np.zeros(size, int), np.ones(size + 1, int)]


def test_numbers_are_those_of_networkx():
    graph = noise(25, density=0.3)
    frame = places(graph, neighbours=None, controls=0)
    reference = networkx.from_numpy_array(graph)
    for _, _, edge in reference.edges(data=True):
        edge["length"] = 1 / edge["weight"]
    assert np.allclose(frame.strength, [reference.degree(i, weight="weight") for i in range(25)])
    assert frame.degree.tolist() == [reference.degree(i) for i in range(25)]
    between = networkx.betweenness_centrality(reference, weight="length")
    assert np.allclose(frame.betweenness, [between[i] for i in range(25)])
    clustering = networkx.clustering(reference, weight="weight")
    assert np.allclose(frame.clustering, [clustering[i] for i in range(25)])


def test_the_hub_of_a_star_is_the_only_hub():
    graph = noise(40) * 0.2
    graph[7] = graph[:, 7] = 1
    frame = places(graph, neighbours=None)
    assert frame.index[frame.hub].tolist() == [7] and frame.strength.idxmax() == 7 and frame.betweenness.idxmax() == 7


def test_nothing_stands_out_where_weights_are_random():
    frames = [places(noise(60, seed, 0.4), seed=seed) for seed in range(3)]
    assert sum(frame.hub.sum() for frame in frames) <= 1 and sum(frame.bridge.sum() for frame in frames) <= 1
    values = np.concatenate([frame.strength_p for frame in frames])
    assert 0.01 < (values < 0.05).mean() < 0.1


def test_a_bridge_is_told_from_a_hub():
    graph, labels = two_modules()
    frame = places(graph, labels)
    assert frame.betweenness.idxmax() == frame.participation.idxmax() == 30
    assert frame.bridge[30] and not frame.hub[30]
    assert frame.participation[30] == pytest.approx(0.5)
    assert np.allclose(frame.participation[2:15], 0) and (frame.clustering[2:15] > 0.9).all()
    assert frame.participation[0] == pytest.approx(1 - (14 / 15) ** 2 - (1 / 15) ** 2)


def test_within_module_strength_is_a_z_score_of_the_members():
    frame = places(noise(30), np.repeat([0, 1, 2], 10), controls=0)
    assert np.allclose(frame.groupby("module").within.mean(), 0)
    assert np.allclose(frame.groupby("module").within.std(ddof=0), 1)


def test_kinds_of_matrices_and_repeats_agree():
    graph = noise(50, density=0.3)
    first = places(graph, controls=3, seed=3)
    for other in (graph, torch.tensor(graph), sparse.csr_array(graph), sparse.coo_matrix(graph), graph + np.eye(50), graph - (graph == 0)):
        assert places(other, controls=3, seed=3).equals(first)


def test_heaviest_edges_and_pivots():
    graph = noise(200)
    near = places(graph, neighbours=5, controls=0)
    assert near.degree.min() >= 5 and near.degree.mean() < 10
    assert np.allclose(near.strength, graph.sum(axis=1))  # of all edges
    exact = places(graph, neighbours=8, controls=0).betweenness
    estimate = places(graph, neighbours=8, controls=0, pivots=100).betweenness
    assert np.corrcoef(exact, estimate)[0, 1] > 0.9 and 0.7 < estimate.sum() / exact.sum() < 1.4
    assert estimate.equals(places(graph, neighbours=8, controls=0, pivots=100).betweenness)


def test_dead_neurons_have_no_place():
    graph = noise(20)
    graph[3] = graph[:, 3] = 0
    row = places(graph, np.zeros(20, int)).loc[3]
    assert row.strength == row.degree == row.betweenness == row.clustering == row.participation == 0
    assert not row.hub and not row.bridge


@pytest.mark.parametrize(("graph", "options", "message"), [
    (np.zeros((4, 4)), {}, "no positive entry"),
    (np.zeros((4, 3)), {}, r"shape \(4, 3\)"),
    (np.triu(np.ones((4, 4))), {}, "not symmetric"),
    (np.full((4, 4), np.nan), {}, "not finite"),
    (np.ones((4, 4)), {"labels": [0, 1]}, "4 nodes"),
    (np.ones((4, 4)), {"labels": [0.5, 1, 1, 1]}, "numbered from 0"),
    (np.ones((4, 4)), {"neighbours": 0}, "neighbours=0"),
])
def test_what_is_no_graph_is_told(graph, options, message):
    with pytest.raises(InputError, match=message):
        places(graph, **options)
