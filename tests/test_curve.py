"""Curves between two models: their weights, what training them changes, and what it does not."""

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.curve import Curve, weights
from circuitlab.analysis.landscape import interpolate
from circuitlab.analysis.states import merge
from tests.test_hidden_state import Stateful, plain


class Product(nn.Module):
    """u·v = 1 is a valley that the straight line from (2, ½) to (½, 2) leaves."""

    def __init__(self, u, v):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.tensor(u)), nn.Parameter(torch.tensor(v))

    def forward(self, x):
        return x * self.u * self.v


def net(seed, norm=True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))
    for _ in range(3):
        model(torch.randn(40, 6) + 1)
    return model


@pytest.fixture
def batches():
    torch.manual_seed(9)
    x, y = torch.randn(50, 6) + 1, torch.randint(0, 4, (50,))
    return list(zip(x.split(16), y.split(16), strict=True))


def test_weights_are_those_of_bezier_and_polygon():
    for t in (0, 0.1, 0.5, 0.8, 1):
        assert weights("bezier", 1, t) == pytest.approx([(1 - t) ** 2, 2 * t * (1 - t), t**2])
        for kind in ("bezier", "polygon"):
            assert weights(kind, 3, t).sum() == pytest.approx(1)
    assert weights("polygon", 1, 0.25) == pytest.approx([0.5, 0.5, 0])
    assert weights("polygon", 3, 0.625) == pytest.approx([0, 0, 0.5, 0.5, 0])
    assert weights("bezier", 2, 1.0).tolist() == [0, 0, 0, 1]
    with pytest.raises(cl.CircuitlabError, match="from 0 to 1"):
        weights("bezier", 1, 1.2)


@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("polygon", 1), ("bezier", 2), ("polygon", 3)])
def test_a_curve_follows_the_valley(kind, bends):
    a, b = Product(2.0, 0.5), Product(0.5, 2.0)
    data = [(torch.ones(4), torch.ones(4))]
    found = cl.curve(a, b, data, "mse", kind, bends, steps=300, lr=0.02, points=21, progress=False)
    assert found.straight.barrier() == pytest.approx((1.25**2 - 1) ** 2, rel=1e-4)
    assert found.barrier() < found.straight.barrier() / 5
    assert found.loss[0] == found.loss[-1] == 0
    for t in (0.3, 0.5, 1.0):
        made = found.at(t)
        shares = found.weights(t)
        assert made.u.item() == pytest.approx(shares[0] * 2 + shares[-1] * 0.5 + sum(s * bend["u"].item() for s, bend in zip(shares[1:-1], found.bends, strict=True)), rel=1e-5)
    assert (found.at(0.5).u * found.at(0.5).v - 1).square().item() == pytest.approx(found.loss[10], abs=1e-6)
    assert found.training[-50:].mean() < found.training[:50].mean()


def test_untrained_it_is_the_straight_line(batches):
    a, b = net(0, norm=False), net(1, norm=False)
    found = cl.curve(a, b, batches, "cross_entropy", "polygon", bends=2, steps=1, lr=1e-12, points=7, test=batches[:1], metrics="accuracy", progress=False)
    line = interpolate(a, b, batches, "cross_entropy", 7, test=batches[:1], metrics="accuracy", progress=False)
    assert found.straight.values == pytest.approx(line.values, abs=1e-6)
    assert found.path.values == pytest.approx(line.values, abs=1e-6)
    assert found.path.correct is None
    assert set(found.to_frame().columns) >= {"t", "loss", "test_accuracy", "straight_loss", "straight_test_loss"}


def test_statistics_of_batchnorm_are_found_anew(batches):
    a, b = net(0).eval(), net(1)
    found = cl.curve(a, b, batches, "cross_entropy", "polygon", steps=20, points=5, progress=False)
    assert found.path.correct == "batchnorm"
    line = interpolate(a, b, batches, "cross_entropy", 5, correct="batchnorm", progress=False)
    assert found.straight.loss == pytest.approx(line.loss, abs=1e-6)
    assert found.loss[[0, -1]] == pytest.approx(line.loss[[0, -1]], abs=1e-12)
    for t, at in ((0.5, 2), (0.25, 1)):  # the bend itself has none of its own either
        made = found.at(t)
        assert not made.training
        loss = sum(float(nn.functional.cross_entropy(made(x), y)) * len(y) for x, y in batches) / 50
        assert found.loss[at] == pytest.approx(loss, rel=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(found.at(0).state_dict().values(), a.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_curve(batches):
    a, b = net(0), net(1)

    def bend(seed):
        return cl.curve(a, b, batches, "cross_entropy", steps=5, points=3, seed=seed, progress=False).bends[0]["0.weight"]

    assert torch.equal(bend(3), bend(3))
    assert not torch.equal(bend(3), bend(4))


def test_frozen_parameters_stay_on_the_line(batches):
    a, b = net(0, norm=False), net(1, norm=False)
    a[0].requires_grad_(False)
    found = cl.curve(a, b, batches, "cross_entropy", steps=5, points=3, progress=False)
    middle = merge([a, b])
    assert torch.equal(found.bends[0]["0.weight"], middle[0].weight)
    assert not torch.equal(found.bends[0]["4.weight"], middle[4].weight)


def test_it_trains_where_gradients_are_off_and_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.held = [self.one.weight]

        def forward(self, x):
            return self.two(self.one(x).tanh()) @ self.held[0]

    a, b = Tied(0), Tied(1)
    with torch.no_grad():
        found = cl.curve(a, b, [(torch.ones(4, 3), torch.zeros(4, 3))], "mse", steps=30, lr=0.05, points=3, progress=False)
    assert found.training[-1] < found.training[0]
    made = found.at(0.5)
    assert made.two.weight is made.one.weight
    assert made.held[0] is made.one.weight


def test_nothing_of_the_models_changes(batches):
    a, b = net(0), net(1).eval()
    before = plain(a), plain(b), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    def fails(output, batch):
        raise ZeroDivisionError

    found = cl.curve(a, b, batches, "cross_entropy", steps=4, points=3, progress=False)
    found.at(0.3)
    with pytest.raises(ZeroDivisionError):
        cl.curve(a, b, batches, fails, steps=4, points=3, progress=False)

    def stops(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 3 of 9 steps"):
        part = cl.curve(a, b, batches, "cross_entropy", steps=9, points=3, seen=stops, progress=False)
    assert len(part.training) == 3
    assert np.isfinite(part.loss).all()
    assert (plain(a), plain(b), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before
    odd = Stateful()
    before = plain(odd)
    cl.curve(odd, Stateful(), [torch.randn(4, 4)], lambda output, batch: output.square().mean(), steps=3, points=3, progress=False)
    assert plain(odd) == before


def test_it_is_saved_and_drawn(batches, tmp_path):
    a, b = net(0), net(1)
    found = cl.curve(a, b, batches, "cross_entropy", steps=4, points=5, progress=False)
    back = Curve.load(found.save(tmp_path / "curve.safetensors"))
    assert (back.loss == found.loss).all()
    assert "bezier of 1 bends, 4 steps, corrected by batchnorm" in repr(back)
    with pytest.raises(cl.CircuitlabError, match=r"give them, curve.at\(0.4, \[a, b\], batches\)"):
        back.at(0.4)
    with pytest.raises(cl.CircuitlabError, match="has BatchNorm, whose statistics"):
        back.at(0.4, [a, b])
    for one, other in zip(back.at(0.4, [a, b], batches).state_dict().values(), found.at(0.4).state_dict().values(), strict=True):
        assert torch.equal(one, other)
    lines = {trace.name: np.array(trace.y) for trace in back.plot().data if trace.name}
    assert lines["curve"] == pytest.approx(found.loss)
    assert lines["straight line"] == pytest.approx(found.straight.loss)


def test_wrong_arguments_are_told(batches):
    a, b = net(0), net(1)
    for options, told in (
        ({"kind": "spline"}, "kind='spline'"), ({"bends": 0}, "bends=0"), ({"steps": 0}, "steps=0"), ({"points": 1}, "points=1"), ({"lr": -1}, "lr=-1"),
        ({"correct": "repair"}, "correct='repair'"),
    ):
        with pytest.raises(cl.CircuitlabError, match=told):
            cl.curve(a, b, batches, "cross_entropy", progress=False, **options)
    for one, other, data, loss, told in (
        (a, nn.Linear(2, 2), batches, "cross_entropy", "different parameters"),
        (a, b, [], "cross_entropy", "no batch has 2 examples"), (a, b, iter(batches), "cross_entropy", "only once"),
        (net(0, norm=False), net(1, norm=False), [], "cross_entropy", "batches is empty"),
        (a, b, batches, lambda output, batch: output.detach().mean(), "has no gradient"),
        (a, b, batches, lambda output, batch: output.mean() * float("nan"), "loss is nan at step 0; try a smaller lr"),
        (net(0).requires_grad_(False), b, batches, "cross_entropy", "nothing to train in a bend"),
    ):
        with pytest.raises(cl.CircuitlabError, match=told):
            cl.curve(one, other, data, loss, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bezier", "polygon"])
def test_half_precision_trains_in_single(dtype, kind):
    a, b = (net(seed, norm=False).to(dtype) for seed in (0, 1))
    x = torch.randn(8, 6).to(dtype)
    made = cl.curve(a, b, [(x, torch.arange(8) % 4)], "cross_entropy", kind, steps=40, lr=1e-4, points=3, progress=False)
    whole = cl.curve(a.float(), b.float(), [(x.float(), torch.arange(8) % 4)], "cross_entropy", kind, steps=40, lr=1e-4, points=3, progress=False)
    for name, bend in made.bends[0].items():
        assert bend.dtype == dtype
        torch.testing.assert_close(bend.float(), whole.bends[0][name], rtol=torch.finfo(dtype).eps, atol=1e-3)
