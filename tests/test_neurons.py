"""Streaming statistics of neurons, against the same computed at once."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis import neurons
from circuitlab.analysis.neurons import observe


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 3))


class Tokens(nn.Module):
    """A language model in small; `swap` runs positions first."""

    def __init__(self, swap=False):
        super().__init__()
        self.embed, self.key, self.value = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20)
        self.swap = swap

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = x.transpose(0, 1) if self.swap else x
        x = self.value(torch.relu(self.key(x)))
        return x.transpose(0, 1) if self.swap else x


X, Y = torch.randn(100, 8, generator=torch.Generator().manual_seed(1)), torch.arange(100) % 3


def splits(*sizes):
    return list(zip(X.split(list(sizes)), Y.split(list(sizes)), strict=True))


def test_counts_are_those_of_all_at_once(model):
    stats = observe(model, splits(100), labels=Y)["f"]
    model.eval()
    h = torch.relu(model[0](X)).detach()
    fires = (h > 0).double()
    assert stats.n == 100
    assert stats.threshold == 0
    assert torch.equal(stats.cofiring, (fires.T @ fires).int())
    assert torch.equal(stats.firing, fires.sum(0).long())
    assert torch.equal(stats.firing, stats.cofiring.diagonal().long())
    assert torch.allclose(stats.mean, h.double().mean(0))
    assert torch.allclose(stats.second, h.double().square().mean(0))
    assert torch.allclose(stats.magnitude, h.double().abs().mean(0) * model[3].weight.double().norm(dim=0))
    assert torch.equal(stats.keys, model[0].weight)
    assert torch.equal(stats.values, model[3].weight.T)
    assert stats.label_names == ("0", "1", "2")
    for label in range(3):
        assert torch.equal(stats.label_firing[label], fires[Y == label].sum(0).long())
        assert torch.allclose(stats.label_abs[label], h[Y == label].double().abs().sum(0))
    assert torch.equal(stats.histogram.sum(2), stats.label_n[:, None].expand(3, 16))


@pytest.mark.parametrize("sizes", [(1,) * 100, (33, 67), (99, 1)])
def test_batches_do_not_matter(model, sizes, monkeypatch):
    monkeypatch.setattr(neurons, "ROWS", 7)
    monkeypatch.setattr(neurons, "BLOCK", 5)
    whole, split = observe(model, splits(100), labels=Y), observe(model, splits(*sizes), labels=lambda batch: batch[1])
    for name, stats in whole.items():
        assert split[name].threshold == stats.threshold
        assert torch.equal(split[name].cofiring, stats.cofiring)
        assert torch.equal(split[name].cofiring, split[name].cofiring.T)
        assert torch.equal(split[name].label_firing, stats.label_firing)
        assert torch.equal(split[name].histogram, stats.histogram)
        assert torch.allclose(split[name].second, stats.second, rtol=1e-6)


def test_counts_past_what_a_float_holds_exactly(model):
    with torch.no_grad():
        model[0].bias.fill_(100.0)
    count = neurons._Count(next(iter(neurons.blocks(cl.trace(model, X)).values())), model, 0, torch.device("cpu"))
    rows = torch.ones(1, 16).expand(neurons.ROWS, 16)
    count._add(rows, None)
    one, before = count.result((), 1, True), 2**24 - 2 * neurons.ROWS + 1
    many = {name: torch.full_like(getattr(one, name), before) for name in ("firing", "cofiring")}
    count.go_on(replace(one, n=before, **many))  # as if so many had been counted
    for number in range(1, 8):
        count._add(rows, None)
        assert bool((count.result((), 1, True).cofiring == before + number * neurons.ROWS).all())


@pytest.mark.parametrize("swap", [False, True])
def test_padding_is_not_counted(swap):
    torch.manual_seed(0)
    model, ids = Tokens(swap), torch.randint(0, 20, (6, 7))
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[2, 4:] = mask[5, 1:] = 0
    of_kind = torch.arange(42).view(6, 7) % 4
    stats = next(iter(observe(model, [dict(input_ids=ids, attention_mask=mask)], labels=of_kind).values()))
    h = torch.relu(model.key(model.embed(ids)))[mask.bool()]
    assert stats.n == int(mask.sum())
    assert torch.equal(stats.firing, (h > 0).sum(0))
    for label in range(4):
        assert torch.equal(stats.label_firing[label], (h[of_kind[mask.bool()] == label] > 0).sum(0))
    every = next(iter(observe(model, [dict(input_ids=ids, attention_mask=mask)], mask=None).values()))
    assert every.n == 42


def test_labels_of_examples_hold_at_all_their_positions():
    model, ids = Tokens(), torch.randint(0, 20, (6, 7))
    stats = next(iter(observe(model, [ids[:2], ids[2:]], labels=["a", "b", None, "a", "b", "b"]).values()))
    assert stats.label_names == ("a", "b")
    assert stats.label_n.tolist() == [14, 21]


def test_interrupted_and_resumed(model):
    whole = observe(model, splits(10, 20, 30, 40), labels=Y)

    class Stops(list):
        def __iter__(self):
            for number, batch in enumerate(list.__iter__(self)):
                if number == 2 and self.armed and calls.append(1) is None and len(calls) == 4:
                    raise KeyboardInterrupt
                yield batch

    calls, batches = [], Stops(splits(10, 20, 30, 40))
    batches.armed = True
    calls += [1] * 1  # labels, thresholds and the pass itself walk the batches: the third walk is stopped
    with pytest.warns(UserWarning, match="interrupted after 2 batches"):
        part = observe(model, batches, labels=Y)
    assert not part["f"].complete
    assert part["f"].n == 30
    batches.armed = False
    after = observe(model, batches, labels=Y, resume=part)
    for name, stats in whole.items():
        assert torch.equal(after[name].cofiring, stats.cofiring)
        assert torch.equal(after[name].histogram, stats.histogram)
        assert torch.allclose(after[name].second, stats.second)
    with pytest.raises(cl.CircuitlabError, match="resume must be"):
        observe(model, batches, resume=part)


def test_wires_by_wire_name_and_path(model):
    circuit = cl.trace(model, X)
    by_wire = observe(model, splits(100), circuit.ffn.values())
    assert list(by_wire) == ["f", "f_2"]
    assert list(observe(model, splits(100), ["f_2"])) == ["f_2"]
    assert list(observe(model, splits(100), "3")) == ["f_2"]


def test_the_model_is_as_before(model):
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    observe(model, splits(50, 50))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert bool((model[0].weight.grad == 1).all())
    assert not model[0]._forward_hooks


def test_saved_and_loaded(model, tmp_path):
    stats = observe(model, splits(100), labels=Y)["f"]
    back = neurons.NeuronStats.load(stats.save(tmp_path / "stats.safetensors"))
    assert back.ffn == stats.ffn
    assert (back.wire, back.n, back.threshold, back.label_names) == (stats.wire, stats.n, stats.threshold, stats.label_names)
    for name in ("cofiring", "mean", "keys", "histogram"):
        assert torch.equal(getattr(back, name), getattr(stats, name))


def test_a_frame(model):
    frame = observe(model, splits(100), labels=["even", "odd"] * 50)["f"].to_frame()
    assert list(frame.columns) == ["neuron", "firing", "frequency", "mean", "mean_abs", "second", "magnitude", "fires on even", "fires on odd"]
    assert np.allclose(frame["frequency"] * 100, frame["firing"])


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(batches=iter([X])), "walked only once"),
    (dict(batches=X), "put a single batch into a list"),
    (dict(batches=[]), "batches is empty"),
    (dict(wires=["nothing"]), "'nothing' is no hidden wire of a feed-forward block; those of .* are f, f_2"),
    (dict(labels=[1, 2]), "labels has 2 entries, and the batches hold 100 examples"),
    (dict(labels=[-1] * 100), "labels holds no label"),
    (dict(threshold=-1.0), "threshold=-1.0"),
    (dict(threshold=1e9), r"no neuron of f fires: no \|h\| is above the threshold"),
    (dict(batches=[(X / 0, Y)]), "is not finite in batch 0"),
])
def test_bad_input(model, arguments, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(cl.CircuitlabError, match=message):
        observe(model, **{"batches": splits(100), **arguments})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_blocks():
    with pytest.raises(cl.CircuitlabError, match="no feed-forward block"):
        observe(nn.Linear(3, 3), [torch.randn(2, 3)])


def test_compiled_and_half_precision(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = observe(torch.compile(model), splits(100))
    assert torch.equal(next(iter(stats.values())).firing, observe(model, splits(100))["f"].firing)
    halved = observe(model.bfloat16(), [(X.bfloat16(), Y)])
    assert halved["f"].n == 100


# samples ----------------------------------------------------------------------------------------------


def test_a_sample_is_the_same_however_positions_come(model):
    whole = observe(model, splits(100), sample=16)["f"].sample
    assert whole.hidden.shape == (16, 16) and whole.inputs.shape == (16, 8) and len(set(whole.positions.tolist())) == 16
    assert torch.equal(whole.inputs, X[whole.positions])
    assert torch.allclose(torch.relu(whole.inputs @ model[0].weight.T + whole.bias), whole.hidden, atol=1e-6)
    for sizes in ((1,) * 100, (33, 67), (99, 1)):
        assert torch.equal(observe(model, splits(*sizes), sample=16)["f"].sample.positions, whole.positions)
    assert not torch.equal(observe(model, splits(100), sample=16, seed=1)["f"].sample.positions, whole.positions)
    assert observe(model, splits(100), sample=0)["f"].sample is None
    assert len(observe(model, splits(100))["f"].sample.positions) == 100


def test_samples_are_spread_evenly():
    from circuitlab.analysis.sample import Reservoir

    seen = torch.zeros(1000)
    for seed in range(200):
        reservoir = Reservoir(50, seed)
        for start in range(0, 1000, 64):
            rows = torch.arange(start, min(start + 64, 1000)).float()[:, None]
            reservoir.add(start, rows, rows)
        assert torch.equal(reservoir.hidden[:, 0].long(), reservoir.positions)
        seen[reservoir.positions] += 1
    assert seen.sum() == 10_000 and abs(seen.var() - 9.5) < 2 and abs(seen[:500].sum() - 5000) < 250  # binomial


def test_samples_are_continued_and_saved(model, tmp_path):
    whole = observe(model, splits(50, 50), sample=16)["f"]
    part = {"f": observe(model, splits(50, 50)[:1], sample=16)["f"]}
    after = observe(model, splits(50, 50), wires=["f"], sample=16, resume=part)["f"]
    back = neurons.NeuronStats.load(after.save(tmp_path / "stats.safetensors"))
    for one in (after, back):
        assert torch.equal(one.sample.positions, whole.sample.positions) and torch.equal(one.sample.hidden, whole.sample.hidden)


# experts in one parameter ------------------------------------------------------------------------------


class Experts(nn.Module):
    """Experts in one parameter: positions sorted by expert and multiplied in groups, or all positions by all experts."""

    def __init__(self, grouped, experts=3, top=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.route, self.grouped, self.top = nn.Embedding(20, 8), nn.Linear(8, experts), grouped, top
        self.up, self.down = nn.Parameter(torch.randn(experts, 8, 16) / 2), nn.Parameter(torch.randn(experts, 16, 8) / 4)

    def experts(self, x, chosen):
        """What each expert's neurons do at the positions that are sent to it, one by one."""
        return [torch.relu(x[(chosen == e).any(1)] @ self.up[e]) for e in range(len(self.up))]

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).flatten(0, 1)
        chosen = self.route(x).topk(self.top).indices
        if self.grouped:
            expert, order = chosen.flatten().sort()
            ends = torch.bincount(expert, minlength=len(self.up)).cumsum(0).int()
            y = torch._grouped_mm(torch.relu(torch._grouped_mm(x[order // self.top], self.up, offs=ends)), self.down, offs=ends)
            y = torch.zeros_like(x).index_add(0, order // self.top, y)
        else:
            sent = torch.zeros(len(x), len(self.up)).scatter(1, chosen, 1.0).T
            y = torch.bmm(torch.relu(torch.bmm(x.expand(len(self.up), -1, -1) * sent[:, :, None], self.up)), self.down).sum(0)
        return y.view(*input_ids.shape, -1)


@pytest.mark.parametrize("grouped", [True, False])
def test_experts_in_one_parameter_are_observed_one_by_one(grouped):
    model, ids = Experts(grouped), torch.randint(0, 20, (12, 7), generator=torch.Generator().manual_seed(1))
    mask, of_kind = torch.ones(12, 7, dtype=torch.long), torch.arange(84).view(12, 7) % 4
    mask[2, 4:] = mask[9, 1:] = 0
    batches = [dict(input_ids=ids[a:b], attention_mask=mask[a:b]) for a, b in ((0, 5), (5, 12))]
    found = observe(model, batches, labels=of_kind, threshold=0.1)
    with torch.no_grad():
        x, kept, kinds = model.embed(ids).flatten(0, 1), mask.flatten().bool(), of_kind.flatten()
        chosen = model.route(x).topk(2).indices
    assert len(found) == 3
    for e, (name, stats) in enumerate(found.items()):
        sent = (chosen == e).any(1) & kept
        h = torch.relu(x[sent] @ model.up[e]).detach()
        fires = (h > 0.1).double()
        assert name.endswith(f"[{e}]") and stats.wire == name and stats.ffn.expert == e
        assert stats.n == int(sent.sum()) and torch.equal(stats.cofiring.double(), fires.T @ fires)
        assert torch.equal(stats.keys, model.up[e].T) and torch.equal(stats.values, model.down[e])
        for label in range(4):
            assert torch.equal(stats.label_firing[label], fires[kinds[sent] == label].sum(0).long())
        assert torch.allclose(torch.relu(stats.sample.inputs @ stats.keys.T), stats.sample.hidden, atol=1e-5)
        assert len(cl.partition(stats, controls=3, progress=False).labels) == 16 and stats.functional().precision.shape == (4, 16)


def test_experts_that_get_nothing_are_left_out():
    model = Experts(True, top=1)
    with torch.no_grad():
        model.route.bias += torch.tensor([9.0, 0.0, -9.0])
    with pytest.warns(UserWarning, match=r"no position was sent to .*\[1\], .*\[2\]"):
        found = observe(model, [torch.randint(0, 20, (4, 6))])
    assert [name[-3:] for name in found] == ["[0]"]


class Tied(nn.Module):
    """Two blocks of one square matrix, which the second one writes by as well, and one hidden wire."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.out, self.end = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8)), nn.Linear(8, 8), nn.Linear(8, 3)

    def layers(self, x):
        first = torch.relu(nn.functional.linear(x, self.w, self.b))
        second = torch.relu(nn.functional.linear(self.out(first), self.w))
        return first, second, self.end(nn.functional.linear(second, self.w.t()))

    def forward(self, x):
        return self.layers(x)[-1]


class SharedDown(Tied):
    """Two blocks whose neurons write along the same vectors."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def layers(self, x):
        first = torch.relu(self.one(x))
        x = x + self.down(first)
        second = torch.relu(self.two(x))
        return first, second, x + self.down(second)


@pytest.mark.parametrize("make", [Tied, SharedDown])
def test_blocks_that_share_weights_are_counted_apart(make):
    torch.manual_seed(0)
    model, batches = make(), [torch.randn(5, 8), torch.randn(3, 8)]
    found = observe(model, batches, progress=False)
    given = observe(model, batches, cl.trace(model, batches[0]).ffn.values(), progress=False)
    wanted = [sum((h > 0).sum(0) for h in layer) for layer in list(zip(*map(model.layers, batches), strict=True))[:-1]]
    for stats in (found, given):
        assert [s.n for s in stats.values()] == [8] * len(wanted)
        assert [s.firing.tolist() for s in stats.values()] == [counts.tolist() for counts in wanted]
