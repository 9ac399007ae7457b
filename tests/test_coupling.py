"""Coupling and lift between modules of different blocks: exact sums, planted structure found, none found in none."""

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis import coupling as weights
from circuitlab.analysis import lift
from circuitlab.analysis.coupling import Coupling, coupling, pooled, turned
from circuitlab.analysis.lift import cofiring_lift
from circuitlab.analysis.neurons import observe


class Block(nn.Module):
    def __init__(self, width, neurons, norm):
        super().__init__()
        self.norm, self.key, self.value = norm(width), nn.Linear(width, neurons), nn.Linear(neurons, width)

    def forward(self, x):
        return x + self.value(torch.relu(self.key(self.norm(x))))


class Stream(nn.Module):
    """Blocks on a residual stream."""

    def __init__(self, width=24, neurons=(48, 40), norm=nn.LayerNorm):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, n, norm) for n in neurons)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Turns(nn.Module):
    """A map between the blocks, which the second alone reads."""

    def __init__(self):
        super().__init__()
        self.one, self.turn, self.two = Block(24, 48, nn.LayerNorm), nn.Linear(24, 24), Block(24, 40, nn.LayerNorm)

    def forward(self, x):
        return self.two(self.turn(self.one(x)))


class Written(nn.Module):
    """RMS norm as code, with dropout after it."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return nn.functional.dropout(self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), 0.1, self.training)


def model_and_circuit(seed=0, **options):
    torch.manual_seed(seed)
    model = Stream(**options)
    return model, cl.trace(model, torch.randn(3, 5, 24))


A, B = np.arange(48) // 12, np.arange(40) // 10
WIRES = "blocks.0.f", "blocks.1.f"


def both(a=A, b=B):
    return dict(zip(WIRES, (a, b), strict=True))


def test_values_are_mean_cosines():
    model, circuit = model_and_circuit()
    with torch.no_grad():
        model.blocks[1].norm.weight.copy_(torch.rand(24) + 0.5)
    (got,) = coupling(circuit, model, both(), controls=5, progress=False)
    value = model.blocks[0].value.weight.T.detach()
    key = (model.blocks[1].key.weight * model.blocks[1].norm.weight).detach()
    value, key = value - value.mean(1, keepdim=True), key - key.mean(1, keepdim=True)
    cosine = torch.cosine_similarity(value[:, None], key[None], dim=2).abs().double().numpy()
    blocks = cosine.reshape(4, 12, 4, 10)
    assert (got.source, got.target, got.kind) == (*WIRES, "weights")
    assert got.folded == ("blocks.1.norm.weight",)
    assert np.allclose(got.value, blocks.mean((1, 3)), atol=1e-6)
    additive = cosine.mean(1).reshape(4, 12).mean(1)[:, None] + cosine.mean(0).reshape(4, 10).mean(1) - cosine.mean()
    assert np.allclose(got.expected, additive, atol=1e-6)


@pytest.mark.parametrize(("norm", "folded"), [
    (nn.Identity, ()), (nn.RMSNorm, ("blocks.1.norm.weight",)), (Written, ("blocks.1.norm.gain",)),
])
def test_norms_are_folded_in(norm, folded):
    model, circuit = model_and_circuit(norm=norm)
    for name in folded:
        with torch.no_grad():
            model.get_parameter(name).copy_(torch.rand(24) + 0.5)
    (got,) = coupling(circuit, model, both(), controls=5, progress=False)
    key = model.blocks[1].key.weight * (model.get_parameter(folded[0]) if folded else 1)
    value = model.blocks[0].value.weight.T
    cosine = torch.cosine_similarity(value[:, None], key[None], dim=2).abs().detach().numpy()
    assert got.folded == folded
    assert np.allclose(got.value, cosine.reshape(4, 12, 4, 10).mean((1, 3)), atol=1e-6)


def test_size_of_chunks_does_not_matter(monkeypatch):
    model, circuit = model_and_circuit()
    (whole,) = coupling(circuit, model, both(), controls=5, progress=False)
    monkeypatch.setattr(weights, "ROWS", 7)
    (parts,) = coupling(circuit, model, both(), controls=5, progress=False)
    assert np.allclose(parts.value, whole.value)
    assert np.allclose(parts.spread, whole.spread)


def test_variance_over_shuffled_neurons_is_exact():
    rng = np.random.default_rng(0)
    values, keys = torch.randn(30, 4), torch.randn(20, 4)
    a, b = rng.permutation(np.repeat([0, 1, 2], [5, 10, 15])), rng.permutation(np.repeat([0, 1], [8, 12]))
    _, _, spread = weights._Sums(keys, a, b, torch.device("cpu"))(values)
    drawn = np.array([
        [weights._Sums(keys, one, other, torch.device("cpu"))(values)[1] for one, other in ((rng.permutation(a), b), (a, rng.permutation(b)))]
        for _ in range(1000)
    ])
    assert np.allclose(drawn.std(0).max(0), spread, rtol=0.1)
    assert np.abs(drawn.mean(0)).max() < 4 * spread.max() / 1000**0.5


def test_turning_keeps_lengths_and_angles():
    rows = np.random.default_rng(0).normal(size=(6, 17)).astype(np.float32)
    new = turned(rows, np.random.default_rng(1))
    assert np.allclose(new @ new.T, rows @ rows.T, atol=1e-5)
    assert np.abs(np.corrcoef(new.ravel(), rows.ravel())[0, 1]) < 0.3


def test_planted_coupling_is_found():
    model, circuit = model_and_circuit()
    with torch.no_grad():
        for m in range(4):  # module m writes to where module 3 - m reads
            model.blocks[0].value.weight[6 * m : 6 * m + 6, 12 * m : 12 * m + 12] += 1.0
            model.blocks[1].key.weight[10 * (3 - m) : 10 * (3 - m) + 10, 6 * m : 6 * m + 6] += 1.0
    (got,) = coupling(circuit, model, both(), progress=False)
    assert np.array_equal(got.significant(), np.eye(4, dtype=bool)[::-1])
    assert (got.z[np.eye(4, dtype=bool)[::-1]] > 3).all()
    assert "4 of 16 pairs above chance" in repr(got)
    (none,) = coupling(circuit, model, both(np.random.default_rng(0).permutation(A), B), progress=False)
    assert not none.significant().any()


def test_modules_of_alike_neurons_in_blocks_that_know_nothing_of_each_other_are_not_coupled():
    """Keys and values in clusters: shuffled neurons alone would find couplings, turned streams do not."""
    false, alone = 0, 0
    for seed in range(25):
        model, circuit = model_and_circuit(seed) if not seed else (model, circuit)
        torch.manual_seed(seed)
        with torch.no_grad():
            model.blocks[0].value.weight.copy_((torch.randn(4, 24).repeat_interleave(12, 0) + 0.5 * torch.randn(48, 24)).T)
            model.blocks[1].key.weight.copy_(torch.randn(4, 24).repeat_interleave(10, 0) + 0.5 * torch.randn(40, 24))
        (got,) = coupling(circuit, model, both(), controls=29, progress=False, seed=seed)
        false += got.significant().any()
        _, beyond, spread = weights._Sums(
            weights._unit(model.blocks[1].key.weight.detach()), A, B, torch.device("cpu")
        )(weights._unit(model.blocks[0].value.weight.detach().T))
        alone += (beyond / spread > 3.5).any()
    assert false <= 4
    assert alone > 15


def test_a_direction_that_all_share_makes_no_modules():
    """Both blocks use one direction of the stream much, some neurons more: random partitions are not coupled."""
    model, circuit = model_and_circuit(norm=nn.Identity)
    with torch.no_grad():
        model.blocks[0].value.weight[0] += torch.linspace(0, 2, 48)
        model.blocks[1].key.weight[:, 0] += torch.linspace(0, 2, 40)
    found = 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        (got,) = coupling(circuit, model, both(rng.permutation(A), rng.permutation(B)), controls=19, progress=False)
        found += got.significant().any()
    assert found <= 3


def test_p_values_among_controls_are_calibrated():
    rng = np.random.default_rng(0)
    p = np.array([pooled(x[0], x[1:]) for x in rng.normal(size=(300, 20, 6, 6)) * np.linspace(1, 9, 6)])
    for level in (0.002, 0.01, 0.1, 0.5):
        assert np.mean(p <= level) <= 1.2 * level + 0.001
    assert np.mean(p <= 0.1) >= 0.08
    assert (pooled(np.ones((2, 2)), np.ones((5, 2, 2))) == 1).all()
    assert pooled(np.array([np.nan, 9.0]), rng.normal(size=(9, 2))).tolist()[0] == 1


def test_a_module_without_neurons_is_coupled_to_none():
    model, circuit = model_and_circuit()
    (got,) = coupling(circuit, model, both(A, np.where(B == 1, 5, B)), controls=5, progress=False)
    assert (got.pvalue[:, [1, 4]] == 1).all()
    (same,) = coupling(circuit, model, both(), controls=5, progress=False)
    assert np.allclose(got.value[:, [0, 5, 2, 3]], same.value)


def test_blocks_in_a_row_and_blocks_that_are_apart():
    model, circuit = model_and_circuit(neurons=(48, 40, 16))
    three = {"blocks.2.f": [0, 1] * 8, **both()}
    found = coupling(circuit, model, three, controls=3, progress=False)
    assert [(c.source, c.target) for c in found] == [WIRES, ("blocks.1.f", "blocks.2.f")]
    turns = Turns()
    apart = cl.trace(turns, torch.randn(3, 5, 24))
    names = [wire.name for wire in apart.ffn.values()]
    with pytest.raises(cl.CircuitlabError, match="none of these wires writes to a stream that the next reads"):
        coupling(apart, turns, dict(zip(names, (A, B), strict=True)), progress=False)
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(cl.CircuitlabError, match="f writes to f_2, and f_2 reads f"):
        coupling(cl.trace(mlp, torch.randn(2, 8)), mlp, {"f": [0, 1] * 4, "f_2": [0, 1] * 4}, progress=False)


@pytest.mark.parametrize(("partitions", "message"), [
    ({WIRES[0]: A}, "at least two wires"),
    (A, "at least two wires"),
    ({WIRES[0]: A, "x": B}, "'x' is no hidden wire"),
    ({WIRES[0]: A, WIRES[1]: A}, "of 48 neurons, and blocks.1.f has 40"),
    ({WIRES[0]: A, "blocks.0": A}, "names a wire twice"),
])
def test_bad_input_of_coupling(partitions, message):
    model, circuit = model_and_circuit()
    with pytest.raises(cl.CircuitlabError, match=message):
        coupling(circuit, model, partitions, progress=False)


def test_another_model_and_too_few_controls():
    model, circuit = model_and_circuit()
    with pytest.raises(cl.CircuitlabError, match="the circuit was traced from another"):
        coupling(circuit, nn.Linear(2, 2), both(), progress=False)
    with pytest.raises(cl.CircuitlabError, match="controls=1"):
        coupling(circuit, model, both(), controls=1, progress=False)


# lift -------------------------------------------------------------------------------------------------


def fires(model, x):
    """What fires in both blocks, (positions, neurons) each."""
    one, two = model.blocks
    first = torch.relu(one.key(one.norm(x)))
    x = x + one.value(first)
    return tuple((h > 0).double().flatten(0, -2).numpy() for h in (first, torch.relu(two.key(two.norm(x)))))


def lifted(x, split, **options):
    model = model_and_circuit()[0]
    batches = list(x.split(split))
    stats = observe(model, batches, progress=False)
    return model, cofiring_lift(model, batches, stats, both(), progress=False, **options)[0]


X = torch.randn(24, 7, 24, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("split", [24, 1, 5])
def test_lift_is_exact_whatever_the_batches(split):
    model, got = lifted(X, split, controls=9)
    first, second = (f @ np.eye(4)[labels] for f, labels in zip(fires(model, X), (A, B), strict=True))
    assert np.allclose(got.value, first.T @ second * len(first) / np.outer(first.sum(0), second.sum(0)), rtol=1e-12)
    assert got.source_sizes.tolist() == [12] * 4
    assert got.target_sizes.tolist() == [10] * 4
    assert got.kind == "lift"


def test_padding_is_left_out():
    class Masked(Stream):
        def forward(self, x, attention_mask):
            return super().forward(x)

    torch.manual_seed(0)
    model, mask = Masked(), torch.ones(24, 7)
    mask[3, 2:] = mask[9, :4] = 0
    batches = [dict(x=X, attention_mask=mask)]
    stats = observe(model, batches, progress=False)
    (got,) = cofiring_lift(model, batches, stats, both(), controls=9, progress=False)
    keep = mask.bool().flatten().numpy()
    first, second = (f[keep] @ np.eye(4)[labels] for f, labels in zip(fires(model, X), (A, B), strict=True))
    assert np.allclose(got.value, first.T @ second * keep.sum() / np.outer(first.sum(0), second.sum(0)), rtol=1e-12)


@pytest.mark.parametrize("length", [1, 9])
def test_modules_that_fire_together_are_found(length):
    """Module m of both blocks fires on examples of kind m alone."""
    model, _ = model_and_circuit(norm=nn.Identity)
    with torch.no_grad():
        for block, labels in zip(model.blocks, (A, B), strict=True):
            block.key.weight.copy_(torch.eye(4, 24)[labels])
            block.key.bias.fill_(-0.5)
            block.value.weight.zero_()
    kinds = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0))
    x = torch.eye(4, 24)[kinds][:, None].expand(60, length, 24) + 0.3 * torch.rand(60, length, 24)
    stats = observe(model, [x], progress=False)
    (got,) = cofiring_lift(model, [x], stats, both(), progress=False)
    assert np.array_equal(got.significant(), np.eye(4, dtype=bool))
    assert np.allclose(got.value.diagonal(), 60 / np.bincount(kinds))
    assert np.abs(got.expected - 1).max() < 0.4


def test_random_modules_do_not_fire_together():
    """All neurons of both blocks fire more on some examples: that is lift, but of no modules."""
    model, _ = model_and_circuit(norm=nn.Identity)
    with torch.no_grad():
        for block in model.blocks:
            block.key.weight[:, 0] = torch.rand(len(block.key.weight)) + 0.5
            block.value.weight.zero_()
    x = torch.randn(60, 5, 24, generator=torch.Generator().manual_seed(0))
    stats, false = observe(model, [x], progress=False), 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        (got,) = cofiring_lift(model, [x], stats, both(rng.permutation(A), rng.permutation(B)), seed=seed, progress=False)
        false += got.significant().any()
    assert (got.value > 1.05).all()
    assert false <= 3


@pytest.mark.parametrize("length", [1, 9])
def test_blocks_that_see_different_things_do_not_fire_together(length):
    """Examples are alike at all their positions, and neurons of a module are alike: that alone is no lift."""
    model, _ = model_and_circuit(norm=nn.Identity)
    with torch.no_grad():
        for at, (block, labels) in enumerate(zip(model.blocks, (A, B), strict=True)):
            block.value.weight.zero_()
            block.key.weight.copy_(torch.randn(4, 24)[labels] + 0.1 * torch.randn(len(labels), 24))
            block.key.weight[:, 12 * (1 - at) : 12 * (1 - at) + 12] = 0
    false, p = 0, []
    stats = observe(model, [torch.randn(40, length, 24)], progress=False)
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 1, 24, generator=rng) + 0.2 * torch.randn(40, length, 24, generator=rng)
        x = x + torch.randn(1, length, 24, generator=rng) if length > 1 else x
        (got,) = cofiring_lift(model, [x[:13], x[13:]], stats, both(), controls=29, seed=seed, progress=False)
        false += got.significant().any()
        p.append(got.pvalue)
    assert false <= 3
    assert np.mean(np.array(p) <= 0.1) < 0.2


def test_examples_are_paired_anew(monkeypatch):
    joint = lift._Joint(3, np.random.default_rng(0))
    same = np.repeat(np.arange(8), 3)
    for _ in range(20):
        other = joint._other(same)
        assert (same[other] != same).all()
        assert (other % 3 == np.arange(24) % 3).all()
        assert sorted(other) == list(range(24))
    ragged = np.repeat(np.arange(8), [1, 2, 3, 4, 3, 2, 4, 4])
    for _ in range(20):
        other = joint._other(ragged)
        assert (ragged[other] != ragged).all()
        assert sorted(other) == list(range(23))


def test_frames_and_disk(tmp_path):
    _, got = lifted(X, 24, controls=9)
    frame = got.to_frame()
    assert list(frame.columns) == ["source", "source module", "target", "target module", "lift", "expected", "z", "pvalue", "adjusted"]
    assert len(frame) == 16
    assert got.plot().data[0].z.shape == (4, 4)
    again = Coupling.load(got.save(tmp_path / "c.safetensors"))
    assert np.array_equal(again.value, got.value)


def test_the_model_is_as_before():
    model = model_and_circuit()[0]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    stats = observe(model, [X], progress=False)
    cofiring_lift(model, [X], stats, both(), controls=3, progress=False)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bad_input_of_lift():
    model = model_and_circuit()[0]
    stats = observe(model, [X], [WIRES[0]], progress=False)
    with pytest.raises(cl.CircuitlabError, match=r"stats has nothing of blocks\.1\.f; observe these wires first"):
        cofiring_lift(model, [X], stats, both(), progress=False)
    stats = observe(model, [X], progress=False)
    with pytest.raises(cl.CircuitlabError, match="batches is empty"):
        cofiring_lift(model, [], stats, both(), progress=False)
    with pytest.raises(cl.CircuitlabError, match="7 positions are too few"):
        cofiring_lift(model, [X[:1]], stats, both(), progress=False)
