"""The live diagram from the kernel's side."""

import pytest
import torch
import traitlets

import circuitlab as cl
from circuitlab import display
from circuitlab.diagram.layout import draw
from circuitlab.gallery.gpt import GPT


@pytest.fixture
def view():
    return cl.trace(GPT(layers=2), torch.zeros(2, 8, dtype=torch.long)).view(depth=2)


def closed(view):
    return [name for name, state in view.scene["foldable"].items() if state == "closed"]


def test_unfold_then_fold_is_the_identity(view):
    before = view.scene
    assert closed(view) == ["blocks.0.attention", "blocks.0.mlp"]
    view._told(view, {"toggle": "blocks.0.mlp"}, [])
    assert view.opened == ("blocks.0.mlp",)
    assert closed(view) == ["blocks.0.attention"]
    view.toggle("blocks.0.mlp")
    assert view.scene == before



def test_a_toggle_is_one_new_drawing(view, monkeypatch):
    drawn = []
    monkeypatch.setattr("circuitlab.widgets.diagram.draw", lambda *args, **options: drawn.append(options) or draw(*args, **options))
    for _ in range(3):
        view.toggle("blocks.0.mlp")
    assert len(drawn) == 3

def test_folding_an_outer_block_forgets_what_was_unfolded_within(view):
    view.toggle("blocks.0.mlp")
    view.toggle("blocks.0")
    assert closed(view) == ["blocks.0"]
    view.toggle("blocks.0")
    assert "blocks.0" not in closed(view)


def test_depth_says_how_deep_everything_is(view):
    view.toggle("blocks.0.mlp")
    view.depth = 1
    assert view.opened == ()
    assert closed(view) == ["blocks.0"]
    assert view.deepest >= 3


def test_selection_is_checked(view):
    view.selection = "d"
    view.selection = ""
    view.selection = "blocks.1.mlp"
    with pytest.raises(traitlets.TraitError, match="to select"):
        view.selection = "nothing at all"


def test_search_finds_what_is_folded_away_by_the_block_that_hides_it(view):
    view.search = "blocks.0.mlp.up"
    assert "blocks.0.mlp" in view.found
    view.search = "D"
    assert "d" in view.found
    view.search = ""
    assert view.found == []


def test_search_finds_parameters(view):
    view.search = "mlp.up.bias"
    assert "blocks.0.mlp.up.linear" in view.found
    assert "blocks.0.mlp" in view.found
    assert "" not in view.found


def test_a_click_on_a_drawing_that_is_gone_does_nothing(view):
    view.depth = 1
    before = view.scene
    view._told(view, {"toggle": "blocks.0.mlp"}, [])
    assert view.scene == before


def test_output_keeps_the_drawing_for_readers_without_the_kernel(view):
    view.toggle("blocks.0.mlp")
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    document = data[display.VIEW_MIME]
    assert document["scenes"][document["root"]] == view.scene
    assert "blocks.0.attention" in document["scenes"]
    assert "GELU" in data["image/svg+xml"]
    assert data["text/plain"].startswith("GPT")


def test_other_choices_redraw(view):
    wires = {mark.get("wire") for mark in view.scene["marks"]}
    assert "batch" in wires
    view.batch = False
    assert "batch" not in {mark.get("wire") for mark in view.scene["marks"]}
    view.overlay = {"d": 1.0}
    assert any(mark.get("stroke") == "accent" for mark in view.scene["marks"])


def test_bad_arguments():
    circuit = cl.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(cl.CircuitlabError, match="negative"):
        circuit.view(depth=-1)
    with pytest.raises(TypeError):
        circuit.view(dept=1)
    with pytest.raises(traitlets.TraitError):
        circuit.view(theme="neon")
    with pytest.raises(cl.CircuitlabError, match="no block"):
        circuit.view(open=["nowhere"])
