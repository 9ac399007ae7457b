"""Networks joined by a linear map: exact where they should be, on images and tokens, and a matrix of all pairs of layers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import circuitlab as cl
from circuitlab.analysis.places import find, layers
from circuitlab.analysis.stitch import LeastSquares, StitchReport
from circuitlab.analysis.stitching import StitchingMatrix, stitching_matrix
from circuitlab.errors import InputError
from circuitlab.gallery.gpt import GPT
from tests.test_cut import digits, made
from tests.test_symmetry import PreNorm, Residual


def mlp(hidden=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def resnet(wide=12, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8, 8, 1), Residual(8, wide, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 5),
    ).double().eval()


def gpt(width=12, seed=0):
    torch.manual_seed(seed)
    return GPT(vocabulary=11, length=8, width=width, layers=2, heads=3).double().eval()


def batches_for(model, count=40):
    torch.manual_seed(7)
    if isinstance(model, GPT):
        return [(torch.randint(0, 11, (count, 6)), torch.randint(0, 11, (count, 6))), (torch.randint(0, 11, (3, 6)), torch.randint(0, 11, (3, 6)))]
    if isinstance(model[0], nn.Conv2d):
        return [(torch.randn(count, 3, 8, 8).double(), torch.randint(0, 5, (count,))), (torch.randn(5, 3, 8, 8).double(), torch.randint(0, 5, (5,)))]
    return [(torch.randn(count, 4).double(), torch.randint(0, 3, (count,))), (torch.randn(3, 4).double(), torch.randint(0, 3, (3,)))]


@pytest.mark.parametrize("build", [mlp, resnet, gpt])
def test_with_itself_at_the_same_place_it_is_the_model(build):
    model = build()
    batches = batches_for(model)
    x = batches[0][0]
    names = [place.name for place in layers(cl.trace(model, x))]
    assert len(names) > 2
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in names:
        stitched = cl.stitch(model, model, name, name, batches, loss="cross_entropy", progress=False)
        report = stitched.report
        torch.testing.assert_close(stitched(x), model(x), rtol=1e-12, atol=1e-12)
        assert report.error < 1e-20 and abs(report.loss - report.loss_a) < 1e-12 and report.loss_a == report.loss_b
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("build", [mlp, resnet])
def test_a_permuted_copy_is_joined_at_every_layer(build):
    """Other numbers, the same function: a permutation of features is a linear map."""
    model = build()
    batches = batches_for(model)
    x = batches[0][0]
    circuit = cl.trace(model, x)
    other = circuit.symmetry().apply(model, circuit.symmetry().random(3))
    for place in layers(circuit):
        stitched = cl.stitch(model, other, place.name, place.name, batches, progress=False)
        torch.testing.assert_close(stitched(x), model(x), rtol=1e-10, atol=1e-10)


def test_widths_may_differ_and_so_may_layers():
    a, b = gpt(12, 1), gpt(18, 2)
    batches = batches_for(a)
    x = batches[0][0]
    stitched = cl.stitch(a, b, "blocks.0", "blocks.1", batches, loss="cross_entropy", progress=False)
    assert stitched.report.sizes == (12, 18) and stitched(x).shape == b(x).shape and stitched.stitch.weight.shape == (18, 12)
    # by hand: the front of a, least squares, the back of b
    @torch.no_grad()
    def features(model, number, inputs):
        h = model.tokens(inputs) + model.positions(torch.arange(inputs.shape[1]))
        for block in model.blocks[: number + 1]:
            h = block(h)
        return h
    xs, ys = (torch.cat([features(m, n, batch[0]).flatten(0, 1) for batch in batches]) for m, n in ((a, 0), (b, 1)))
    ones = torch.cat([xs, xs.new_ones(len(xs), 1)], 1)
    weight = torch.linalg.lstsq(ones, ys, driver="gelsd").solution
    left = (ones @ weight - ys).square().sum() / (ys - ys.mean(0)).square().sum()
    assert abs(float(left) - stitched.report.error) < 1e-9
    hidden = features(a, 0, x) @ weight[:-1] + weight[-1]
    torch.testing.assert_close(stitched(x), b.readout(b.norm(hidden)), rtol=1e-9, atol=1e-9)


def test_convolution_by_hand_with_ridge_and_without_bias():
    a, b = resnet(12, 1), resnet(10, 2)
    batches = batches_for(a)
    with torch.no_grad():
        xs, ys = (torch.cat([m[:2](batch[0]).movedim(1, -1).flatten(0, 2) for batch in batches]) for m in (a, b))
    stitched = cl.stitch(a, b, "1", "1", batches, bias=False, ridge=0.3, progress=False)
    weight = torch.linalg.solve(xs.T @ xs / len(xs) + 0.3 * torch.eye(8).double(), xs.T @ ys / len(xs))
    torch.testing.assert_close(stitched.stitch.weight, weight.T, rtol=1e-9, atol=1e-9)
    assert stitched.stitch.bias is None and stitched.report.positions == 45 * 64
    conv = nn.Conv2d(8, 8, 1, bias=False).double()
    conv.weight.data = weight.T[:, :, None, None]
    x = batches[0][0]
    torch.testing.assert_close(stitched(x), b[2:](conv(a[:2](x))), rtol=1e-9, atol=1e-9)


def test_trains_and_saves(tmp_path):
    a, b = resnet(12, 1), resnet(10, 2)
    batches = batches_for(a)
    stitched = cl.stitch(a, b, "1", "1", batches, progress=False)
    before = {key: value.clone() for key, value in b.state_dict().items()}
    x, y = batches[0]
    optimiser = torch.optim.SGD(stitched.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(stitched(x), y)
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None for p in stitched.parameters())
    assert all(torch.equal(value, before[key]) for key, value in b.state_dict().items())
    torch.save(stitched, tmp_path / "stitched.pt")
    loaded = torch.load(tmp_path / "stitched.pt", weights_only=False)
    assert torch.equal(loaded(x), stitched(x)) and loaded.report == stitched.report
    twin = cl.stitch(a, b, "1", "1", batches, progress=False)
    twin.load_state_dict(stitched.state_dict())
    assert torch.equal(twin(x), stitched(x)) and torch.equal(copy.deepcopy(twin)(x), stitched(x))
    assert StitchReport.load(stitched.report.save(tmp_path / "report.safetensors")).error == stitched.report.error


def test_only_what_is_needed_is_there():
    a, b = mlp(8, 0), mlp(10, 1)
    stitched = cl.stitch(a, b, "1", "3", batches_for(a), progress=False)
    assert sum(p.numel() for p in stitched.parameters()) == (4 * 8 + 8) + (8 * 6 + 6) + (6 * 3 + 3)
    circuit = cl.trace(stitched, batches_for(a)[0][0])  # a module like any other
    assert not circuit.opaque and circuit.verify(stitched, batches_for(a)[0][0]).ok


def test_inside_a_residual_block_the_path_around_is_the_second_networks_own():
    model, args, _ = made("fused")
    stitched = cl.stitch(model, model, "up", "up", [(args[0], args[0])], loss=None, progress=False)
    torch.testing.assert_close(stitched(*args), model(*args), rtol=1e-12, atol=1e-12)
    zero = cl.stitch(model, model, "norm1", "up", [args[0]], progress=False)
    with torch.no_grad():
        for parameter in zero.stitch.parameters():
            parameter.zero_()
    x = args[0]
    attended = {}
    hook = model.norm2.register_forward_pre_hook(lambda module, given: attended.update(x=given[0]))
    model(x)
    hook.remove()
    torch.testing.assert_close(zero(x), attended["x"] + model.down.bias, rtol=1e-9, atol=1e-9)


def test_places():
    model, args, _ = made("fused")
    circuit = cl.trace(model, *args)
    assert find(circuit, "up").size == 24 and find(circuit, "f").tensor == find(circuit, "up").tensor  # in one module's output
    assert find(circuit, "gelu").tensor == "gelu" and find(circuit, "h@matmul_2").dim == 1 and find(circuit, "k_2@matmul_2").dim == 3
    assert find(circuit, "h@reshape").size == 12  # the whole dimension of heads and their entries
    for name, message in (
        ("upp", "no place 'upp'.*did you mean 'up'.*'norm1', 'qkv'"), ("matmul_2", "2 axes of features.*'h@matmul_2', 'k_2@matmul_2'"),
        ("f@out", "'f' is in nothing that 'out' gives; there are x.2"), ("x.2", "is in 4 outputs of modules.*'x.2@norm1'"),
        ("zz@up", "no wire 'zz'"), (3, "a int was given"),
    ):
        with pytest.raises(InputError, match=message):
            find(circuit, name)
    with pytest.raises(InputError, match="no module that all data go through"):
        layers(circuit)


def test_errors_leave_models_alone():
    a, b = mlp(8, 0), resnet()
    batches = batches_for(a)
    for wrong, message in (
        (lambda: cl.stitch(a, b, "1", "1", batches, progress=False), "model_b .* does not run on the batches"),
        (lambda: cl.stitch(a, "b", "1", "1", batches, progress=False), "model_b must be a torch.nn.Module"),
        (lambda: cl.stitch(a, a, "1", "9", batches, progress=False), "no place '9'"),
        (lambda: cl.stitch(a, a, "1", "4", batches, progress=False), "nothing after it"),
        (lambda: cl.stitch(a, a, "1", "1", [], progress=False), "batches is empty"),
        (lambda: cl.stitch(a, a, "1", "1", iter(batches), progress=False), "walked only once"),
        (lambda: cl.stitch(a, a, "1", "1", batches, ridge=-1, progress=False), "ridge=-1"),
        (lambda: cl.stitch(a, a, "1", "1", [(torch.full((3, 4), float("nan")).double(), None)], progress=False), "not all finite"),
        (lambda: cl.stitch(b, b, "1", "2", batches_for(b), progress=False), r"positions \(40, 8, 8\) and .*\(40, 4, 4\)"),
        (lambda: cl.stitch(b, b, "1", "4", batches_for(b), progress=False), "position by position"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()

    def interrupted(output, batch):
        raise KeyboardInterrupt

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        cl.stitch(a.train(), a, "1", "1", batches, loss=interrupted, progress=False)
    assert a.training and torch.is_grad_enabled() and torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in a.modules()) and not torch.nn.modules.module._global_forward_hooks


def test_least_squares_does_not_depend_on_batches_and_takes_dependent_features():
    torch.manual_seed(0)
    x, y = torch.randn(500, 6), torch.randn(500, 4)
    x = torch.cat([x, x[:, :1] * 1e-7 + x[:, 1:2], x[:, 2:3] * 0], 1).double()
    solutions = []
    for pieces in ([500], [3, 1, 496], [100] * 5):
        fit = LeastSquares(bias=True)
        for a, b in zip(x.split(pieces), y.double().split(pieces), strict=True):
            fit.add(a, b)
            fit._taken()
        weight, offset, rank, left, spread = fit.solve(0.0)
        assert rank == 8 and fit.rows == 500  # 6, one almost the same, none, the constant
        solutions.append(x @ weight + offset)
        torch.testing.assert_close(left, (solutions[-1] - y).square().sum(0))
        torch.testing.assert_close(spread, (y.double() - y.double().mean(0)).square().sum(0))
    for found in solutions[1:]:
        torch.testing.assert_close(found, solutions[0], rtol=1e-6, atol=1e-6)


# the matrix -----------------------------------------------------------------------------------------------


class Layer(nn.Sequential):
    """Convolution, norm, nonlinearity."""

    def __init__(self, a, b):
        super().__init__(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def trained(seed, width, steps=120):
    (x, y), test = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(Layer(1, width), Layer(width, width), Layer(width, width), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[batch].view(-1, 1, 8, 8)), y[batch])
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    image = lambda part: [(part[0][n : n + 250].view(-1, 1, 8, 8), part[1][n : n + 250]) for n in range(0, len(part[0]), 250)]  # noqa: E731
    return model, image((x, y)), image(test)


def test_matrix_of_two_trained_networks(tmp_path):
    (a, train, test), (b, _, _) = trained(1, 32), trained(2, 24)
    found = stitching_matrix(a, b, train[:3], places_a=("0", "1", "2"), places_b=("0", "1", "2"), loss="cross_entropy", test=test, progress=False)
    assert a.training and found.loss_a < 0.3 and found.loss_b < 0.3
    diagonal = np.diag(found.loss)
    assert (diagonal < 0.4).all(), diagonal  # chance is 2.3
    # what comes early does not do for what comes late: a linear map cannot stand for the layers between
    assert found.loss[0, 2] > 2 * diagonal.max(), found.loss
    one = cl.stitch(a, b, "1", "2", train[:3], loss="cross_entropy", progress=False)
    assert abs(one.report.error - found.error[1, 2]) < 1e-6
    again = StitchingMatrix.load(found.save(tmp_path / "matrix.safetensors"))
    assert np.array_equal(again.loss, found.loss) and again.rows == found.rows
    assert len(found.to_frame()) == 9 and len(found.plot().data) == 1 and np.array_equal(found.plot("error").data[0].z, found.error)
    assert "9 pairs fit" in repr(found)


def test_matrix_by_default_is_of_all_layers_with_gaps():
    a, b = resnet(12, 1), resnet(10, 2)
    found = stitching_matrix(a, b, batches_for(a), progress=False)
    assert found.rows == ("0", "1", "2", "3", "4") and found.columns == found.rows
    fits = np.isfinite(found.error)
    assert fits[:2, :2].all() and fits[2, 2] and not fits[2, :2].any() and not fits[:2, 2:].any() and np.isnan(found.loss).all()
    for i, j in ((0, 1), (2, 2)):
        one = cl.stitch(a, b, found.rows[i], found.columns[j], batches_for(a), progress=False)
        assert abs(one.report.error - found.error[i, j]) < 1e-9
    assert found.plot().layout.title.text.startswith("share of the variance")
    with pytest.raises(InputError, match="no pair of places can be stitched.*position by position"):
        stitching_matrix(a, b, batches_for(a), places_a=["0"], places_b=["2"], progress=False)
    with pytest.raises(InputError, match="show='err'"):
        found.plot("err")


def test_outputs_are_those_of_the_second_network():
    """Also those that are not made of what is stitched, and the stitched features themselves."""
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.mean, self.spread, self.back = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(3, 5)

        def forward(self, x):
            h = self.enter(x).tanh()
            mean, spread = self.mean(h), self.spread(h)
            return spread, {"mean": mean, "made": self.back(mean)}

    torch.manual_seed(0)
    a, b = Coder().double(), Coder().double()
    batches = [torch.randn(9, 5).double()]
    stitched = cl.stitch(a, b, "mean", "mean", batches, progress=False)
    spread, rest = stitched(batches[0])
    mean = stitched.stitch(a(batches[0])[1]["mean"])
    torch.testing.assert_close((spread, rest["mean"], rest["made"]), (b(batches[0])[0], mean, b.back(mean)))
