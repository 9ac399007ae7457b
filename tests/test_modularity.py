"""Partitions: exact balanced assignment, communities, hierarchies down to their thresholds, and controls that are not fooled."""

import dataclasses
import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.cluster.hierarchy import is_monotonic, is_valid_linkage
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score as ari

import circuitlab as cl
from circuitlab.analysis import affinity, balanced, communities, hierarchy, null, spectral, surrogate
from circuitlab.analysis.flows import Flows, match_modules
from circuitlab.analysis.modularity import METHODS, Partition
from circuitlab.errors import FileFormatError, InputError

QUICK = settings(max_examples=25, deadline=None)


def random_network(seed, inputs=24, neurons=96, n=600, bias=0.0, decay=0.0, gated=False):
    """What is observed of a ReLU or SwiGLU layer with random weights on random inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g) * torch.arange(1, inputs + 1).float() ** -decay
    keys = torch.nn.init.kaiming_uniform_(torch.empty(neurons, inputs), a=5**0.5, generator=g)
    h = x @ keys.T + bias * (x @ keys.T).std()
    if gated:
        size = (torch.nn.functional.silu(h) * (x @ torch.randn(neurons, inputs, generator=g).T)).abs()
        h = size - size.mean()
    return stats_of(h > 0, keys=keys, values=torch.randn(neurons, inputs, generator=g) / neurons**0.5)


def stats_of(fires, keys=None, values=None):
    fires = torch.as_tensor(fires).double()
    together = (fires.T @ fires).long()
    return SimpleNamespace(wire="mlp.f", ffn=None, n=len(fires), firing=together.diagonal().clone(), cofiring=together, keys=keys, values=values)


def planted(seed, modules=4, neurons=96, n=800, strength=0.5, rate=0.2):
    """Neurons that share one of a few causes; keys share a direction; neurons in a shuffled order."""
    r = np.random.default_rng(seed)
    labels = r.permutation(np.arange(neurons) % modules)
    level = r.standard_normal((n, modules))[:, labels] * strength**0.5 + r.standard_normal((n, neurons)) * (1 - strength) ** 0.5
    keys = r.standard_normal((modules, 32))[labels] + r.standard_normal((neurons, 32))
    values = (labels[:, None] == np.arange(32) % modules) * 1.0 + 0.1 * r.random((neurons, 32))
    return stats_of(level > np.quantile(level, 1 - rate, axis=0), torch.from_numpy(keys), torch.from_numpy(values)), labels


def block_model(seed, labels, probability):
    """A random graph whose edges have the probabilities (k, k) of its groups."""
    p = np.asarray(probability)[labels][:, labels]
    edges = np.triu(np.random.default_rng(seed).random(p.shape) < p, 1)
    return (edges | edges.T).astype(float)


def nested(groups, p2, p1, p0):
    """Edge probabilities of groups of two levels: within a bottom group, a top group, and between."""
    bottom = np.arange(groups[0] * groups[1])
    top = bottom // groups[1]
    return np.where(bottom[:, None] == bottom, p2, np.where(top[:, None] == top, p1, p0))


# balanced ---------------------------------------------------------------------------------------------


@QUICK
@given(k=st.integers(1, 7), each=st.integers(1, 6), seed=st.integers(0, 10**6), ties=st.booleans())
def test_assignment_is_balanced_and_optimal(k, each, seed, ties):
    r = np.random.default_rng(seed)
    cost = r.integers(0, 3, (k * each, k)).astype(float) if ties else r.standard_normal((k * each, k))
    labels, _ = balanced.assign(cost)
    assert (np.bincount(labels, minlength=k) == each).all()
    wide = np.repeat(cost, each, axis=1)
    assert cost[np.arange(k * each), labels].sum() == pytest.approx(wide[linear_sum_assignment(wide)].sum(), abs=1e-6)


def test_assignment_starts_from_any_prices():
    cost = np.random.default_rng(0).standard_normal((240, 12))
    first, prices = balanced.assign(cost)
    for start in (prices, 100 * np.random.default_rng(1).standard_normal(12)):
        again, _ = balanced.assign(cost, start)
        rows = np.arange(240)
        assert cost[rows, again].sum() == pytest.approx(cost[rows, first].sum(), abs=1e-6)


def test_balanced_kmeans_finds_groups_and_no_exchange_helps_much():
    r = np.random.default_rng(3)
    truth = r.permutation(np.arange(120) % 6)
    points = 4 * r.standard_normal((6, 20))[truth] + r.standard_normal((120, 20))
    labels = balanced.kmeans(points, 6, np.random.default_rng(0))
    assert ari(truth, labels) == 1
    noise = r.standard_normal((40, 5)).astype(np.float32)
    labels = balanced.kmeans(noise, 4, np.random.default_rng(0))
    best = balanced.inertia(noise, labels)
    for i, j in itertools.combinations(range(40), 2):
        other = labels.copy()
        other[i], other[j] = labels[j], labels[i]
        assert balanced.inertia(noise, other) >= best * 0.99


def test_counts_of_equal_modules():
    assert balanced.default_count(3072) in (48, 64) and balanced.default_count(64) == 8
    with pytest.raises(InputError, match="divisors"):
        balanced.default_count(997)


# affinities -------------------------------------------------------------------------------------------


@QUICK
@given(seed=st.integers(0, 10**6), n=st.integers(3, 60), f=st.integers(2, 12))
def test_phi_is_the_correlation_and_ppmi_the_logarithm_of_the_lift(seed, n, f):
    r = np.random.default_rng(seed)
    fires = r.random((n, f)) < r.random(f)
    fires[0], fires[1] = True, False
    together, firing, positions = affinity.counts(stats_of(fires))
    phi = affinity.phi(together, firing, positions)
    want = np.corrcoef(fires.T.astype(float))
    np.fill_diagonal(want, 0)
    np.testing.assert_allclose(phi, want, atol=1e-5)
    lift = np.maximum(together * n / np.outer(firing, firing), 1)
    np.fill_diagonal(lift, 1)
    np.testing.assert_allclose(affinity.weigh(phi, firing, n, "ppmi"), np.log(lift), atol=1e-4)


def test_neurons_that_never_vary_belong_to_none():
    stats, truth = planted(0)
    fires = torch.zeros(stats.n, 4)
    fires[:, :2] = 1
    whole = torch.zeros(100, 100, dtype=torch.long)
    whole[:96, :96] = stats.cofiring
    whole[96:98, :96] = whole[:96, 96:98].T * 0 + stats.firing
    whole[:96, 96:98] = stats.firing[:, None]
    whole[96:98, 96:98] = stats.n
    part = cl.partition(SimpleNamespace(wire="w", ffn=None, n=stats.n, firing=whole.diagonal(), cofiring=whole), controls=0)
    assert part.silent.tolist() == [96, 97, 98, 99] and part.k == 5
    assert len(set(part.labels[96:])) == 1 and ari(truth, part.labels[:96]) == 1


def test_the_heaviest_edges_are_kept_both_ways():
    r = np.random.default_rng(0)
    w = r.random((50, 50)).astype(np.float32)
    w = np.maximum(w, w.T)
    np.fill_diagonal(w, 0)
    kept = affinity.nearest(w, 5).toarray()
    assert (kept == kept.T).all() and ((kept > 0).sum(axis=1) >= 5).all()
    assert all(kept[i, np.argmax(w[i])] == w[i].max() for i in range(50))


# methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "k"), [
    ("coactivation", None), ("coactivation", 4), ("hierarchy", None), ("hierarchy", 4), ("keys", 4), ("spectral", 4), ("spectral", None),
])
def test_planted_modules_are_found_and_believed(method, k):
    stats, truth = planted(1)
    part = cl.partition(stats, method, k, controls=19, progress=False)
    assert part.significant and part.pvalue == 1 / 20 and part.wire == "mlp.f"
    assert part.k == 4 and ari(truth, part.labels) > 0.95
    assert len(part.null) == 19 and "significant (p = 0.05" in repr(part)
    if k and method in ("keys", "coactivation"):
        assert (part.sizes == 24).all()


def test_ppmi_finds_them_too():
    stats, truth = planted(2)
    part = cl.partition(stats, weight="ppmi", controls=19)
    assert part.significant and ari(truth, part.labels) > 0.95


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, sparse.csr_matrix, sparse.coo_array])
def test_any_form_of_affinity_gives_the_same(form):
    labels = np.arange(90) % 3
    graph = block_model(0, labels, nested((3, 1), 0.4, 0.4, 0.05))
    for method in ("coactivation", "spectral", "hierarchy", "interaction"):
        part = cl.partition(form(graph), method, controls=0)
        assert part.k == 3 and ari(labels, part.labels) > 0.9, method
    assert cl.partition(form(graph), k=3, controls=0).sizes.tolist() == [30, 30, 30]


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_and_no_random_state_is_touched(method):
    stats = affinity.phi(*affinity.counts(random_network(0))) if method == "interaction" else random_network(0)
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (cl.partition(stats, method, seed=3, controls=3, progress=False) for _ in range(2))
    assert (one.labels == two.labels).all() and one.score == two.score and (one.null == two.null).all()
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_modules_are_numbered_by_size_then_smallest_member():
    part = cl.partition(random_network(1), controls=0)
    firsts = [m[0] for m in part.modules]
    order = list(zip((-part.sizes).tolist(), firsts, strict=True))
    assert order == sorted(order) and (np.sort(np.concatenate(part.modules)) == np.arange(96)).all()
    assert communities.numbered(np.array([7, 3, 3, 7, 9])).tolist() == [0, 1, 1, 0, 2]


def test_modularity_is_newmans():
    import networkx

    graph = networkx.karate_club_graph()
    w = networkx.to_numpy_array(graph)
    labels = communities.leiden(w, 0)
    groups = [set(np.flatnonzero(labels == c).tolist()) for c in range(labels.max() + 1)]
    want = networkx.community.modularity(graph, groups)
    assert communities.modularity(w, labels) == pytest.approx(want) == pytest.approx(communities.modularity(sparse.csr_array(w), labels))
    assert want > 0.44  # the best known is 0.4449 with weights


def test_normalised_cut_of_weights_is_that_of_their_graph():
    edges = np.random.default_rng(0).random((30, 12)).astype(np.float32)
    labels = np.arange(30) % 3
    dense = (edges / edges.sum(axis=0)) @ edges.T
    cuts = [dense[labels == c][:, labels != c].sum() / dense[labels == c].sum() for c in range(3)]
    assert spectral.normalised_cut(spectral.Bipartite(edges), labels) == pytest.approx(sum(cuts) / 2, rel=1e-4)


# hierarchy --------------------------------------------------------------------------------------------


@QUICK
@given(k=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_a_dendrogram_is_monotone_and_its_heights_are_densities(k, seed):
    r = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), r.integers(k, size=5 * k)])
    w = r.random((len(labels), len(labels)))
    w = w + w.T
    np.fill_diagonal(w, 0)
    tree = hierarchy.linkage(w, labels)
    assert is_valid_linkage(tree) and is_monotonic(tree)
    top = max(hierarchy.densities(w, labels).max(), 0)
    last = hierarchy.cut(tree, 2)[labels] == 0
    assert tree[-1, 2] == pytest.approx(max(1 - w[last][:, ~last].mean() / top, tree[-2, 2] if k > 2 else 0), abs=1e-9)
    for m in range(1, k):  # each cut is coarser than the next
        coarse, fine = hierarchy.cut(tree, m), hierarchy.cut(tree, m + 1)
        assert len(set(zip(coarse, fine, strict=True))) == m + 1 == coarse.max() + 2


def test_both_levels_are_recovered_where_theory_says_they_can_be():
    # exact recovery needs -48 log(√(p₂p₁) + √((1-p₂)(1-p₁))) over log n = 6: here it is 16, and more at the top
    bottom = np.random.default_rng(0).permutation(np.arange(384) % 16)
    part = cl.partition(block_model(1, bottom, nested((4, 4), 0.85, 0.15, 0.03)), "hierarchy", controls=19, progress=False)
    assert part.significant and part.levels == (4, 16)
    assert ari(bottom, part.labels) == 1 and ari(bottom // 4, part.cut(4)) == 1


def test_a_level_that_is_not_there_is_not_claimed():
    bottom = np.arange(384) % 16
    flat = cl.partition(block_model(1, bottom, nested((16, 1), 0.7, 0.7, 0.06)), "hierarchy", controls=19, progress=False)
    assert flat.levels == (16,) and ari(bottom, flat.labels) == 1
    top = cl.partition(block_model(1, bottom // 4, nested((4, 1), 0.3, 0.3, 0.05)), "hierarchy", controls=19, progress=False)
    assert top.levels == (4,) and ari(bottom // 4, top.labels) > 0.95


def test_a_bottom_level_under_the_threshold_leaves_the_top_one():
    # bottom groups of 24 whose eigenvalue, 24 (0.24 - 0.2), is far under the noise, sqrt of a degree of 30
    bottom = np.arange(384) % 16
    part = cl.partition(block_model(2, bottom, nested((4, 4), 0.24, 0.2, 0.03)), "hierarchy", controls=19, progress=False)
    assert part.significant and part.levels == (4,) and ari(bottom // 4, part.labels) > 0.95


def test_under_the_kesten_stigum_threshold_nothing_is_claimed():
    labels = np.arange(400) % 4  # (a - b)^2 / (k (a + (k-1) b)) = 0.11, where 1 is needed
    p = nested((4, 1), 12 / 400, 12 / 400, 8 / 400)
    found = [cl.partition(block_model(s, labels, p), "hierarchy", controls=19, progress=False) for s in range(2)]
    assert not all(part.significant for part in found) and not any(part.levels for part in found if not part.significant)


# controls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"bias": -1.2}, {"decay": 1.0}, {"gated": True}, {"inputs": 8}])
def test_random_networks_on_random_inputs_are_not_significant(kind):
    # each is believed in one case of twenty
    believed = [cl.partition(random_network(s, **kind), seed=s, controls=19, progress=False).significant for s in range(3)]
    assert sum(believed) <= 1


@pytest.mark.parametrize("method", ["keys", "spectral", "hierarchy", "random"])
def test_no_method_believes_in_a_random_network(method):
    believed = [cl.partition(random_network(s, neurons=64), method, seed=s, controls=19, progress=False).significant for s in range(3)]
    assert sum(believed) <= 1


def test_a_random_graph_has_high_modularity_and_is_not_believed():
    graph = block_model(0, np.zeros(300, dtype=int), [[4 / 300]])
    part = cl.partition(sparse.csr_array(graph), controls=19)
    assert part.score > 0.4 and part.k > 8 and not part.significant and "not significant" in repr(part)


def test_neighbour_graphs_of_random_networks_are_not_believed():
    parts = [cl.partition(random_network(s, neurons=160), neighbours=8, seed=s, controls=19, progress=False) for s in range(3)]
    assert all(part.score > 0.2 for part in parts) and sum(part.significant for part in parts) <= 1


def test_controls_keep_what_they_should():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 7)).astype(np.float32)
    mixed = null.rotated_rows(rows, rng)
    np.testing.assert_allclose(mixed.mean(axis=0), rows.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(mixed.T @ mixed, rows.T @ rows, atol=1e-3)
    graph = block_model(0, np.arange(80) % 2, [[0.3, 0.05], [0.05, 0.2]])
    other = null.rewired(communities.upper(graph), rng).toarray()
    assert (other.sum(axis=0) == graph.sum(axis=0)).all() and (other == other.T).all() and (other != graph).any()
    stats = random_network(0)
    correlation, firing = affinity.phi(*affinity.counts(stats)), stats.firing.numpy().astype(float)
    drawn = surrogate.Surrogate(correlation, firing, stats.n)(rng)
    np.testing.assert_allclose(drawn, drawn.T, atol=1e-6)
    assert np.sort(np.linalg.eigvalsh(drawn))[-8:].sum() == pytest.approx(np.linalg.eigvalsh(correlation)[-8:].sum(), rel=0.15)


def test_the_tetrachoric_series_gives_back_the_latent_correlation():
    rate = np.array([0.5, 0.2, 0.35])
    factors = surrogate.series(rate)
    truth = np.array([[0, 0.5, -0.2], [0.5, 0, 0.3], [-0.2, 0.3, 0]])
    phi = surrogate.indicator(truth, factors, factors)
    assert phi[0, 1] == pytest.approx(_phi_of(0.5, 0.5, 0.2), abs=1e-3)
    np.testing.assert_allclose(surrogate.latent(phi.astype(np.float32), factors), truth, atol=1e-3)


def _phi_of(rho, p, q):
    from scipy.stats import multivariate_normal, norm

    both = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([norm.ppf(p), norm.ppf(q)])
    return (both - p * q) / (p * (1 - p) * q * (1 - q)) ** 0.5


# results ----------------------------------------------------------------------------------------------


def test_matching_finds_the_same_modules_again():
    stats, truth = planted(4)
    part = cl.partition(stats, controls=0)
    renamed = dataclasses.replace(part, labels=(part.labels + 1) % part.k)
    match = match_modules(part, renamed)
    assert match.ari == 1 and match.nmi == pytest.approx(1)
    assert [(m + 1) % part.k for m in match.pairs[:, 0]] == match.pairs[:, 1].tolist()
    assert (match.flows.sum(axis=1) == part.sizes).all() and match.to_frame().matched.all()


def test_matching_across_wires_goes_by_affinity():
    a, b = (cl.partition(planted(s, neurons=n)[0], controls=0) for s, n in ((5, 96), (6, 48)))
    twist = np.array([2, 0, 3, 1])
    between = (twist[a.labels][:, None] == b.labels).astype(float)
    match = match_modules(a, b, between)
    assert match.pairs.tolist() == [[m, twist[m]] for m in range(4)] and np.isnan(match.ari)
    with pytest.raises(InputError, match=r"give cofiring=, \(96, 48\)"):
        match_modules(a, b)
    with pytest.raises(InputError, match="should be finite"):
        match_modules(a, b, between.T)


def test_saved_and_loaded(tmp_path):
    part = cl.partition(planted(7)[0], "hierarchy", controls=3)
    again = Partition.load(part.save(tmp_path / "part.safetensors"))
    assert repr(again) == repr(part) and (again.labels == part.labels).all() and (again.cut(2) == part.cut(2)).all()
    flows = match_modules(part, again)
    assert (Flows.load(flows.save(tmp_path / "flows.safetensors")).flows == flows.flows).all()
    with pytest.raises(FileFormatError, match="holds a Flows"):
        Partition.load(tmp_path / "flows.safetensors")
    frame = part.to_frame()
    assert list(frame.columns) == ["wire", "neuron", "module", "size", "silent"] and (frame.module == part.labels).all()


def test_bad_input_is_told():
    stats, _ = planted(0)
    graph = block_model(0, np.arange(40) % 2, [[0.5, 0.1], [0.1, 0.5]])
    with pytest.raises(InputError, match="did you mean 'coactivation'"):
        cl.partition(stats, "coactivations")
    with pytest.raises(InputError, match="nearest are 6, 8, 12|nearest are 4, 6, 8"):
        cl.partition(stats, "keys", k=7)
    for k in (0, 97, 2.5, True):
        with pytest.raises(InputError, match="whole number from 1 to 96"):
            cl.partition(stats, k=k)
    with pytest.raises(InputError, match="takes the statistics of a wire"):
        cl.partition(graph, "keys")
    with pytest.raises(InputError, match="interaction basis"):
        cl.partition(stats, "interaction")
    with pytest.raises(InputError, match="'phi', 'ppmi'|phi, ppmi"):
        cl.partition(stats, weight="counts")
    with pytest.raises(InputError, match="not symmetric"):
        cl.partition(np.triu(graph))
    with pytest.raises(InputError, match=r"not finite, the first at \(3, 4\)"):
        broken = graph.copy()
        broken[3, 4] = np.nan
        cl.partition(broken)
    with pytest.raises(InputError, match="no positive entry"):
        cl.partition(np.eye(5))
    with pytest.raises(InputError, match="symmetric affinity"):
        cl.partition(graph[:5])
    with pytest.raises(InputError, match="no neuron fires at any"):
        cl.partition(stats_of(np.zeros((50, 8))))
    with pytest.raises(InputError, match="fires always or never"):
        cl.partition(stats_of(np.ones((50, 8))))
    with pytest.raises(InputError, match="cannot be"):
        cl.partition(SimpleNamespace(wire="", n=5, firing=torch.tensor([9, 1]), cofiring=torch.eye(2)))
    with pytest.raises(InputError, match="no dendrogram"):
        cl.partition(stats, controls=0).cut(2)
    with pytest.raises(InputError, match="1 to 4 groups, not 5"):
        cl.partition(stats, "hierarchy", controls=0).cut(5)


def test_a_bar_is_shown_and_can_be_turned_off(capsys, monkeypatch):
    monkeypatch.setattr("circuitlab.analysis.modularity._DELAY", 0)
    cl.partition(planted(0)[0], controls=2)
    assert "partition by coactivation" in capsys.readouterr().err
    cl.partition(planted(0)[0], controls=2, progress=False)
    assert capsys.readouterr().err == ""


def test_importing_the_package_loads_none_of_this():
    code = "import sys, circuitlab; assert not {'networkit', 'sklearn', 'scipy', 'torch', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("seed", range(6))
def test_many_points_that_are_alike_are_assigned(seed):
    """Points of equal costs, as silent neurons are, in single precision: rounding must not lead in circles."""
    rng = np.random.default_rng(seed)
    cost = np.concatenate([np.repeat(rng.random((1, 8)), 44, 0), rng.random((84, 8)) + 1]).astype(np.float32)
    labels, _ = balanced.assign(cost)
    assert (np.bincount(labels) == 16).all()
    rows, columns = linear_sum_assignment(np.repeat(cost.astype(np.float64), 16, axis=1))
    assert cost[np.arange(128), labels].sum() == pytest.approx(np.repeat(cost, 16, axis=1)[rows, columns].sum(), rel=1e-6)


# controls that know the inputs -------------------------------------------------------------------------


def grouped_inputs(seed, groups=4, dims=32, n=1024, apart=3.0):
    """Inputs that fall into groups, whatever reads them."""
    r = np.random.default_rng(seed)
    return torch.from_numpy(apart * r.standard_normal((groups, dims))[np.arange(n) % groups] + r.standard_normal((n, dims))).float()


class Layer(torch.nn.Module):
    """A feed-forward layer; gated layers have a map of their own for the gate."""

    def __init__(self, act, gated=False, inputs=32, neurons=96):
        super().__init__()
        self.act = act
        self.key, self.value = torch.nn.Linear(inputs, neurons), torch.nn.Linear(neurons, 8)
        self.gate = torch.nn.Linear(inputs, neurons) if gated else None

    def forward(self, x):
        return self.value(self.act(self.key(x)) if self.gate is None else self.act(self.gate(x)) * self.key(x))


ACTS = [(torch.relu, False), (torch.nn.functional.gelu, False), (torch.tanh, False), (torch.nn.functional.silu, True)]


def layer_stats(seed, act, gated=False, change=lambda layer: None, apart=3.0, **options):
    torch.manual_seed(seed)
    layer = Layer(act, gated)
    change(layer)
    return next(iter(cl.observe(layer, list(grouped_inputs(seed, apart=apart).split(100)), progress=False, **options).values()))


@pytest.mark.parametrize(("act", "gated"), ACTS)
def test_groups_of_inputs_are_no_modules_of_neurons(act, gated):
    stats = [layer_stats(s, act, gated) for s in range(4)]
    parts = [cl.partition(one, seed=s, controls=19, progress=False) for s, one in enumerate(stats)]
    assert all(part.control == "random keys on the same inputs" for part in parts)
    assert all(part.score > 0.1 for part in parts) and sum(part.significant for part in parts) <= 1


@pytest.mark.parametrize(("act", "gated"), ACTS[:1] + ACTS[3:])
def test_neurons_that_share_keys_are_modules_beyond_their_inputs(act, gated):
    truth = np.arange(96) % 6

    def shared(layer):
        with torch.no_grad():
            for each in (layer.key, layer.gate):
                if each is not None:
                    each.weight += 2 * each.weight[torch.arange(96) % 6]

    part = cl.partition(layer_stats(0, act, gated, shared, apart=0.0), controls=19, progress=False)
    assert part.significant and part.pvalue == 0.05 and ari(truth, part.labels) > 0.75


def test_without_inputs_the_verdict_says_so():
    stats = layer_stats(0, torch.relu)
    for one in (dataclasses.replace(stats, sample=None), layer_stats(0, torch.relu, sample=0), dataclasses.replace(stats, keys=stats.keys + 1)):
        assert "random network, inputs not known" in cl.partition(one, controls=3, progress=False).verdict


def test_random_features_fire_as_often_and_answer_alike():
    from circuitlab.analysis import features

    for act, gated in ACTS:
        stats = layer_stats(1, act, gated)
        found = features.features(stats, lambda correlation, firing, n: correlation)
        assert found is not None, act
        drawn = found.drawn(np.random.default_rng(0))
        assert (np.sort(drawn.sum(axis=1)) == np.sort(found.fires.sum(axis=1))).all() and (drawn != found.fires).mean() > 0.1


@pytest.mark.parametrize("kind", ["signed", "clipped", "absolute"])
def test_dense_affinities_of_random_networks_are_not_believed(kind):
    change = dict(signed=lambda c: c, clipped=lambda c: np.maximum(c, 0), absolute=np.abs)[kind]
    parts = [cl.partition(change(affinity.phi(*affinity.counts(random_network(s, neurons=64)))), seed=s, controls=19, progress=False) for s in range(3)]
    assert all(part.control == "same entries and spectrum" for part in parts)
    assert sum(part.significant for part in parts) <= 1
    found = cl.partition(change(affinity.phi(*affinity.counts(planted(1, strength=0.3)[0]))), controls=19, progress=False)
    assert found.significant


def test_random_entries_are_not_believed_however_skewed():
    r = np.random.default_rng(0)
    weights = [np.exp(1.5 * r.standard_normal((80, 80))) for _ in range(3)]
    assert sum(cl.partition((w + w.T) * (1 - np.eye(80)), seed=s, controls=19, progress=False).significant for s, w in enumerate(weights)) <= 1


def test_controls_have_the_entries_and_nearly_the_spectrum():
    correlation = affinity.phi(*affinity.counts(random_network(0)))
    drawn = null.Alike(correlation)(np.random.default_rng(0))
    np.testing.assert_allclose(np.sort(drawn, axis=None), np.sort(correlation, axis=None), atol=1e-6)
    want, have = np.linalg.eigvalsh(correlation), np.linalg.eigvalsh(drawn)
    assert np.abs(want - have).max() < 0.05 * want.max() and np.corrcoef(drawn.ravel(), correlation.ravel())[0, 1] < 0.2
