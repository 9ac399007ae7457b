"""Loss against experts, against what the sparse module computes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import circuitlab as cl
from circuitlab.analysis.feedforward import blocks
from tests.test_feedforward import Gated


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = Gated()
    x, y = torch.randn(50, 6), torch.randn(50, 6)
    block = next(iter(blocks(cl.trace(model, x)).values()))
    return model, x, y, {block.wire: SimpleNamespace(labels=torch.arange(16) // 4, ffn=block)}


def test_gate_is_what_the_sparse_module_computes(setting):
    model, x, y, parts = setting
    curve = cl.expert_curve(model, parts, [(x[:20], y[:20]), (x[20:], y[20:])], "mse", ("gate", "similarity", "oracle"), shares=(0.25, 0.5, 1.0))
    for way in ("gate", "similarity"):
        for top_k, share in ((1, 0.25), (2, 0.5), (4, 1.0)):
            moe = cl.to_moe(model, parts, top_k=top_k, selection=way)
            assert curve.loss(way, share) == pytest.approx(float(F.mse_loss(moe(x), y)), rel=1e-5)
    assert curve.dense == pytest.approx(float(F.mse_loss(model(x), y)), rel=1e-6)
    assert curve.loss("oracle", 1.0) == pytest.approx(curve.dense)
    assert curve.loss("gate", 0.25, "random") != curve.loss("gate", 0.25)
    with pytest.raises(cl.CircuitlabError, match="no loss for"):
        curve.loss("gate", 0.3)


def test_batches_do_not_matter_and_the_seed_decides(setting):
    model, x, y, parts = setting
    whole = cl.expert_curve(model, parts, [(x, y)], "mse", ("gate", "oracle"))
    split = cl.expert_curve(model, parts, list(zip(x.split(7), y.split(7), strict=True)), "mse", ("gate", "oracle"))
    assert [row[:3] for row in whole.rows] == [row[:3] for row in split.rows]
    assert [row[3] for row in whole.rows] == pytest.approx([row[3] for row in split.rows], rel=1e-5)
    again = [cl.expert_curve(model, parts, [(x, y)], "mse", ("random",), seed=seed).rows for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_oracle_is_what_hurts_least_where_experts_add_up():
    """With one output, experts of one sign: leaving out the smallest changes the output least."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1, bias=False))
    with torch.no_grad():
        model[2].weight.abs_()
        x = torch.randn(200, 6)
        y = model(x)
    block = next(iter(blocks(cl.trace(model, x)).values()))
    curve = cl.expert_curve(model, {block.wire: SimpleNamespace(labels=torch.arange(16) // 4, ffn=block)}, [(x, y)], "mse",
                            ("oracle", "gate", "random"))
    for share in (0.25, 0.5, 0.75):
        assert curve.loss("oracle", share) < curve.loss("gate", share)
        assert curve.loss("oracle", share) < curve.loss("random", share)
    assert curve.dense == pytest.approx(0, abs=1e-12)


def test_language_model_losses_are_means_over_tokens(setting):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.key, self.value = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 9)

        def forward(self, input_ids, labels=None):
            logits = self.value(torch.relu(self.key(self.embed(input_ids))))
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) if labels is not None else None
            return SimpleNamespace(logits=logits, loss=loss)

    torch.manual_seed(0)
    model, ids = Own(), torch.randint(0, 9, (6, 10))
    labels = ids.clone()
    labels[1, 4:] = labels[4, 2:] = -100
    parts = {w: SimpleNamespace(labels=torch.arange(16) // 4, ffn=s.ffn) for w, s in cl.observe(model, [dict(input_ids=ids)]).items()}
    one = cl.expert_curve(model, parts, [dict(input_ids=ids, labels=labels)], shares=(0.5,))
    two = cl.expert_curve(model, parts, [dict(input_ids=ids[:2], labels=labels[:2]), dict(input_ids=ids[2:], labels=labels[2:])], shares=(0.5,))
    assert one.dense == pytest.approx(two.dense, rel=1e-6)
    assert one.loss("gate", 0.5) == pytest.approx(two.loss("gate", 0.5), rel=1e-6)


def test_frame_and_file(setting, tmp_path):
    model, x, y, parts = setting
    curve = cl.expert_curve(model, parts, [(x, y)], "mse", shares=(0.5,))
    frame = curve.to_frame()
    assert list(frame.columns) == ["partition", "selection", "share", "loss", "increase"]
    assert len(frame) == 6
    assert type(curve).load(curve.save(tmp_path / "curve.safetensors")) == curve


@pytest.mark.parametrize(("options", "message"), [
    (dict(selection=("best",)), r"selection=\['best'\] is not among"),
    (dict(shares=(0.0,)), "shares="),
    (dict(loss="huber"), "loss='huber' is not known"),
    (dict(batches=[torch.randn(3, 6)]), "needs a target"),
    (dict(loss=None), "no loss of its own"),
    (dict(batches=[(torch.randn(3, 6), torch.randn(3, 5))]), r"outputs of shape \(3, 6\) and targets of shape \(3, 5\)"),
])
def test_bad_input(setting, options, message):
    model, x, y, parts = setting
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(cl.CircuitlabError, match=message):
        cl.expert_curve(model, parts, **({"batches": [(x, y)], "loss": "mse"} | options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_one_of_stacked_experts_is_refused():
    from tests.test_neurons import Experts

    model, ids = Experts(False), torch.randint(0, 20, (12, 7))
    name, stats = next(iter(cl.observe(model, [ids], progress=False).items()))
    part = cl.partition(stats, "keys", k=2, controls=0, progress=False)
    with pytest.raises(cl.CircuitlabError, match=r"experts that share the parameter"):
        cl.expert_curve(model, {name: part}, [ids], lambda out, batch: out.mean(), progress=False)
