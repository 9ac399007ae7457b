"""The plane through three models: its geometry, what is evaluated in it, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.batches import evaluated
from circuitlab.analysis.plane import Plane
from circuitlab.analysis.states import merge
from tests.test_hidden_state import plain


def net(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    for _ in range(3):
        model(torch.randn(40, 6) + 1)
    return model


@pytest.fixture
def setting():
    models = [net(seed) for seed in range(3)]
    x, y = torch.randn(50, 6) + 1, torch.randint(0, 4, (50,))
    return models, list(zip(x.split(16), y.split(16), strict=True))


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def loss_of(model, batches):
    with evaluated(model) as copied:
        return sum(float(nn.functional.cross_entropy(copied(x), y)) * len(y) for x, y in batches) / 50


def test_coordinates_are_distances_of_the_parameters(setting):
    (a, b, c), batches = setting
    found = cl.plane(a, b, c, batches, "cross_entropy", grid=(3, 4), progress=False)
    assert found.loss.shape == (4, 3)
    for one in range(3):
        for two in range(one):
            apart = (flat([a, b, c][one]) - flat([a, b, c][two])).norm().item()
            assert np.linalg.norm(found.corners[one] - found.corners[two]) == pytest.approx(apart, rel=1e-9)
    assert found.corners[0].tolist() == [0, 0]
    assert found.corners[1, 1] == 0
    assert found.corners[2, 1] > 0
    for at, model in enumerate((a, b, c)):
        assert found.weights(*found.corners[at]) == pytest.approx(np.eye(3)[at], abs=1e-12)
        assert found.at_corners[0, at, 0] == pytest.approx(loss_of(model, batches), abs=1e-12)


def test_each_point_is_the_model_of_its_weights(setting):
    models, batches = setting
    found = cl.plane(*models, batches, "cross_entropy", grid=(4, 3), metrics="accuracy", test=batches[:1], progress=False)
    assert found.values.shape == (2, 3, 4, 2)
    for row, column in ((0, 0), (2, 1), (1, 3)):
        made = merge(models, found.weights(found.x[column], found.y[row]))
        assert found.loss[row, column] == pytest.approx(loss_of(made, batches), rel=1e-5)
    assert len(found.to_frame()) == 24
    assert set(found.to_frame().columns) == {"set", "x", "y", "loss", "accuracy"}
    where = found.to_frame().query("set == 'test'").iloc[5]
    assert where.loss == found.of(on="test")[1, 1]
    assert (where.x, where.y) == (found.x[1], found.y[1])
    with pytest.raises(cl.CircuitlabError, match="was not measured; measured are loss, accuracy on train, test"):
        found.of("recall")


def test_checkpoints_are_projected(setting):
    (a, b, c), batches = setting
    inside = merge([a, b, c], [0.2, 0.5, 0.3])
    aside = net(7)
    found = cl.plane(a, b, c, batches, "cross_entropy", (2, 2), [inside, aside.state_dict()], margin=0, progress=False)
    assert found.weights(*found.trajectory[0]) == pytest.approx([0.2, 0.5, 0.3], abs=1e-6)
    assert found.off[0] < 1e-5
    u, v = flat(b) - flat(a), flat(c) - flat(a)
    to = flat(aside) - flat(a)
    best = torch.linalg.lstsq(torch.stack([u, v], 1), to[:, None]).solution[:, 0]
    assert found.off[1] == pytest.approx((to - best[0] * u - best[1] * v).norm().item(), rel=1e-9)
    assert found.weights(*found.trajectory[1])[1:] == pytest.approx(best.tolist(), rel=1e-9)
    assert found.x[0] == min(*found.corners[:, 0], *found.trajectory[:, 0])


def test_it_stops_and_resumes_and_leaves_the_models(setting, tmp_path):
    models, batches = setting
    before = [plain(model) for model in models], torch.get_rng_state()
    whole = cl.plane(*models, batches, "cross_entropy", (5, 5), progress=False)
    stages = []

    def stops(so_far):
        stages.append(so_far)
        if len(stages) == 12:
            raise KeyboardInterrupt

    options = {"resume": tmp_path / "plane.safetensors", "progress": False}
    with pytest.warns(UserWarning, match="interrupted after 12 of 28"):
        part = cl.plane(*models, batches, "cross_entropy", (5, 5), seen=stops, **options)
    assert not part.complete
    assert np.isfinite(part.loss).sum() == 9
    assert np.isfinite(part.loss[::2, ::2]).all()  # the coarse grid comes first
    assert "16 points missing" in repr(part)
    again = cl.plane(*models, batches, "cross_entropy", (5, 5), **options)
    assert again.complete
    assert (again.loss == whole.loss).all()
    with pytest.raises(ZeroDivisionError):
        cl.plane(*models, batches, lambda output, batch: 1 / 0, (3, 3), progress=False)
    assert ([plain(model) for model in models], torch.get_rng_state().tolist()) == (before[0], before[1].tolist())


def test_it_is_saved_and_drawn(setting, tmp_path):
    models, batches = setting
    found = cl.plane(*models, batches, "cross_entropy", (4, 4), [net(5)], labels=("one", "two", "three"), progress=False)
    back = Plane.load(found.save(tmp_path / "plane.safetensors"))
    assert (back.values == found.values).all()
    assert back.labels == ("one", "two", "three")
    assert "4 x 4 points, 1 checkpoints, train loss: one" in repr(back)
    figure = back.plot()
    contour = next(trace for trace in figure.data if trace.type == "contour")
    assert np.array(contour.customdata) == pytest.approx(found.loss)
    texts = [note.text for note in figure.layout.annotations]
    assert texts[1] == f"two  {found.at_corners[0, 1, 0]:.3g}"
    assert figure.layout.yaxis.scaleanchor == "x"


@pytest.mark.parametrize(
    ("third", "told"),
    [
        (lambda a, b: merge([a, b], [0.4, 0.6]), "on one line"),
        (lambda a, b: merge([a, b], [-3.0, 4.0]), "on one line"),
        (lambda a, b: a, "a and c have the same parameters"),
        (lambda a, b: b, "b and c have the same parameters"),
        (lambda a, b: nn.Linear(2, 2), "different parameters"),
    ],
)
def test_what_is_no_plane_is_refused(setting, third, told):
    (a, b, _), batches = setting
    with pytest.raises(cl.CircuitlabError, match=told):
        cl.plane(a, b, third(a, b), batches, "cross_entropy", progress=False)


def test_wrong_arguments_are_told(setting):
    models, batches = setting
    for options, told in (
        ({"grid": (1, 5)}, "numbers of points along both axes"),
        ({"grid": "large"}, "numbers of points along both axes"),
        ({"margin": -1}, "margin=-1"),
        ({"labels": ("a",)}, "three names"),
        ({"trajectory": [3]}, r"trajectory\[0\] must be a model or a state dict, and is a int"),
        ({"trajectory": [{"0.weight": torch.zeros(2, 2)}]}, r"parameter '0.weight' has shape \[8, 6\], and the dict has \[2, 2\]"),
        ({"trajectory": [models[0].state_dict(), {}]}, r"trajectory\[1\].*does not have it"),
    ):
        with pytest.raises(cl.CircuitlabError, match=told):
            cl.plane(*models, batches, "cross_entropy", **options)
    with pytest.raises(cl.CircuitlabError, match="empty"):
        cl.plane(*models, [], "cross_entropy")
    with torch.no_grad():
        models[1][0].weight[0, 0] = float("nan")
    with pytest.raises(cl.CircuitlabError, match="not finite"):
        cl.plane(*models, batches, "cross_entropy")
