"""Eigenvalues of the Hessian, against matrices that are known and against the exact one of a small model."""

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.hessian import Spectrum, spectrum
from circuitlab.analysis.surface import surface
from tests.test_hidden_state import plain
from tests.test_ridge import Distances, HidesTanh


class Quadratic(nn.Module):
    """Half of wᵀAw, with A of known eigenvalues."""

    def __init__(self, values):
        super().__init__()
        torch.manual_seed(0)
        turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
        self.matrix = turn @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ turn.T
        self.turn = turn
        self.w = nn.Parameter(torch.randn(len(values), dtype=torch.float64))

    def forward(self, x):
        return x.mean() * (self.w @ self.matrix.to(self.w) @ self.w) / 2


def output(found, batch):
    return found


def net(middle=nn.Tanh, width=9):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), middle(), nn.Linear(width, 3))


@pytest.fixture
def batches():
    torch.manual_seed(1)
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    return list(zip(x.split(15), y.split(15), strict=True))


def exact(model, batches):
    """The Hessian of the mean loss, float64."""
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.shape for p in model.parameters()]

    def loss(flat):
        parts = dict(zip(names, (part.view(size) for part, size in zip(flat.split([s.numel() for s in sizes]), sizes, strict=True)), strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x.double(),)), y)

    return torch.func.hessian(loss)(torch.cat([p.detach().double().flatten() for p in model.parameters()])).numpy()


@pytest.mark.parametrize("width", [3, 9])  # as a matrix, and by ARPACK
def test_eigenvalues_are_those_of_the_exact_hessian(batches, width):
    model = net(width=width)
    right, columns = np.linalg.eigh(exact(model, batches))
    for which, places in (("LA", [-1, -2, -3]), ("SA", [2, 1, 0]), ("BE", [-1, -2, 0])):
        found = spectrum(model, batches, "cross_entropy", 3, which=which, tolerance=1e-10, progress=False)
        assert found.eigenvalues == pytest.approx(right[places], abs=1e-7)
        assert found.residuals.max() < 1e-6
    largest = spectrum(model, batches, "cross_entropy", 1, which="LM", progress=False)
    assert largest.eigenvalues[0] == pytest.approx(right[np.argmax(np.abs(right))], rel=1e-4)
    vector = np.concatenate([largest.vectors[0][name].flatten().numpy() for name, _ in model.named_parameters()])
    assert abs(vector @ columns[:, np.argmax(np.abs(right))]) == pytest.approx(1, abs=1e-4)
    assert largest.loss == pytest.approx(sum(nn.functional.cross_entropy(model(x), y).item() * len(y) for x, y in batches) / 40, rel=1e-6)


def test_of_a_quadratic_the_density_is_that_of_its_eigenvalues():
    values = np.r_[np.zeros(150), np.linspace(-1, 1, 40), 5.0, 9.0]
    found = spectrum(Quadratic(values), [torch.ones(3)], output, 2, probes=30, steps=60, progress=False)
    assert found.eigenvalues == pytest.approx([9, 5], rel=1e-4)
    assert found.weights.sum(1) == pytest.approx(1)
    assert found.trace == pytest.approx(14, rel=0.35)
    places, density = found.density(width=0.1)
    assert np.trapezoid(density, places) == pytest.approx(1, abs=1e-3)
    near = (np.abs(places - 9) < 0.6, np.abs(places) < 1.5, (places > 6) & (places < 8))
    shares = [np.trapezoid(np.where(part, density, 0), places) for part in near]
    assert shares[0] == pytest.approx(1 / 192, rel=0.5)
    assert shares[1] == pytest.approx(190 / 192, abs=0.01)
    assert shares[2] < 1e-6
    assert found.density([0.0], 0.5)[1][0] > 0.5


def test_moments_of_the_quadrature_are_those_of_the_random_vector():
    values = np.linspace(-2, 3, 80)
    few = spectrum(Quadratic(values), [torch.ones(3)], output, 0, probes=1, steps=12, seed=5, progress=False)
    many = spectrum(Quadratic(values), [torch.ones(3)], output, 0, probes=1, steps=200, seed=5, progress=False)
    assert many.nodes.shape == (1, 80)  # all of it: vectors stay orthogonal
    assert np.sort(many.nodes[0]) == pytest.approx(values, abs=1e-8)
    for power in range(1, 24):  # Gauss' quadrature with n nodes is exact up to 2n - 1
        assert (few.weights * few.nodes**power).sum() == pytest.approx((many.weights * many.nodes**power).sum(), rel=1e-8)


def test_few_different_eigenvalues_end_the_iteration():
    found = spectrum(Quadratic(np.r_[np.ones(50), 4.0 * np.ones(30)]), [torch.ones(3)], output, 0, probes=2, steps=40, progress=False)
    assert ((found.weights > 1e-12).sum(1) == 2).all()
    assert found.nodes[0][found.weights[0] > 1e-12] == pytest.approx([1, 4])


def test_frozen_parameters_are_left_out_and_vectors_are_directions(batches):
    model = net()
    model[0].requires_grad_(False)
    found = spectrum(model, batches, "cross_entropy", 2, progress=False)
    assert found.parameters == 30
    assert set(found.vectors[0]) == {"2.weight", "2.bias"}
    around = surface(model, batches, "cross_entropy", 3, 0.05, directions=found.vectors[:1], progress=False)
    bend = (around.loss[0] - 2 * around.loss[1] + around.loss[2]) / 0.05**2
    assert bend == pytest.approx(found.eigenvalues[0], rel=0.02)


def test_relu_networks_have_the_hessian_of_their_pieces(batches):
    model = net(nn.ReLU)
    found = spectrum(model, batches, "cross_entropy", 2, progress=False)
    assert found.eigenvalues == pytest.approx(np.linalg.eigvalsh(exact(model, batches))[[-1, -2]], rel=1e-4)


def test_what_cannot_be_derived_twice_is_told(batches):
    with pytest.raises(cl.CircuitlabError, match="are not what its slopes say"):
        spectrum(net(HidesTanh), batches, "cross_entropy", progress=False)
    with pytest.raises(cl.CircuitlabError, match="cannot be derived twice"):
        spectrum(nn.Sequential(nn.Linear(5, 8), Distances()), [(x, y) for x, y in batches], "cross_entropy", progress=False)


def test_nothing_of_the_model_changes(batches):
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3))
    before = plain(model), torch.get_rng_state().tolist()
    first = spectrum(model, batches, "cross_entropy", 2, probes=1, steps=5, progress=False)
    with pytest.raises(ZeroDivisionError):
        spectrum(model, batches, lambda found, batch: 1 / 0, progress=False)
    assert (plain(model), torch.get_rng_state().tolist()) == before
    assert (spectrum(model, batches, "cross_entropy", 2, probes=1, steps=5, progress=False).nodes == first.nodes).all()


def test_it_is_saved_and_drawn(batches, tmp_path):
    found = spectrum(net(), batches, "cross_entropy", 3, probes=2, steps=10, progress=False)
    back = Spectrum.load(found.save(tmp_path / "spectrum.safetensors"))
    assert (back.eigenvalues == found.eigenvalues).all()
    assert torch.equal(back.vectors[1]["0.weight"], found.vectors[1]["0.weight"])
    assert "of 84 parameters: largest" in repr(back)
    figure = back.plot()
    assert list(figure.data[-1].x) == pytest.approx(found.eigenvalues)
    assert np.array(figure.data[0].y).max() == pytest.approx(found.density()[1].max())
    alone = spectrum(net(), batches, "cross_entropy", 3, progress=False)
    assert len(alone.plot().data) == 1
    assert np.isnan(alone.trace)
    with pytest.raises(cl.CircuitlabError, match="density was not measured"):
        alone.density()


def test_wrong_arguments_are_told(batches):
    for options, told in (({"top": -1}, "top=-1"), ({"steps": 1}, "steps=1"), ({"probes": 1.5}, "probes=1.5"), ({"which": "XX"}, "which='XX'"), ({"top": 84}, "84 parameters")):
        with pytest.raises(cl.CircuitlabError, match=told):
            spectrum(net(), batches, "cross_entropy", progress=False, **options)
    with pytest.raises(cl.CircuitlabError, match="no parameters that require gradients"):
        spectrum(net().requires_grad_(False), batches, "cross_entropy", progress=False)
    with pytest.raises(cl.CircuitlabError, match="empty"):
        spectrum(net(), [], "cross_entropy", progress=False)


def test_logits_that_are_cast_for_the_loss_round_and_are_derived(batches):
    """As those of language models are: then slopes a tiny step apart tell nothing."""
    model = net()
    whole = spectrum(model, batches, "cross_entropy", progress=False)
    cast = spectrum(model, batches, lambda found, batch: nn.functional.cross_entropy(found.float(), batch[-1]), progress=False)
    np.testing.assert_allclose(cast.eigenvalues, whole.eigenvalues, rtol=1e-3, atol=1e-4)
