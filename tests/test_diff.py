"""What changed between two circuits, told in lines and drawn."""

import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.diagram.check import look
from circuitlab.diagram.compare import compare
from circuitlab.errors import InputError
from circuitlab.gallery.gpt import GPT

TOKENS = torch.zeros(2, 16, dtype=torch.long)


class Net(nn.Module):
    def __init__(self, act, *, extra=False, hidden=256, layers=2, scale=2.0):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        parts = {"norm": nn.LayerNorm(64), "up": nn.Linear(64, hidden), "down": nn.Linear(hidden, 64)}
        self.layers = nn.ModuleList([nn.ModuleDict(dict(parts)) for _ in range(layers)])
        self.act, self.scale = act, scale
        self.extra = nn.Dropout(0.1) if extra else None
        self.readout = nn.Linear(64, 50)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            y = self.act(layer["up"](layer["norm"](x)))
            y = self.extra(y) if self.extra else y
            x = x + layer["down"](y) * self.scale
        return self.readout(x)


def net(*args, **kwargs):
    return cl.trace(Net(*args, **kwargs), TOKENS)


def test_nothing_changed():
    found = net(nn.GELU()).diff(net(nn.GELU()))
    assert found.same
    assert not found
    assert repr(found) == "Diff of Net and Net: no change"


def test_another_function_a_block_more_and_a_wider_wire_are_told_apart():
    found = net(nn.GELU()).diff(net(nn.ReLU(), extra=True, hidden=512))
    told = {(c.kind, c.what, c.before, c.after, c.how) for c in found.changes}
    assert ("changed", "block", "act", "act", "GELU -> ReLU") in told
    assert ("changed", "op", "act.gelu", "act.relu", "gelu -> relu") in told
    assert ("added", "block", "", "extra", "Dropout") in told
    wires = [c for c in found.changes if c.what == "wire"]
    assert {c.how for c in wires} == {"size 256 -> 512"}
    assert not found.removed
    assert found.to_frame().shape == (len(found.changes), 5)


def test_numbers_and_layers():
    found = net(nn.GELU()).diff(net(nn.GELU(), scale=3.0))
    assert [c.how for c in found.changes] == ["scalar 2.0 -> 3.0"] * 2
    assert "and 1 more like it" in repr(found)
    one_more = cl.trace(GPT(), TOKENS).diff(cl.trace(GPT(layers=7), TOKENS))
    blocks = [c for c in one_more.changes if c.what == "block"]
    assert [(c.kind, c.after) for c in blocks] == [("added", "blocks.6")]
    assert not one_more.changed
    assert not one_more.removed


def test_it_is_the_other_way_round_from_the_other_side():
    one, other = net(nn.GELU()), net(nn.ReLU(), extra=True, layers=3)
    there, back = one.diff(other), other.diff(one)
    assert {(c.what, c.before, c.after) for c in there.added} == {(c.what, c.after, c.before) for c in back.removed}
    assert {(c.before, c.after) for c in there.changed} == {(c.after, c.before) for c in back.changed}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_are_drawn_and_changes_tinted(theme):
    found = net(nn.GELU()).diff(net(nn.ReLU(), extra=True, hidden=512))
    text = found.svg(theme=theme)
    assert "before: Net" in text
    assert "after: Net" in text
    scene = compare(found.before, found.after, ({"act": "changed"}, {"extra": "added", "layers.0.f": "changed"}))
    assert look(scene).ok
    tints = {(m.op or m.block or m.wire, m.fill or m.stroke) for m in scene.marks if {m.fill, m.stroke} & {"added", "changed"} and m.role != "legend"}
    assert ("layers.0.f", "changed") in tints
    assert any(colour == "added" for _, colour in tints)
    assert set(found._repr_mimebundle_()) == {"image/svg+xml", "text/plain"}


def test_blocks_with_changes_inside_are_unfolded():
    one, other = GPT(), GPT()
    other.blocks[0].norm1.eps = 1e-3
    found = cl.trace(one, TOKENS).diff(cl.trace(other, TOKENS))
    assert [(c.what, c.before) for c in found.changes] == [("op", "blocks.0.norm1.layer_norm")]


def test_only_circuits_are_compared():
    with pytest.raises(InputError, match="was given a GPT; trace the model first"):
        cl.trace(GPT(), TOKENS).diff(GPT())
