"""The curvature that a barrier is made of: identities that close, against derivatives and integrals that are known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.derivatives import Derivatives, NoSecondDerivativeError
from circuitlab.analysis.landscape import interpolate
from circuitlab.analysis.ridge import Ridge
from circuitlab.analysis.states import merge
from tests.test_hidden_state import Stateful, plain


def net(seed, middle=nn.Tanh, norm=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), middle(), nn.Dropout(0.5), nn.Linear(8, 4))
    for _ in range(3):
        model(torch.randn(40, 6) + 1)
    with torch.no_grad():
        model[4].weight.mul_(3)
    return model


@pytest.fixture
def batches():
    torch.manual_seed(9)
    x, y = torch.randn(50, 6) + 1, torch.randint(0, 4, (50,))
    return list(zip(x.split(16), y.split(16), strict=True))


class Two(nn.Module):
    """Gives a polynomial of two parameters."""

    def __init__(self, p, q):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.tensor(p)), nn.Parameter(torch.tensor(q))

    def forward(self, x):
        return x * (self.p**2 + 4 * self.p * self.q - self.q**3)


def test_of_a_polynomial_it_is_exact():
    a, b = Two(1.0, 0.0), Two(3.0, -1.0)  # d = (2, -1); H = [[2, 4], [4, -6q]], q = -t
    found = cl.ridge(a, b, [torch.ones(3), torch.ones(1)], lambda output, batch: output.mean(), 9, blocks=["p", "q"], progress=False)
    t = found.alphas
    assert found.method == "hessian"
    assert found.loss == pytest.approx((1 + 2 * t) ** 2 - 4 * (1 + 2 * t) * t + t**3)
    assert found.slopes[:, 0] == pytest.approx(2 * (2 * (1 + 2 * t) - 4 * t))
    assert found.curvature[:, 0, 0] == pytest.approx(8.0)
    assert found.curvature[:, 0, 1] == pytest.approx(-8.0)
    assert found.curvature[:, 1, 1] == pytest.approx(6 * t)
    assert found.alone[:, 0] == pytest.approx(-4 * t * (1 - t))
    assert found.between == pytest.approx(8 * t * (1 - t))
    assert found.alone[:, 1] == pytest.approx(t**3 - t)
    assert found.alone.sum(1) + found.between == pytest.approx(found.rise)
    for zero in (found.kinks, found.residual, found.error):
        assert zero == pytest.approx(0, abs=1e-12)
    assert found.by_ends == pytest.approx(found.rise)  # the curvature does go evenly
    assert found.lengths == pytest.approx([2, 1])


def test_the_integral_is_that_of_the_kernel():
    a, b = Two(1.0, 0.0), Two(3.0, -1.0)
    found = cl.ridge(a, b, [torch.ones(3)], lambda output, batch: output.mean(), 9, progress=False)
    fine = np.linspace(0, 1, 20001)
    bend = 8 - 16 + 6 * fine
    for at, alpha in enumerate(found.alphas):
        kernel = np.where(fine <= alpha, fine * (1 - alpha), alpha * (1 - fine))
        assert -np.trapezoid(kernel * bend, fine) == pytest.approx(found.rise[at], abs=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_of_a_smooth_network_everything_closes(batches, norm):
    a, b = net(0, norm=norm), net(1, norm=norm)
    found = cl.ridge(a, b, batches, "cross_entropy", 33, progress=False)
    assert found.blocks == (("0", "1", "4") if norm else ("0", "4"))
    assert np.abs(found.rise).max() > 0.03
    for small in (found.residual, found.kinks):
        assert np.abs(small).max() < 2e-4 * np.abs(found.rise).max() + 1e-6
    assert np.abs(found.kinks).max() < 10 * found.error.max() + 1e-8
    path = interpolate(a, b, batches, "cross_entropy", 33, progress=False)
    assert found.loss == pytest.approx(path.loss, abs=1e-5)
    assert found.barrier("max-end") == pytest.approx(path.barrier("max-end"), abs=1e-5)


def test_curvature_is_that_of_the_exact_hessian(batches):
    a, b = net(0), net(1)
    found = cl.ridge(a, b, batches, "cross_entropy", 5, blocks={"weights": ["0.weight", "4.weight"]}, progress=False)
    assert found.blocks == ("weights", "rest")
    middle = merge([a, b], [0.75, 0.25]).double().eval()
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    names = [name for name, _ in middle.named_parameters()]
    steps = [{n: (p - q).detach().double() if (n.endswith("weight") == weights) else torch.zeros_like(p).double()
              for (n, p), q in zip(b.named_parameters(), a.parameters(), strict=True)} for weights in (True, False)]

    def along(ways):
        moved = {n: p.detach() + ways[0] * steps[0][n] + ways[1] * steps[1][n] for n, p in middle.named_parameters()}
        return nn.functional.cross_entropy(torch.func.functional_call(middle, moved, (x.double(),)), y)

    assert len(names) == 4
    zero = torch.zeros(2, dtype=torch.float64)
    assert found.curvature[1] == pytest.approx(torch.func.hessian(along)(zero).numpy(), rel=1e-5, abs=1e-6)
    assert found.slopes[1] == pytest.approx(torch.func.grad(along)(zero).numpy(), rel=1e-5, abs=1e-6)


class Hinges(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        return (self.w - x).relu()


def test_kinks_are_found_where_no_hessian_sees_them():
    x = torch.linspace(0.25, 0.75, 400)
    found = cl.ridge(Hinges(0.0), Hinges(1.0), [x], lambda output, batch: output.mean(), 33, progress=False)
    assert found.total == pytest.approx(0)
    assert found.rise[16] == pytest.approx(-0.1875, abs=1e-3)
    assert found.kinks == pytest.approx(found.rise, abs=1e-3)
    assert np.abs(found.residual).max() < 1e-3
    seen = cl.ridge(Hinges(0.0), Hinges(1.0), [x], lambda output, batch: output.mean(), 33, method="difference", progress=False)
    assert seen.alone[:, 0] == pytest.approx(found.rise, abs=1e-3)
    assert np.abs(seen.kinks).max() < 1e-3


def test_of_relu_networks_kinks_and_curvature_are_the_barrier(batches):
    a, b = net(0, nn.ReLU), net(1, nn.ReLU)
    found = cl.ridge(a, b, batches, "cross_entropy", 49, progress=False)
    other = cl.ridge(a, b, batches, "cross_entropy", 49, method="difference", progress=False)
    scale = np.abs(found.rise).max()
    assert np.abs(found.residual).max() < 0.01 * scale
    assert np.abs(found.kinks).max() > 0.02 * scale
    assert found.alone.sum(1) + found.between + found.kinks + found.residual == pytest.approx(found.rise)
    assert np.abs(other.kinks).max() < 0.3 * np.abs(found.kinks).max()  # differences hold the kinks themselves


def test_the_ends_alone_tell_the_wrong_sign():
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images[:900], dtype=torch.float32) / 8 - 1, torch.as_tensor(classes[:900])

    def trained(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        step = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(64):
                step.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                step.step()
        return model

    found = cl.ridge(trained(1), trained(2), [(x, y)], "cross_entropy", 9, progress=False)
    assert found.rise[4] > 0.2
    assert found.by_ends[4] < 0
    assert found.total[4] < 0 < min(found.total[0], found.total[-1])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class OnceTanh(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Hides(torch.autograd.Function):
    """A derivative that does not say that it cannot be derived."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach().tanh()
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.kept**2)


class HidesTanh(nn.Module):
    def forward(self, x):
        return Hides.apply(x)


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x, torch.eye(8, dtype=x.dtype)) / 3


@pytest.mark.parametrize("kind", [OnceTanh, HidesTanh, Distances])
def test_without_second_derivatives_slopes_are_subtracted_and_it_is_said(batches, kind):
    a, b = net(0, kind), net(1, kind)
    found = cl.ridge(a, b, batches, "cross_entropy", 33, progress=False)
    assert found.method == "difference"
    assert "differences of slopes" in repr(found)
    assert np.abs(found.kinks).max() < 0.01 * np.abs(found.rise).max()
    if kind is not Distances:
        right = cl.ridge(net(0), net(1), batches, "cross_entropy", 33, progress=False)
        assert found.curvature == pytest.approx(right.curvature, abs=0.02 * np.abs(right.curvature).max())
        return
    with pytest.raises(NoSecondDerivativeError, match="Sequential cannot be derived twice: .*cdist"):
        cl.ridge(a, b, batches, "cross_entropy", method="hessian", progress=False)


def test_attention_and_recurrence_are_derived_twice():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.step = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 4, batch_first=True)

        def forward(self, x):
            return self.step(self.attend(x, x, x, need_weights=False)[0])[0]

    torch.manual_seed(0)
    a, b = Both(), Both()
    found = cl.ridge(a, b, [(torch.randn(6, 5, 8), torch.randn(6, 5, 4))], "mse", 17, progress=False)
    assert found.method == "hessian"
    assert found.blocks == ("attend", "step")
    assert np.abs(found.kinks).max() < 1e-3 * np.abs(found.rise).max()


def test_derivatives_of_a_model_that_writes_its_buffers():
    class Counts(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", torch.tensor(scale))
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            found = x * self.w * self.scale
            self.scale += 1
            return found

    found = cl.ridge(Counts(1.0), Counts(3.0), [torch.ones(2), torch.ones(2)], lambda output, batch: output.mean(), 5, progress=False)
    assert found.loss == pytest.approx(1 + 2 * found.alphas)  # what one batch writes the next does not see
    assert found.slopes[:, 0] == pytest.approx(2)


def test_tied_parameters_are_derived_once(batches):
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x).tanh())

    found = cl.ridge(Tied(0), Tied(1), batches, "cross_entropy", 17, progress=False)
    assert found.blocks == ("one",)
    assert np.abs(found.residual).max() < 1e-3 * np.abs(found.rise).max()


def test_a_parent_gives_the_angle_of_the_fork(batches):
    parent, a, b = net(0), net(0), net(0)
    with torch.no_grad():
        a[0].weight[0, 0] += 3
        b[0].weight[0, 0] += 3
        b[4].bias[0] += 3
    found = cl.ridge(a, b, batches, "cross_entropy", 5, parent=parent, progress=False)
    assert found.angle == pytest.approx(45, abs=1e-3)
    assert "fork of 45°" in repr(found)
    assert cl.ridge(a, b, batches, "cross_entropy", 5, progress=False).angle is None
    with pytest.raises(cl.CircuitlabError, match="parent has the same parameters as a"):
        cl.ridge(a, b, batches, "cross_entropy", 5, parent=a, progress=False)


def test_nothing_of_the_models_changes(batches):
    a, b = net(0, nn.ReLU, norm=True), net(1, nn.ReLU, norm=True)
    b.eval()
    a[0].weight.requires_grad_(False)
    before = plain(a), plain(b), torch.get_rng_state().tolist()

    def fails(output, batch):
        raise ZeroDivisionError

    def stops(output, batch):
        raise KeyboardInterrupt

    for loss, error in ((fails, ZeroDivisionError), (stops, KeyboardInterrupt)):
        with pytest.raises(error):
            cl.ridge(a, b, batches, loss, 5, progress=False)
    for method in ("hessian", "difference"):
        cl.ridge(a, b, batches, "cross_entropy", 5, method=method, progress=False)
    assert (plain(a), plain(b), torch.get_rng_state().tolist()) == before
    odd = Stateful()
    before = plain(odd)
    other = Stateful()
    with torch.no_grad():
        other.up.weight.add_(1)
    cl.ridge(odd, other, [torch.randn(4, 4)], lambda output, batch: output.square().mean(), 5, progress=False)
    assert plain(odd) == before


def test_it_is_saved_and_drawn(batches, tmp_path):
    found = cl.ridge(net(0), net(1), batches, "cross_entropy", 9, progress=False)
    back = Ridge.load(found.save(tmp_path / "ridge.safetensors"))
    assert (back.rise == found.rise).all()
    table = back.to_frame()
    parts = table[["rise by 0", "rise by 4", "rise between blocks", "rise by kinks", "residual"]]
    assert parts.sum(axis=1).to_numpy() == pytest.approx(table["rise"].to_numpy())
    figure = back.plot()
    lines = {trace.name: np.array(trace.y) for trace in figure.data}
    assert lines["loss"] == pytest.approx(found.loss)
    assert lines["dᵀHd"] == pytest.approx(found.total)
    stacked = sum(np.array(trace.y) for trace in figure.data if trace.stackgroup)
    assert stacked == pytest.approx(found.rise - found.residual, abs=1e-12)
    few = back.plot(blocks=1)
    assert "1 other blocks" in [trace.name for trace in few.data]
    assert sum(np.array(trace.y) for trace in few.data if trace.stackgroup) == pytest.approx(stacked, abs=1e-12)


def test_wrong_arguments_are_told(batches):
    a, b = net(0), net(1)
    for options, told in (
        ({"points": 4}, "points=4"), ({"points": 9.5}, "points=9.5"), ({"method": "exact"}, "method='exact'"),
        ({"blocks": ["0", "0.weight"]}, "'0.weight' is in block '0.weight' and in one before it"), ({"blocks": ["7"]}, "layers: "),
        ({"parent": nn.Linear(2, 2)}, "different parameters"),
    ):
        with pytest.raises(cl.CircuitlabError, match=told):
            cl.ridge(a, b, batches, "cross_entropy", progress=False, **options)
    for one, other, data, loss, told in (
        (a, a, batches, "cross_entropy", "the same parameters"), (a, b, [], "cross_entropy", "empty"), (a, b, iter(batches), "cross_entropy", "only once"),
        (a, b, batches, lambda output, batch: output.detach().mean(), "has no gradient"),
        (a, b, batches, lambda output, batch: torch.tensor(0.0), "has no gradient"),
    ):
        with pytest.raises(cl.CircuitlabError, match=told):
            cl.ridge(one, other, data, loss, progress=False)


def test_derivatives_are_those_of_the_mean_over_examples(batches):
    model = net(3, norm=True)
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    whole, parts = Derivatives(model, [(x, y)], "cross_entropy"), Derivatives(model, batches, "cross_entropy")
    for one, other in zip(whole.gradient()[1].values(), parts.gradient()[1].values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9)
    assert math.isclose(whole.gradient()[0], parts.gradient()[0])
    single = Derivatives(model, batches, "cross_entropy", double=False)
    assert single.kind == torch.float32
    assert math.isclose(single.gradient()[0], parts.gradient()[0], rel_tol=1e-5)
