"""Tracing, verifying and permuting where the caller's new tensors are made without numbers."""

import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.gallery import digits, sublanguages


class Mask(nn.Module):
    """Makes tensors in its forward, and asks for a number, which a run on meta does not have."""

    def __init__(self):
        super().__init__()
        self.map, self.out = nn.Linear(3, 5, device="cpu"), nn.Linear(5, 2, device="cpu")

    def forward(self, x):
        before = torch.ones(x.shape[0], x.shape[0]).tril()
        y = before @ self.map(x)
        return self.out(y if y.sum().item() < 1e9 else y * 2) + torch.arange(2)


def test_default_meta():
    model, x = Mask(), torch.rand(4, 3)
    with torch.device("meta"):
        circuit = cl.trace(model, x)
        report = circuit.verify(model, x)
        (wire,) = (wire for wire in circuit.wires.values() if wire.permutable)
        permuted = circuit.permute(model, {wire.name: [4, 2, 0, 1, 3]})
    assert circuit.device == "live"
    assert report.ok
    assert not report.untestable
    assert "permutable" in {claim.kind for claim in report.held}
    torch.testing.assert_close(permuted(x), model(x))


def test_inputs_without_numbers():
    model = nn.Linear(3, 2)
    circuit = cl.trace(model, torch.rand(4, 3))
    with pytest.raises(cl.CircuitlabError, match=r"the input 'input' is on the meta device.*rand_like"):
        circuit.verify(model, torch.zeros(4, 3, device="meta"))


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def test_everything_else_names_its_device():
    """In a notebook that begins with ``torch.set_default_device("cuda")``, models and data may still be elsewhere.

    Only what trains is left out: torch's own optimisers count on the default device.
    """
    a, b, c = (net(seed) for seed in range(3))
    batches = [(torch.randn(12, 6), torch.randint(0, 3, (12,))) for _ in range(2)]
    with torch.device("meta"):
        options = {"loss": "cross_entropy", "progress": False}
        stats = cl.observe(a, batches, progress=False, sample=8)
        wire = next(iter(stats))
        part = cl.partition(stats[wire], "random", k=4, controls=0)
        moe = cl.to_moe(a, {wire: part}, top_k=2)
        assert moe(batches[0][0]).device == batches[0][0].device
        moe.to_dense()
        cl.expert_curve(a, {wire: part}, batches, **options)
        matched = cl.match(a, b, batches[0][0], progress=False)
        matched.apply(b)
        cl.match(a, b, method="activations", batches=[x for x, _ in batches], progress=False)
        path = cl.interpolate(a, b, batches, points=3, correct="repair", **options)
        assert path.loss.shape == (3,)
        path.barrier()
        cl.plane(a, b, c, batches, grid=(3, 3), **options)
        cl.ridge(a, b, batches, points=5, **options)
        cl.stitch(a, b, "1", "1", [x for x, _ in batches], progress=False)
        circuit = cl.trace(a, batches[0][0])
        circuit.cut({wire: 8}).apply(a)(batches[0][0])
        circuit.to_torch(a)(batches[0][0])
        circuit.cost()
        circuit.symmetry().random()


def test_the_gallery_trains_on_the_processor_or_where_its_model_is():
    with torch.device("meta"):
        data = digits.digits()
        digits.train(lambda: digits.MLP(8).to_empty(device="cpu"), data, epochs=1)
        sublanguages.Corpus().documents(2)
