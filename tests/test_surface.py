"""Losses around one model along random directions."""

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.batches import evaluated
from circuitlab.analysis.states import scratch
from circuitlab.analysis.surface import Surface, filter_normalised, surface
from tests.test_hidden_state import plain


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x, y = torch.randn(30, 2, 4, 4), torch.randint(0, 4, (30,))
    model(x)
    return model, [(x[:20], y[:20]), (x[20:], y[20:])]


def loss_of(model, batches):
    with evaluated(model) as copied:
        return sum(float(nn.functional.cross_entropy(copied(x), y)) * len(y) for x, y in batches) / 30


def test_filters_are_as_long_as_the_models_and_vectors_are_fixed(setting):
    model, _ = setting
    way = filter_normalised(model, torch.Generator().manual_seed(3))
    assert set(way) == {"0.weight", "4.weight"}
    for name, tensor in way.items():
        own = model.get_parameter(name).detach()
        assert tensor.flatten(1).norm(dim=1).tolist() == pytest.approx(own.flatten(1).norm(dim=1).tolist(), rel=1e-5)
        assert tensor.flatten() @ own.flatten() / own.norm() ** 2 < 0.9


def test_each_point_is_the_model_moved(setting):
    model, batches = setting
    found = surface(model, batches, "cross_entropy", (5, 3), 0.8, seed=3, test=batches[:1], progress=False)
    chance = torch.Generator().manual_seed(3)
    ways = [filter_normalised(model, chance) for _ in range(2)]
    assert found.values.shape == (2, 3, 5, 1)
    for row, column in ((0, 4), (2, 2), (1, 2)):
        moved = scratch(model)
        with torch.no_grad():
            for share, way in zip((found.x[column], found.y[row]), ways, strict=True):
                for name, tensor in way.items():
                    moved.get_parameter(name).add_(tensor, alpha=float(share))
        assert found.loss[row, column] == pytest.approx(loss_of(moved, batches), rel=1e-4)
    assert found.loss[1, 2] == found.centre[0, 0] == pytest.approx(loss_of(model, batches), rel=1e-12)
    other = surface(model, batches, "cross_entropy", (5, 3), 0.8, seed=4, progress=False)
    assert other.loss[1, 2] == found.loss[1, 2]
    assert other.loss[0, 0] != found.loss[0, 0]


def test_along_one_direction_and_along_given_ones(setting):
    model, batches = setting
    line = surface(model, batches, "cross_entropy", 7, progress=False)
    assert line.loss.shape == (7,)
    assert line.y is None
    assert line.loss[3] == line.centre[0, 0]
    assert line.to_frame().columns.tolist() == ["set", "x", "loss"]
    way = {"4.bias": torch.tensor([1.0, 0, 0, 0])}
    given = surface(model, batches, "cross_entropy", (3,), 2.0, directions=[way], progress=False)
    moved = scratch(model)
    with torch.no_grad():
        moved[4].bias[0] += 2
    assert given.loss[2] == pytest.approx(loss_of(moved, batches), rel=1e-5)
    assert "given directions" in repr(given)


def test_nothing_changes_and_no_global_chance_is_used(setting, tmp_path):
    model, batches = setting
    before = plain(model), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    found = surface(model, batches, "cross_entropy", (3, 3), resume=tmp_path / "s.safetensors", progress=False)
    with pytest.raises(ZeroDivisionError):
        surface(model, batches, lambda output, batch: 1 / 0, (3, 3), progress=False)

    def stops(so_far):
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 2 of 10"):
        part = surface(model, batches, "cross_entropy", (3, 3), seen=stops, progress=False)
    assert not part.complete
    again = surface(model, batches, "cross_entropy", (3, 3), resume=tmp_path / "s.safetensors", progress=False)
    assert (again.values == found.values).all()
    assert (plain(model), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before


def test_it_is_saved_and_drawn(setting, tmp_path):
    model, batches = setting
    found = surface(model, batches, "cross_entropy", (4, 3), progress=False)
    back = Surface.load(found.save(tmp_path / "surface.safetensors"))
    assert (back.loss == found.loss).all()
    contour = back.plot().data[0]
    assert np.array(contour.customdata) == pytest.approx(found.loss)
    solid = back.plot(solid=True, log=True).data[0]
    assert solid.type == "surface"
    assert np.array(solid.z) == pytest.approx(np.log10(found.loss))
    line = surface(model, batches, "cross_entropy", 5, test=batches, progress=False)
    assert [trace.name for trace in line.plot().data] == ["train", "test"]


def test_wrong_arguments_are_told(setting):
    model, batches = setting
    for options, told in (
        ({"grid": (3, 3, 3)}, "numbers of points along both axes"), ({"grid": 1}, "one number is a line"), ({"span": 0}, "span=0"),
        ({"directions": [{"0.weight": torch.zeros(1)}], "grid": 3}, r"directions\[0\]: '0.weight' has shape \[3, 2, 3, 3\] in the model, and \[1\]"),
        ({"directions": [{"none": torch.zeros(1)}], "grid": 3}, "'none' is no parameter"),
        ({"directions": [{}], "grid": (3, 3)}, "1 directions do not fit a grid of 2 axes"),
    ):
        with pytest.raises(cl.CircuitlabError, match=told):
            surface(model, batches, "cross_entropy", progress=False, **options)
    with pytest.raises(cl.CircuitlabError, match="no parameters with two dimensions"):
        surface(nn.BatchNorm1d(3), [torch.randn(4, 3)], lambda output, batch: output.mean(), progress=False)
