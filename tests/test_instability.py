"""Children of one parent: forks restore all of training, and barriers are those between the children."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import circuitlab as cl
from circuitlab.analysis.instability import Instability, instability
from circuitlab.analysis.landscape import interpolate

torch.manual_seed(0)
X = torch.randn(80, 6)
Y = (X @ torch.randn(6, 3)).argmax(1)
DATA = [(X, Y)]


def make():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def train(model, optimizer, schedule, *, start, stop, seed):
    for _ in range(start, stop):
        rows = torch.randint(len(X), (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
        schedule.step()


def test_forks_go_on_as_if_nothing_had_been():
    def steady(model, optimizer, schedule, *, start, stop, seed):  # takes the data in order, but for one last step
        for step in range(start, stop):
            rows = torch.arange(step, step + 8) % len(X) if step < 39 else torch.tensor([seed])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()
            optimizer.step()
            schedule.step()

    found = instability(make, steady, (30, 0, 10), 40, DATA, "cross_entropy", pairs=2, points=3, progress=False)
    assert found.forks == (0, 10, 30)
    ends = np.array([[path.loss for path in pairs] for pairs in found.paths])
    assert (ends == ends[:1]).all()  # momentum, schedule and data are the same wherever it was forked
    torch.manual_seed(0)
    whole = make()
    steady(*whole, start=0, stop=40, seed=3)
    assert ends[0, 1, 0] == pytest.approx(nn.functional.cross_entropy(whole[0](X), Y).item(), rel=1e-6)


def test_children_of_later_forks_are_nearer():
    seen = []
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    found = instability(make, train, (0, 39), 40, DATA, "cross_entropy", metrics="accuracy", test=[(X[:40], Y[:40])], pairs=2, points=5,
                        seen=lambda fork, pair, path: seen.append((fork, pair)), progress=False)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()) == before
    assert seen == [(0, 0), (0, 1), (39, 0), (39, 1)]
    assert (found.distances[0] > 5 * found.distances[1]).all()
    assert found.barrier().shape == (2, 2)
    assert np.abs(found.barrier()[1]).max() < np.abs(found.barrier()[0]).max()
    assert found.barrier("mid", of="accuracy", on="train")[0, 1] == found.paths[0][1].barrier("mid", of="accuracy", on="train")
    assert found.onset(threshold=10) == 0
    assert found.onset(threshold=-10) is None
    again = instability(make, train, (39,), 40, DATA, "cross_entropy", pairs=1, points=5, progress=False)
    assert again.paths[0][0].loss == pytest.approx(found.paths[1][0].loss, rel=1e-6)


def test_the_onset_is_after_the_last_unstable_fork():
    def path(height):
        ends = [nn.Linear(1, 1), nn.Linear(1, 1)]
        whole = interpolate(*ends, [torch.ones(1, 1)], lambda found, batch: found.mean() * 0, 3, progress=False)
        whole.values[0, 1, 0] = height
        return whole

    found = Instability((0, 5, 9, 20), 30, tuple((path(h), path(h)) for h in (0.5, 0.0, 0.1, 0.01)), np.zeros((4, 2)))
    assert found.onset(of="loss") == 20
    assert found.onset(0.2, of="loss") == 5
    assert found.onset(0.005, of="loss") is None


def test_an_interrupt_keeps_the_forks_that_are_done():
    def stops(fork, pair, path):
        if (fork, pair) == (10, 0):
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 1 of 3 forks"):
        found = instability(make, train, (5, 10, 20), 40, DATA, "cross_entropy", pairs=2, points=3, seen=stops, progress=False)
    assert found.forks == (5,)
    assert found.distances.shape == (1, 2)


def test_it_is_saved_and_drawn(tmp_path):
    found = instability(make, train, (0, 20), 40, DATA, "cross_entropy", metrics="accuracy", pairs=2, points=3, progress=False)
    back = Instability.load(found.save(tmp_path / "forks.safetensors"))
    assert (back.barrier() == found.barrier()).all()
    assert back.to_frame().columns.tolist() == ["fork", "pair", "distance", "chord", "mean-end", "max-end", "mid"]
    assert len(back.to_frame()) == 4
    assert "2 pairs to step 40" in repr(back)
    figure = back.plot(of="accuracy")
    mean = next(trace for trace in figure.data if trace.name == "mean-end, mean of 2 pairs")
    assert np.array(mean.y) == pytest.approx(found.barrier(of="accuracy").mean(1))
    assert list(mean.x) == ["0", "20"]


def test_wrong_arguments_are_told():
    for forks, told in (((0, 40), "before stop=40"), ((-1,), "forks="), ((), "forks="), ("soon", "forks=")):
        with pytest.raises(cl.CircuitlabError, match=told):
            instability(make, train, forks, 40, DATA, "cross_entropy", progress=False)
    for maker, trainer, told in (
        (lambda: 3, train, "must give a torch.nn.Module, or a tuple that starts with one, and gives int"),
        (lambda: (nn.Linear(6, 3), [1]), train, "gives a list, which has no state_dict"),
        (lambda: nn.Linear(6, 3), lambda model, start, stop, seed: None, "are the same at step 40, though their seeds are not"),
    ):
        with pytest.raises(cl.CircuitlabError, match=told):
            instability(maker, trainer, (0, 5), 40, DATA, "cross_entropy", progress=False)
    with pytest.raises(cl.CircuitlabError, match="pairs=0"):
        instability(make, train, (0,), 40, DATA, "cross_entropy", pairs=0, progress=False)
    with pytest.raises(ZeroDivisionError):
        instability(make, lambda *made, start, stop, seed: 1 / 0, (5,), 40, DATA, "cross_entropy", progress=False)
