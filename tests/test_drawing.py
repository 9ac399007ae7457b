"""What is drawn once, what is left out, and how wires pass over glyphs."""

import torch
from torch import nn

import circuitlab as cl
from circuitlab.diagram.check import look
from circuitlab.diagram.layout import draw
from circuitlab.diagram.outputs import main_part
from circuitlab.diagram.passing import OVER, crossings
from circuitlab.diagram.place import place
from circuitlab.diagram.reduce import Reducer


def drawing_of(circuit, depth=1):
    return Reducer(circuit, depth=depth, opened=frozenset(), closed=frozenset(), batch=True).drawing()


class Unrolled(nn.Module):
    """A recurrent cell, called for each position; ``peek`` reads the state after one of the steps."""

    def __init__(self, peek=None, order=1):
        super().__init__()
        self.cell, self.peek, self.order = nn.GRUCell(4, 5), peek, order

    def forward(self, x, h):
        states, seen = [], 0
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            states.append(h)
            if t == self.peek:
                seen = h
        return torch.stack(states[:: self.order], 1).tanh() + (0 if self.peek is None else seen[:, None])


def loops(model, steps=9):
    drawing = drawing_of(cl.trace(model, torch.randn(2, steps, 4), torch.randn(2, 5)))
    return drawing, {name: count for name, (block, count) in drawing.plates.items() if block.kind == "loop"}


def test_steps_of_a_loop_are_drawn_once():
    drawing, found = loops(Unrolled())
    assert list(found.values()) == [9]
    assert [node.label for node in drawing.nodes if node.kind == "index"] == ["λ"]
    assert sum(node.label == "gru_cell" for node in drawing.nodes) == 1


def test_steps_may_be_collected_backwards():
    assert list(loops(Unrolled(order=-1))[1].values()) == [9]


def test_a_step_that_something_else_reads_ends_a_loop():
    assert list(loops(Unrolled(peek=4))[1].values()) == [5, 4]


def test_steps_that_are_collected_in_part_stay_apart():
    class Half(Unrolled):
        def forward(self, x, h):
            states = []
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
                if t % 2:
                    states.append(h)
            return torch.stack(states, 1)

    drawing, found = loops(Half(), steps=8)
    assert sum(node.label == "gru_cell" for node in drawing.nodes) * max([1, *found.values()]) >= 8


def test_what_leads_to_no_output_is_named_and_left_out():
    class Checks(nn.Module):
        def forward(self, x):
            if (x == 0).any().item():
                raise ValueError("zeros")
            return 1 - x

    circuit = cl.trace(Checks(), torch.randn(3, 4), device="live")
    shown = main_part(circuit)
    assert [circuit.op(name).fn for name in sorted(shown.hidden)] == ["any", "eq", "item"]
    assert ["item" in note for note in shown.notes] == [True]
    assert any(mark.text == "1 −" for mark in draw(circuit).marks)
    assert any(mark.text == "any" for mark in draw(circuit, outputs="all").marks)
    assert not any(mark.text == "any" for mark in draw(circuit).marks)


def test_nested_outputs_are_further_ones():
    class Nested(nn.Module):
        def forward(self, x):
            return {"logits": x + 1, "inner": {"state": x * 2}}

    shown = main_part(cl.trace(Nested(), torch.randn(3, 4)))
    assert len(shown.circuit.outputs) == 1
    assert "inner.state" in shown.notes[0]


def test_groups_of_channels_are_one_line_where_nothing_tells_them_apart():
    inner = [nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, width, 3)) for width in (8, 5)]
    circuit = cl.trace(nn.Sequential(nn.Conv2d(3, 8, 3), *inner).eval(), torch.randn(2, 3, 9, 9))

    def lines(depth):
        first = next(node for node in drawing_of(circuit, depth).nodes if node.kind == "conv")
        return [track.wires for track in first.outs[0].tracks if circuit.wires[track.wires[0]].kind == "channel"]

    assert [len(wires) for wires in lines(1)] == [2]
    assert [len(wires) for wires in lines(9)] == [1, 1]
    assert any(mark.text == "=8" for mark in draw(circuit, depth=1).marks)


def test_wires_pass_straight_over_blocks():
    class Joins(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Bilinear(4, 6, 5)
            self.more = nn.Linear(5, 5)

        def inner(self, a, b):
            return self.more(self.mix(a, b).relu())

        def forward(self, a, b):
            return self.inner(a, b).softmax(-1)

    circuit = cl.trace(Joins(), torch.randn(3, 4), torch.randn(3, 6))
    drawing = drawing_of(circuit, depth=1)
    places = place(drawing)
    places.wrap(drawing, [(0, places.columns - 1)])
    met = [wire for node in drawing.nodes if node.kind in OVER for wire in crossings(node, places)]
    assert any(len(wire.ins) == 2 for wire in met)
    assert look(draw(circuit)).ok


def test_a_late_reader_has_a_late_copy():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x):
            y = self.layers[0](x) + self.layers[1](x)
            for layer in self.layers[2:]:
                y = layer(y.relu())
            return (y * x).relu() - x

    drawing = drawing_of(cl.trace(Late(), torch.randn(3, 4)))
    copies = [node for node in drawing.nodes if node.kind == "copy" and node.ins[0].tensor == "x"]
    assert len(copies) == 2
    assert copies[1].ins[0].source is copies[0]


class Branches(nn.Module):
    """Its input is read early, and again late, where another glyph stands between both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        before = self.b(self.a(x))
        weights = before.softmax(-1)
        mixed = x @ weights.transpose(1, 2) @ x
        return self.c(weights) + x + mixed @ weights.transpose(1, 2) @ mixed


def test_late_copies_bend_beside_other_glyphs():
    found = look(draw(cl.trace(Branches(), torch.randn(2, 8, 8))))
    assert found.ok, found
