"""Figures of results, and the lab that links them with the diagram."""

import json

import numpy as np
import pytest
import torch
import traitlets
from torch import nn

import circuitlab as cl
from circuitlab import plots
from circuitlab.analysis.activity import timeline, top_positions
from circuitlab.analysis.flows import match_modules
from circuitlab.analysis.graph import places
from circuitlab.analysis.triples import triples
from circuitlab.plots import modules
from circuitlab.widgets.lab import Lab
from tests.test_neurons import Tokens


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model, ids = Tokens(), torch.randint(0, 20, (8, 6))
    circuit = cl.trace(model, ids)
    stats = cl.observe(model, [ids], labels=ids % 3, progress=False)
    parts = {wire: cl.partition(found, k=4, controls=3, progress=False) for wire, found in stats.items()}
    return model, ids, circuit, stats, parts


def test_a_large_matrix_is_averaged_on_the_way():
    matrix = np.arange(2503 * 2503, dtype=np.float64).reshape(2503, 2503)
    shown, side = plots.aggregated(matrix, 1000)
    assert side == 3
    assert shown.shape == (835, 835)
    assert shown[3, 7] == pytest.approx(matrix[9:12, 21:24].mean())
    assert shown[-1, -1] == pytest.approx(matrix[2502:, 2502:].mean())


def test_a_sorted_large_matrix_is_what_sorting_it_whole_gives():
    rng = np.random.default_rng(0)
    matrix, order = rng.random((120, 120)), rng.permutation(120)
    assert np.allclose(modules._gathered(matrix, order, 40), plots.aggregated(matrix[np.ix_(order, order)], 40)[0])


def test_a_hierarchy_is_sorted_by_its_leaves_and_cut_by_a_slider():
    rng = np.random.default_rng(0)
    block = np.kron(np.kron(np.eye(2), np.ones((2, 2))) * 0.2 + np.eye(4) * 0.5, np.ones((30, 30)))
    noise = rng.random((120, 120))
    graph = ((noise + noise.T) / 2 < block).astype(float)
    np.fill_diagonal(graph, 0)
    part = cl.partition(graph, method="hierarchy", progress=False)
    figure = part.plot(affinity=graph)
    json.loads(figure.to_json())
    steps = figure.layout.sliders[0].steps
    assert [step.label for step in steps][-1] == str(part.k)
    for step in steps:
        squares = [shape for shape in step.args[0]["shapes"] if shape["type"] == "rect"]
        assert len(squares) == int(step.label)  # groups are runs: the order of the leaves keeps them together
        assert sum(shape["x1"] - shape["x0"] for shape in squares) == 120
    assert any(shape["type"] == "line" for shape in steps[0].args[0]["shapes"])


def test_every_result_has_a_figure(setting):
    model, ids, _, stats, parts = setting
    (wire,) = parts
    curve = cl.expert_curve(model, parts, [(ids, ids)], "cross_entropy", shares=(0.5,), progress=False)
    figures = [stats[wire].plot(), parts[wire].plot(), parts[wire].plot(affinity=stats[wire].cofiring), curve.plot(),
               timeline(model, parts, ids).plot(), stats[wire].functional().plot(), match_modules(parts[wire], parts[wire]).plot(),
               triples(torch.rand(200, 6) < 0.4).plot(), plots.places(places(stats[wire].cofiring, parts[wire], controls=20))]
    for figure in figures:
        assert json.loads(figure.to_json())["data"]
        assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert [trace.name for trace in figures[3].data][:1] == ["oracle"]
    assert figures[3].data[0].y[-1] == curve.dense


def test_a_place_in_a_figure_is_in_a_module(setting):
    _, _, _, stats, parts = setting
    ((wire, part),) = parts.items()
    figure = part.plot(affinity=stats[wire].cofiring)
    labels = [plots.module_at(figure, n + 0.5) for n in range(len(part.labels))]
    assert sorted(labels) == sorted(part.labels.tolist())
    assert [plots.module_at(figure, x) for x in (-1, len(labels) + 1)] == [-1, -1]
    assert plots.module_at(part.plot(), 1.2) == 1


def test_the_lab_shows_what_there_is_to_show(setting):
    model, ids, *_ = setting
    alone = cl.explore(model, ids, progress=False)
    assert [type(child).__name__ for child in alone.children] == ["DiagramWidget"]
    whole = cl.explore(model, ids, batches=[(ids, ids)], loss="cross_entropy", method="keys", progress=False)
    assert whole.children == (whole.diagram, whole.panel, whole.landscape)
    assert len(whole.landscape.data)


def test_the_lab_follows_the_diagram_and_back(setting):
    model, ids, circuit, stats, parts = setting
    (wire,) = parts
    top = top_positions(model, parts, [ids], n=3, text=lambda batch, example, position: f"<«{example}»", progress=False)
    lab = Lab(circuit, parts, stats, top)
    assert lab.wire == wire
    assert len(lab.figure.data) >= 2
    assert lab.diagram.overlay == {}
    lab.module = 2
    block = parts[wire].ffn
    assert set(lab.diagram.overlay) == {wire, block.keys[0].op, block.values[0].op}
    assert "4 neurons" in lab.text.value
    assert "&lt;<mark>" in lab.text.value
    assert lab.number.value == 2
    outlined = [shape for shape in lab.figure.layout.shapes if shape.name == "module"]
    assert len(outlined) == 1
    assert plots.module_at(lab.figure, (outlined[0].y0 + outlined[0].y1) / 2) == 2
    lab.number.value = -1
    assert lab.module == -1
    assert not [shape for shape in lab.figure.layout.shapes if shape.name == "module"]
    assert lab.diagram.overlay == {}
    lab.diagram.selection = block.keys[0].op
    assert lab.wire == wire
    with pytest.raises(traitlets.TraitError, match="module 9 is not one of the 4"):
        lab.module = 9
    with pytest.raises(traitlets.TraitError, match="there is no partition of a wire"):
        lab.wire = "nothing"


def test_the_lab_knows_what_a_selection_is_about():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6)) for _ in range(2)))
    x = torch.randn(40, 6)
    lab = cl.explore(model, x, batches=[x], progress=False)
    assert len(lab.partitions) == 2
    first, second = lab.partitions
    lab.diagram.selection = "1"
    assert lab.wire == second
    lab.diagram.selection = "0.0"
    assert lab.wire == first
    lab.diagram.selection = ""
    assert lab.wire == first
    assert len(cl.explore(model, x).children) == 1
