"""Paths between two models: the definitions, on numbers that are known, and models that are found again."""

import copy
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import circuitlab as cl
from circuitlab import plots
from circuitlab.analysis import correction
from circuitlab.analysis.landscape import LayerPaths, Path, _alphas, _coarse_first, layerwise, merge
from tests.test_hidden_state import Stateful, plain
from tests.test_sweep import net


@pytest.fixture
def setting():
    a, b = net(0), net(1)
    x, y = torch.randn(60, 6) + 1, torch.randint(0, 4, (60,))
    return a, b, list(zip(x.split(20), y.split(20), strict=True))


def loss_of(model, batches):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(x), y)) * len(y) for x, y in batches) / sum(len(y) for _, y in batches)


def test_ends_are_the_models_and_points_those_asked_for(setting):
    a, b, batches = setting
    before = plain(a), plain(b), torch.get_rng_state()
    path = cl.interpolate(a, b, batches, "cross_entropy", metrics="accuracy", test=batches[:1])
    assert path.alphas.tolist() == np.linspace(0, 1, 25).tolist()
    assert path.loss[0] == loss_of(a, batches)
    assert path.loss[-1] == loss_of(b, batches)
    assert path.test_loss[-1] == loss_of(b, batches[:1])
    assert (plain(a), plain(b)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    for alpha, model in ((0, a), (1, b)):
        state = path.at(alpha).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert path.at(0.25).training
    assert path.loss[6] == loss_of(path.at(0.25), batches)
    some = cl.interpolate(a, b, batches, "cross_entropy", [1, 0.3, 0, -0.5, 1.5])
    assert some.alphas.tolist() == [-0.5, 0, 0.3, 1, 1.5]
    assert some.loss[2] == loss_of(path.at(0.3), batches)
    assert some.loss[4] == loss_of(path.at(1.5), batches)
    assert list(path.metrics) == ["accuracy"]
    assert path.test_metrics["accuracy"].shape == (25,)


def made(alphas, losses, accuracy=None):
    names = ("loss", "accuracy") if accuracy is not None else ("loss",)
    values = np.array([losses] if accuracy is None else [losses, accuracy], dtype=np.float64).T[None]
    return Path(np.array(alphas, dtype=np.float64), ("train",), names, values)


def test_barriers_are_what_they_are_defined_as():
    path = made([0, 0.25, 0.5, 0.75, 1], [1, 4, 3.5, 3, 3])
    assert path.barrier("chord") == 4 - 1.5
    assert path.barrier() == path.barrier("chord")
    assert path.barrier("mean-end") == 4 - 2
    assert path.barrier("max-end") == 4 - 3
    assert path.barrier("mid") == 3.5 - 2


def test_barriers_below_zero_are_not_clipped():
    valley = made([0, 0.5, 1], [2, 0.5, 1])
    assert valley.barrier("chord") == -1
    assert valley.barrier("max-end") == -1.5
    assert valley.barrier("mid") == -1
    assert valley.barrier("mean-end") == 0.5  # the larger end is a maximum, by its definition
    ends = made([0, 1], [1, 2])
    assert (ends.barrier("chord"), ends.barrier("max-end"), ends.barrier("mean-end")) == (0, 0, 0.5)


def test_barriers_that_are_not_known():
    nan = made([0, 0.25, 0.5, 1], [1, float("nan"), 3, 1])
    assert np.isnan([nan.barrier(kind) for kind in ("chord", "mean-end", "max-end")]).all()
    assert [nan.barrier(kind, skipna=True) for kind in ("chord", "mean-end", "max-end", "mid")] == [2] * 4
    assert nan.barrier("mid") == 2
    assert made([0, 0.5, 1], [1, float("inf"), 1]).barrier() == float("inf")
    assert np.isnan(made([0, 0.5, 1], [float("nan"), 2, 1]).barrier("max-end"))
    even = made([0, 1 / 3, 2 / 3, 1], [1, 2, 2, 1])
    with pytest.raises(cl.CircuitlabError, match=r"at α=0.5, which was not evaluated: an odd number"):
        even.barrier("mid")
    with pytest.raises(cl.CircuitlabError, match="needs both ends"):
        made([0, 0.5], [1, 2]).barrier()
    with pytest.raises(cl.CircuitlabError, match="'height' is not among"):
        even.barrier("height")
    with pytest.raises(cl.CircuitlabError, match="give test= for a second set"):
        even.barrier(on="test")
    outside = made([-1, 0, 0.5, 1, 2], [9, 1, 2, 1, 9])
    assert (outside.barrier("chord"), outside.barrier("mean-end")) == (1, 1)
    assert made([0, 0.5, 1], [1, 2, 1], [0.9, 0.5, 0.7]).barrier("chord", of="accuracy") == pytest.approx(0.3)


def test_a_line_whose_losses_are_known():
    """One weight and a squared loss: a parabola."""
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        a.weight.fill_(-1)
        b.weight.fill_(3)
    x = torch.tensor([[1.0], [2.0]])
    path = cl.interpolate(a, b, [(x, x * 0)], "mse", points=5)
    assert path.loss == pytest.approx((-1 + 4 * path.alphas) ** 2 * 2.5)
    assert path.barrier("chord") == pytest.approx(-40 * 0.25 * 0.75)
    assert path.barrier("mid") == pytest.approx(-10)


def test_a_point_that_is_no_number_stays_alone(setting):
    a, b, batches = setting

    class Fragile(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, x):
            return torch.log((self.value - 0.5).abs()) * x[:, :1].abs()

    path = cl.interpolate(Fragile(0.0), Fragile(1.0), [torch.ones(4, 3)], lambda output, batch: output.mean() - output.mean() * 1.0, points=5)
    assert np.isnan(path.loss).tolist() == [False, False, True, False, False]
    assert np.isnan(path.barrier())
    assert path.plot().data


def test_layers_move_alone(setting):
    a, b, batches = setting
    path = cl.interpolate(a, b, batches, "cross_entropy", points=3, layers={"4", "0.bias"})
    hybrid = copy.deepcopy(a)
    hybrid[4].load_state_dict(b[4].state_dict())
    with torch.no_grad():
        hybrid[0].bias.copy_(b[0].bias)
    assert path.loss[0] == loss_of(a, batches)
    assert path.loss[2] == loss_of(hybrid, batches)
    assert path.layers == ("0.bias", "4")
    assert torch.equal(path.at(0.5)[0].weight, a[0].weight)
    whole = cl.interpolate(a, b, batches, "cross_entropy", points=3, layers=[""])
    assert whole.loss[2] == loss_of(b, batches)
    each = layerwise(a, b, batches, "cross_entropy", points=3, progress=False)
    assert each.layers == ("0", "1", "4")
    alone = cl.interpolate(a, b, batches, "cross_entropy", points=3, layers="4")
    assert (each.paths[2].loss == alone.loss).all()
    assert each.rise()[2] == alone.loss[2] - alone.loss[0]
    assert each.barrier("mid")[2] == alone.barrier("mid")
    assert list(each.to_frame()) == ["layer", "rise", "chord", "mean-end", "max-end", "mid"]


def test_refinement_adds_points_where_the_loss_bends():
    class Step(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, x):
            return torch.sigmoid((self.value - 0.3) * 100) * x

    data = [(torch.ones(4, 1), torch.zeros(4, 1))]
    path = cl.interpolate(Step(0.0), Step(1.0), data, "mse", points=9, refine=12)
    new = np.setdiff1d(path.alphas, np.linspace(0, 1, 9))
    assert len(path.alphas) == 21
    assert (np.abs(new - 0.3) < 0.13).all()
    assert set(np.linspace(0, 1, 9)) <= set(path.alphas)
    straight = cl.interpolate(Step(0.0), Step(0.0), data, "mse", points=5, refine=10)
    assert len(straight.alphas) == 5


def test_one_file_for_a_refined_path_and_any_executor(setting, tmp_path):
    a, b, batches = setting
    whole = cl.interpolate(a, b, batches, "cross_entropy", points=7, refine=5)
    def stop(path):
        assert not path.complete
        if len(path.alphas) == 9:
            raise KeyboardInterrupt

    file = tmp_path / "path.safetensors"
    with pytest.warns(UserWarning, match="interrupted after 9 of"):
        part = cl.interpolate(a, b, batches, "cross_entropy", points=7, refine=5, resume=file, seen=stop)
    assert not part.complete
    assert len(part.alphas) == 9
    assert {0.0, 0.5, 1.0} <= set(part.alphas)  # coarse points come first
    assert part.plot().data
    resumed = cl.interpolate(a, b, batches, "cross_entropy", points=7, refine=5, resume=file)
    assert resumed.complete
    assert resumed.alphas.tolist() == whole.alphas.tolist()
    assert resumed.values.tolist() == whole.values.tolist()
    with ThreadPoolExecutor(2) as pool:
        assert cl.interpolate(a, b, batches, "cross_entropy", points=7, refine=5, executor=pool).values.tolist() == whole.values.tolist()


def test_a_stopped_path_may_lack_its_ends():
    assert "without both ends" in repr(made([0], [1.0]))
    assert _coarse_first(7).tolist() == [0, 6, 3, 1, 4, 2, 5]
    assert sorted(_coarse_first(26).tolist()) == list(range(26))
    for points in (1, [], [0, float("nan")], "many", None):
        with pytest.raises(cl.CircuitlabError, match="points="):
            _alphas(points)


def test_what_is_no_number_is_told(setting):
    a, b, batches = setting
    with pytest.raises(cl.CircuitlabError, match=r"refine=-1"):
        cl.interpolate(a, b, batches, "cross_entropy", points=3, refine=-1)
    for loss in (lambda output, batch: {"loss": output.mean()}, lambda output, batch: (output, output)):
        with pytest.raises(cl.CircuitlabError, match=r"the loss gives a (dict|tuple); give the mean over the batch"):
            cl.interpolate(a, b, batches, loss, points=3)


def test_results_on_disk_in_frames_and_in_figures(setting, tmp_path):
    a, b, batches = setting
    path = cl.interpolate(a, b, batches, "cross_entropy", points=5, metrics="accuracy", test=batches[:1], layers={"4"})
    again = Path.load(path.save(tmp_path / "path.safetensors"))
    assert again.values.tolist() == path.values.tolist()
    assert (again.alphas.tolist(), again.layers, again.sets, again.names) == (path.alphas.tolist(), ("4",), ("train", "test"), ("loss", "accuracy"))
    with pytest.raises(cl.CircuitlabError, match=r"has no models; give them: landscape.merge\(\[a, b\], \[1 - alpha, alpha\], layers=\{'4'\}\)"):
        again.at(0.5)
    frame = path.to_frame()
    assert list(frame) == ["alpha", "loss", "accuracy", "test_loss", "test_accuracy"]
    assert frame["test_loss"].tolist() == path.test_loss.tolist()
    each = layerwise(a, b, batches, "cross_entropy", points=3, progress=False)
    assert LayerPaths.load(each.save(tmp_path / "layers.safetensors")).rise().tolist() == each.rise().tolist()
    for figure in (path.plot(), again.plot(kind="mid", of="accuracy"), plots.path({"one": path, "two": again}), each.plot(), each.plot(limit=2),
                   made([0, 0.5, 1], [1, 2, float("nan")]).plot()):
        assert json.loads(figure.to_json())["data"]
        assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert path.plot().layout.annotations[0].text == f"chord barrier {path.barrier('chord', on='test'):.3g}"
    assert path.plot().data[0].y.tolist() == path.loss.tolist()
    assert each.plot(limit=2).data[0].y == tuple(each.layers[at] for at in sorted(np.argsort(-np.maximum(each.rise(), each.barrier()))[:2]))


# corrections ------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Convolutions, a grouped one and a transposed one, and a residual sum, written in functions."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 12) / 3), nn.Parameter(torch.randn(12))  # (in, out)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Linear(12, 3)

    def forward(self, x):
        h = torch.relu(self.one(x))
        h = torch.relu(h + self.two(h))
        h = torch.relu(self.up(h)).mean((2, 3))
        h = torch.relu(torch.addmm(self.bias, h, self.weight))
        return self.out(h)


@pytest.fixture
def convs():
    a, b = Conv(0), Conv(1)
    x = torch.randn(40, 1, 4, 4)
    y = torch.randint(0, 3, (40,))
    return a, b, list(zip(x.split(20), y.split(20), strict=True))


def test_batch_norm_is_reset_on_the_training_data(setting):
    a, b, batches = setting
    plain_path = cl.interpolate(a, b, batches, "cross_entropy", points=3)
    path = cl.interpolate(a, b, batches, "cross_entropy", points=3, correct="batchnorm")
    assert path.loss[[0, 2]].tolist() == plain_path.loss[[0, 2]].tolist()
    middle = path.at(0.5)
    inputs = merge([a, b])[0]
    with torch.no_grad():
        seen = [inputs(x) for x, _ in batches]
    assert torch.allclose(middle[1].running_mean, torch.stack([h.mean(0) for h in seen]).mean(0), atol=1e-6)
    assert torch.allclose(middle[1].running_var, torch.stack([h.var(0) for h in seen]).mean(0), atol=1e-5)
    assert path.loss[1] == loss_of(middle, batches)
    assert path.loss[1] != plain_path.loss[1]
    assert middle[1].momentum == a[1].momentum
    assert middle.training
    assert path.correct == "batchnorm"
    loader = DataLoader(TensorDataset(*(torch.cat(t) for t in zip(*batches, strict=True))), 59)  # one example in the last batch
    assert np.isfinite(cl.interpolate(a, b, loader, "cross_entropy", points=3, correct="batchnorm").loss).all()
    with pytest.raises(cl.CircuitlabError, match="has no BatchNorm.*try correct='repair'"):
        cl.interpolate(nn.Linear(6, 4), nn.Linear(6, 4), batches, "cross_entropy", correct="batchnorm")
    with pytest.raises(cl.CircuitlabError, match="correct='rescale' is not known"):
        cl.interpolate(a, b, batches, "cross_entropy", correct="rescale")


def moments(model, batches):
    """Mean and standard deviation of what each product gives, before the nonlinearity."""
    found, seen = {}, {}
    handles = [module.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, []).append(o)) for name, module in model.named_modules()
               if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    for name, parts in seen.items():
        rows = torch.cat(parts).movedim(1, -1).flatten(0, -2)
        found[name] = rows.mean(0), rows.std(0, correction=0)
    return found


def test_repair_sets_each_channel_between_the_models(convs):
    a, b, batches = convs
    x = torch.cat([x for x, _ in batches])
    whole = [(x, torch.cat([y for _, y in batches]))]
    before = plain(a), plain(b)
    path = cl.interpolate(a, b, whole, "cross_entropy", points=3, correct="repair")
    assert (plain(a), plain(b)) == before
    assert path.loss[[0, 2]].tolist() == [loss_of(a, whole), loss_of(b, whole)]
    middle = path.at(0.5)
    assert path.loss[1] == loss_of(middle, whole)
    ends, got = (moments(a, whole), moments(b, whole)), moments(middle, whole)
    for name in ("one", "two", "up"):  # statistics of one batch of everything are exact
        for which in (0, 1):
            wanted = (ends[0][name][which] + ends[1][name][which]) / 2
            assert torch.allclose(got[name][which], wanted, rtol=1e-3, atol=1e-4), name
    assert torch.equal(middle.out.weight, torch.lerp(a.out.weight, b.out.weight, 0.5))  # the last layer is left alone
    layers = correction.layers_of(cl.trace(a, x))
    assert [(one.weight, one.rows, one.channels) for one in layers] == [("one.weight", 0, -3), ("two.weight", 0, -3), ("up.weight", 1, -3), ("weight", 1, -1)]
    many = cl.interpolate(a, b, batches, "cross_entropy", points=3, correct="repair")
    assert many.loss[1] == pytest.approx(path.loss[1], rel=0.1)


def test_repair_of_equal_models_changes_nothing(convs):
    a, _, batches = convs
    path = cl.interpolate(a, copy.deepcopy(a), batches, "cross_entropy", points=3, correct="repair")
    assert path.loss == pytest.approx(loss_of(a, batches), rel=1e-2)
    assert cl.interpolate(a, copy.deepcopy(a), [tuple(map(torch.cat, zip(*batches, strict=True)))], "cross_entropy", points=3,
                          correct="repair").loss == pytest.approx(loss_of(a, batches), rel=1e-5)


def test_repair_of_attention_and_of_constant_channels():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)) for _ in range(2))
    x, y = torch.randn(30, 5, 8), torch.randint(0, 3, (30,))
    path = cl.interpolate(a, b, [(x, y)], "cross_entropy", points=3, correct="repair")
    assert path.loss[1] == pytest.approx(loss_of(path.at(0.5), [(x, y)]))
    with torch.no_grad():
        for model in (a, b):
            model[0].linear1.weight[3], model[0].linear1.bias[3] = 0, -1
    dead = cl.interpolate(a, b, [(x, y)], "cross_entropy", points=3, correct="repair")
    assert np.isfinite(dead.loss).all()
    assert dead.at(0.5)[0].linear1.bias[3] == -1


def test_repair_says_where_it_cannot(setting, convs):
    a, b, batches = setting

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.out(torch.relu(self.inner(torch.relu(self.inner(x)))))

    x = [(x, y) for x, y in batches]
    for models, match in (
        ((a, b), "without BatchNorm, and Sequential has it: give correct='batchnorm'"),
        ([nn.Linear(6, 4) for _ in range(2)], "no linear map or convolution before its last"),
        ([Twice(), Twice()], "'inner.weight' is used 2 times"),
    ):
        with pytest.raises(cl.CircuitlabError, match=match):
            cl.interpolate(*models, x, "cross_entropy", correct="repair")


@pytest.mark.parametrize("bias", [True, False])
def test_corrections_raise_what_collapses(bias):
    """Deep narrow nets of different seeds: the middle has far less variance, and gets it back."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(32, 32, bias), nn.ReLU())), nn.Linear(32, 4)) for _ in range(2))
    x = torch.randn(200, 32)
    batches = [(x, torch.randint(0, 4, (200,)))]
    spread = {}
    for correct in (None, "repair"):
        middle = cl.interpolate(a, b, batches, "cross_entropy", points=3, correct=correct).at(0.5)
        spread[correct] = float(middle[6](middle[:6](x)).detach().std(0).mean())
    ends = [float(m[6](m[:6](x)).detach().std(0).mean()) for m in (a, b)]
    assert spread[None] < 0.6 * min(ends)
    assert spread["repair"] == pytest.approx(sum(ends) / 2, rel=0.01)


@pytest.mark.parametrize("correct", ["batchnorm", "repair"])
def test_corrected_paths_do_not_depend_on_where_they_are_evaluated(setting, convs, correct, tmp_path):
    a, b, batches = setting if correct == "batchnorm" else convs
    here = cl.interpolate(a, b, batches, "cross_entropy", points=4, correct=correct, test=batches[:1])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = cl.interpolate(a, b, batches, "cross_entropy", points=4, correct=correct, test=batches[:1], executor=pool)
    assert there.values.tolist() == here.values.tolist()
    file = tmp_path / "path.safetensors"
    cl.interpolate(a, b, batches, "cross_entropy", points=4, correct=correct, test=batches[:1], resume=file)
    with pytest.raises(cl.CircuitlabError, match="other correction"):
        cl.interpolate(a, b, batches, "cross_entropy", points=4, test=batches[:1], resume=file)


def test_far_ends_of_layers_are_corrected(setting):
    a, b, batches = setting
    part = cl.interpolate(a, b, batches, "cross_entropy", points=3, layers={"0"}, correct="batchnorm")
    assert part.loss[0] == loss_of(a, batches)
    assert part.loss[2] == loss_of(part.at(1), batches)
    assert part.loss[2] != cl.interpolate(a, b, batches, "cross_entropy", points=3, layers={"0"}).loss[2]


def test_nothing_is_left_behind_by_a_model_with_state():
    a = Stateful()
    b = Stateful()
    before = plain(a), plain(b)
    x = [torch.randn(6, 4)]
    for options in ({}, {"correct": "batchnorm"}):
        path = cl.interpolate(a, b, x, lambda output, batch: output.mean(), points=3, **options)
        assert np.isfinite(path.loss).all()
        path.at(0.5)
    assert (plain(a), plain(b)) == before
