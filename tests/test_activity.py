"""What modules do at each position."""

from types import SimpleNamespace

import pytest
import torch

import circuitlab as cl
from circuitlab.analysis.activity import Timeline, timeline, top_positions
from tests.test_neurons import Tokens


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model, ids = Tokens(), torch.randint(0, 20, (6, 7))
    (wire, stats), = cl.observe(model, [ids]).items()
    return model, ids, {wire: SimpleNamespace(labels=torch.arange(16) % 3, ffn=stats.ffn)}, wire


def shares(model, ids):
    size = torch.relu(model.key(model.embed(ids))) * model.value.weight.norm(dim=0)
    sums = torch.stack([size[..., torch.arange(16) % 3 == m].sum(-1) for m in range(3)], -1)
    return (sums / sums.sum(-1, keepdim=True)).detach().double()


@pytest.mark.parametrize("swap", [False, True])
def test_timeline(setting, swap, tmp_path):
    model, ids, parts, wire = setting
    if swap:
        other = Tokens(True)
        other.load_state_dict(model.state_dict())
        model = other
        stats = cl.observe(model, [ids])
        parts[wire].ffn = stats[wire].ffn
    found = timeline(model, parts, ids, tokens=[f"t{n}" for n in range(7)], example=2)
    assert torch.allclose(found.shares[wire], shares(model, ids)[2].T)
    frame = found.to_frame()
    assert len(frame) == 21
    assert frame["token"][1] == "t1"
    assert Timeline.load(found.save(tmp_path / "t.safetensors")).tokens == found.tokens


def test_top_positions_do_not_depend_on_batches(setting):
    model, ids, parts, wire = setting

    def text(batch, example, position):
        return str(int(batch[example, position]))

    found = top_positions(model, parts, [ids[:1], ids[1:4], ids[4:]], n=5, text=text)
    assert [r[:4] for r in found.rows] == [r[:4] for r in top_positions(model, parts, [ids], n=5, text=text).rows]
    wanted = shares(model, ids)
    for module in range(3):
        rows = found.of(wire, module)
        assert [row[2] for row in rows] == pytest.approx(wanted[..., module].flatten().topk(5).values.tolist())
        for example, position, share, shown in rows:
            assert share == pytest.approx(float(wanted[example, position, module]))
            assert shown == str(int(ids[example, position]))
    assert len(found.to_frame()) == 15


def test_bad_input(setting):
    model, ids, parts, _ = setting
    with pytest.raises(cl.CircuitlabError, match="tokens has 3 entries, and the example 7 positions"):
        timeline(model, parts, ids, tokens="abc")
    with pytest.raises(cl.CircuitlabError, match="example=9, and the batch holds 6"):
        timeline(model, parts, ids, example=9)
