"""Triples of neurons against what their pairs say, on planted truth."""

import numpy as np
import pytest
import torch

from circuitlab.analysis.triples import Triples, triples
from circuitlab.errors import InputError


def pairwise(n, seed=0, m=6):
    """Neurons whose pairs explain all: a chain, each copies the one before it now and then."""
    rng = np.random.default_rng(seed)
    rows = rng.random((n, m)) < 0.4
    for i in range(1, m):
        rows[:, i] = np.where(rng.random(n) < 0.5, rows[:, i - 1], rows[:, i])
    return rows


def by_hand(rows, i, j, k):
    """Iterative proportional fitting of the 2 x 2 x 2 table to its pair margins."""
    table = np.zeros((2, 2, 2))
    np.add.at(table, tuple(rows[:, [i, j, k]].astype(int).T), 1)
    fitted = np.ones((2, 2, 2))
    for _ in range(300):
        for axis in range(3):
            fitted *= table.sum(axis, keepdims=True) / fitted.sum(axis, keepdims=True)
    return table, fitted


def test_counts_are_exact_and_the_prediction_is_that_of_greatest_entropy():
    rows = pairwise(400, m=5)
    found = triples(rows, range(5), blocks=16)
    assert len(found.count) == 10
    for row, count, expected, bits in zip(found.neurons, found.count, found.expected, found.bits):
        assert count == rows[:, row].all(axis=1).sum()
        table, fitted = by_hand(rows, *row)
        assert expected == pytest.approx(fitted[1, 1, 1], rel=1e-6)
        assert bits == pytest.approx((table * np.log2(table / fitted)).sum() / 400, abs=1e-9)


def test_xor_is_found_although_no_pair_shows_it():
    rng = np.random.default_rng(1)
    rows = rng.random((3000, 6)) < 0.5
    rows[:, 4] = (rows[:, 1] ^ rows[:, 2]) ^ (rng.random(3000) < 0.2)
    found = triples(rows, range(6))
    assert found.neurons[0].tolist() == [1, 2, 4] and found.qvalue[0] < 1e-6
    assert found.statistic[0] < 0 and found.interaction[0] < -2  # all three never fire, but for the noise
    assert (found.qvalue[1:] > 0.05).all()
    assert "1 less" in repr(found)


def test_three_that_fire_together_beyond_their_pairs():
    rng = np.random.default_rng(2)
    rows = rng.random((4000, 8)) < 0.3
    rows[rng.random(4000) < 0.05, :3] = True
    found = triples(torch.from_numpy(rows), 5)
    assert {0, 1, 2} <= set(found.candidates.tolist())  # their pairs are the strongest
    assert found.neurons[0].tolist() == [0, 1, 2] and found.qvalue[0] < 1e-4 and found.count[0] > found.expected[0]


def test_p_values_are_uniform_where_pairs_explain_all():
    values = np.concatenate([triples(pairwise(1500, seed, m=7), range(7)).pvalue for seed in range(12)])
    assert len(values) == 12 * 35
    assert 0.02 < (values < 0.05).mean() < 0.09 and 0.42 < (values < 0.5).mean() < 0.58


def test_positions_of_one_example_are_not_independent():
    """Each document repeats few rows, so that counts vary far more than positions suggest."""
    few, many = [], []
    for seed in range(8):
        documents = np.repeat(pairwise(150, seed, m=7)[:, None], 20, axis=1)
        few.append(triples(documents, range(7)).pvalue)
        many.append(triples(documents.reshape(-1, 7), range(7)).pvalue)
    assert (np.concatenate(few) < 0.05).mean() < 0.1
    assert (np.concatenate(many) < 0.05).mean() > 0.4  # what the same data would say as independent rows


def test_batches_give_the_same_counts_as_one_array():
    documents = np.random.default_rng(0).random((60, 9, 5)) < 0.4
    one = triples(documents, [0, 2, 3, 4])
    batches = triples([torch.from_numpy(part) for part in np.array_split(documents, 4)], [4, 3, 2, 0])
    counts = lambda found: {tuple(row): (int(c), e) for row, c, e in zip(found.neurons, found.count, found.expected)}
    assert counts(one) == counts(batches) and (one.n, one.examples) == (540, 60)
    assert sum(1 for _ in one.to_frame().itertuples()) == 4


def test_rare_cells_are_not_tested_and_dead_neurons_do_no_harm(tmp_path):
    rows = pairwise(500, m=6)
    rows[:, 0], rows[:, 1] = False, True
    found = triples(rows, range(6))
    dead = (found.neurons <= 1).any(axis=1)
    assert np.isnan(found.pvalue[dead]).all() and np.isfinite(found.pvalue[~dead]).all() and found.tested == 4
    assert np.isfinite(found.qvalue[:4]).all()  # those not tested come last
    again = Triples.load(found.save(tmp_path / "triples.safetensors"))
    assert np.array_equal(again.pvalue, found.pvalue, equal_nan=True) and repr(again) == repr(found)


@pytest.mark.parametrize(("firing", "options", "message"), [
    (np.zeros((9, 5)) + 0.3, {"candidates": [0, 1, 2]}, "h > threshold"),
    (np.zeros(9, bool), {}, "examples, neurons"),
    (np.zeros((90, 5), bool), {"candidates": [0, 1, 7]}, "there are 5 neurons"),
    (np.zeros((90, 5), bool), {"candidates": [0, 1, 1]}, "each once"),
    (np.zeros((90, 5), bool), {"candidates": 2}, "at least 3"),
    (np.zeros((90, 5), bool), {"candidates": 300}, "triples"),
    (np.zeros((1, 90, 5), bool), {"candidates": [0, 1, 2]}, "1 independent examples"),
    ([], {}, "empty"),
    (iter([np.zeros((90, 5), bool)]), {}, "walked only once"),
    ([np.zeros((90, 5), bool), np.zeros((90, 4), bool)], {"candidates": [0, 1, 2]}, "5 before"),
    (3, {}, "an array"),
    (np.zeros((90, 5), bool), {"candidates": [0, 1, 2], "blocks": 2}, "blocks=2"),
])
def test_what_cannot_be_tested_is_told(firing, options, message):
    with pytest.raises(InputError, match=message):
        triples(firing, **options)
