"""Many evaluations of one model: what plain loops give, from any executor, after any interruption, and no trace of it."""

import multiprocessing
import os
import signal
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import circuitlab as cl
from circuitlab.analysis.batches import weight_of
from circuitlab.analysis.checkpoint import Checkpoint
from circuitlab.analysis.measures import Measures, accuracy
from circuitlab.analysis.results import Result
from circuitlab.analysis.states import Combination, merge, own_state, state_of
from circuitlab.analysis.sweep import Sweep, Sweeper, sweep
from tests.test_hidden_state import Stateful, plain


def net(seed, width=16):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 4))
    model.train()
    for _ in range(5):
        model(torch.randn(40, 6) + 1)
    return model


@pytest.fixture
def setting():
    a, b = net(0), net(1)
    x, y = torch.randn(50, 6) + 1, torch.randint(0, 4, (50,))
    return a, b, list(zip(x.split(16), y.split(16), strict=True))


def line(n=5):
    alphas = np.linspace(0, 1, n)
    return np.stack([1 - alphas, alphas], 1)


def by_hand(a, b, points, batches):
    """Losses and accuracies from a plain loop over state dicts."""
    model, found = net(2).eval(), []
    first, second = a.state_dict(), b.state_dict()
    for row in points.tolist():
        model.load_state_dict({k: torch.lerp(first[k], second[k], row[1]) if first[k].is_floating_point() else first[k] for k in first})
        with torch.no_grad():
            outputs = [(model(x), y) for x, y in batches]
        found.append([sum(float(f(o, y)) * len(y) for o, y in outputs) / sum(len(y) for _, y in outputs)
                      for f in (F.cross_entropy, lambda o, y: (o.argmax(1) == y).double().mean())])
    return np.array(found)


def test_it_is_what_a_plain_loop_gives(setting):
    a, b, batches = setting
    found = sweep(a, Combination.of([a, b]), line(), batches, "cross_entropy", "accuracy")
    assert found.names == ("loss", "accuracy")
    assert found.values[0] == pytest.approx(by_hand(a, b, line(), batches), abs=1e-12)
    assert found.of().shape == (5,)
    assert found.complete
    with pytest.raises(cl.CircuitlabError, match="was not measured; measured are"):
        found.of("precision")


def test_the_ends_are_the_models_bit_for_bit(setting):
    a, b, batches = setting
    with torch.no_grad():
        b[0].weight[0, 0] = float("nan")
    found = sweep(a, Combination.of([a, b]), line(3), batches, "cross_entropy").of()
    x, y = batches[0]
    assert sweep(a, Combination.of([a, b]), line(3), [(x, y)], "cross_entropy").of()[0] == F.cross_entropy(net(0).eval()(x), y).item()
    assert np.isfinite(found).tolist() == [True, False, False]  # what has no weight does not count, and NaN stays where it is
    with torch.no_grad():
        b[0].weight[0, 0], b[4].bias[1] = 0.5, a[4].bias[1]
    middle = merge([a, b], [0.3, 0.7])
    assert middle[4].bias[1] == a[4].bias[1]
    assert all(torch.equal(merge([a, b], [0, 1]).state_dict()[k], t) for k, t in b.state_dict().items() if t.is_floating_point())


def test_nothing_of_the_models_changes(setting):
    a, b, batches = setting
    b.eval()
    before = plain(a), plain(b), torch.get_rng_state()
    family = Combination.of([a, b])

    def fails(output, batch):
        raise ZeroDivisionError

    def stops(at, values):
        raise KeyboardInterrupt

    sweep(a, family, line(), batches, "cross_entropy")
    with pytest.raises(ZeroDivisionError):
        sweep(a, family, line(), batches, fails)
    with pytest.warns(UserWarning, match="interrupted after 1 of 5"):
        sweep(a, family, line(), batches, "cross_entropy", seen=stops)
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        sweep(a, family, line(), batches, fails, executor=pool)
    merge([a, b])
    assert plain(a) == before[0]
    assert plain(b) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert a.training
    assert not b.training


def test_a_model_that_keeps_state_and_draws_gives_the_same_at_every_call():
    a = Stateful()
    before = plain(a)

    def draws(output, batch):
        return output.mean() * 0 + torch.rand(())

    x = torch.randn(8, 4)
    found = [sweep(a, Combination.of([a, a]), points, [x, x + 1], draws).of() for points in (line(), line(3))]
    assert found[0].tolist() == [found[0][0]] * 5  # the same chance at every point
    assert found[0][0] == found[1][0]
    assert plain(a) == before


def test_losses_are_means_over_examples_however_they_are_batched(setting):
    a, b, batches = setting
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    family = Combination.of([a, b])
    whole = sweep(a, family, line(), [(x, y)], "cross_entropy", "accuracy")
    loader = DataLoader(TensorDataset(x, y), 7)
    for given in (list(zip(x.split(3), y.split(3), strict=True)), loader):
        assert sweep(a, family, line(), given, "cross_entropy", "accuracy").values == pytest.approx(whole.values, rel=1e-5)
    parts = sweep(a, family, line(), loader, "cross_entropy", "accuracy")
    streamed = [sweep(a, family, line(), loader, "cross_entropy", "accuracy", room=room) for room in (0, 500, 1e9)]
    assert all((found.values == parts.values).all() for found in streamed)
    y[::3] = -100
    held = sweep(a, family, line(), [(x[:9], y[:9]), (x[9:10], y[9:10]), (x[10:], y[10:])], "cross_entropy", "accuracy")
    keep = y != -100
    assert held.values == pytest.approx(sweep(a, family, line(), [(x[keep], y[keep])], "cross_entropy", "accuracy").values, rel=1e-5)


class Reused:
    """Yields one tensor, which it writes each batch to."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        held = None
        for x, y in self.batches:
            if held is None:
                held = x.clone()
            held.resize_(x.shape).copy_(x)
            yield held, y


def test_batches_are_walked_once_and_not_held_by_their_reader(setting):
    a, b, batches = setting
    walks = []

    class Counted(list):
        def __iter__(self):
            walks.append(1)
            return super().__iter__()

    family = Combination.of([a, b])
    one = sweep(a, family, line(), Counted(batches), "cross_entropy")
    assert len(walks) == 1
    assert (sweep(a, family, line(), Reused(batches), "cross_entropy").values == one.values).all()
    sweeper = Sweeper(a, family, {"train": Counted(batches)}, "cross_entropy")
    sweeper.run(line(3))
    more = sweeper.run(line(5))
    assert len(walks) == 2
    assert (more.values == one.values).all()


def test_sets_of_data_and_metrics_by_name(setting):
    a, b, batches = setting

    def size(output, batch):
        return float(output.abs().mean())

    found = sweep(a, Combination.of([a, b]), line(), {"train": batches[:2], "test": batches[2:]}, "cross_entropy", {"acc": "accuracy", "size": size})
    assert found.names == ("loss", "acc", "size")
    for name, part in (("train", batches[:2]), ("test", batches[2:])):
        alone = by_hand(a, b, line(), part)
        assert found.of("loss", name) == pytest.approx(alone[:, 0], abs=1e-12)
        assert found.of("acc", name) == pytest.approx(alone[:, 1], abs=1e-12)


def test_points_are_told_as_they_are_done(setting):
    a, b, batches = setting
    told = []
    found = sweep(a, Combination.of([a, b]), line()[[0, 4, 2, 2]], {"t": batches}, "cross_entropy", seen=lambda at, values: told.append((at, values)))
    assert [at for at, _ in told] == [0, 1, 2, 3]
    assert [values["t"]["loss"] for _, values in told] == found.of().tolist()


# executors --------------------------------------------------------------------------------------------


def slow(output, batch):
    time.sleep(0.05)
    return F.cross_entropy(output, batch[1])


def test_threads_and_processes_give_the_same(setting):
    a, b, batches = setting
    family = Combination.of([a, b])
    here = sweep(a, family, line(), batches, "cross_entropy", "accuracy")
    with ThreadPoolExecutor(3) as pool:
        assert (sweep(a, family, line(), batches, "cross_entropy", "accuracy", executor=pool).values == here.values).all()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        told = []
        found = sweep(a, family, line(), batches, "cross_entropy", "accuracy", executor=pool, seen=lambda at, values: told.append(at))
        assert (found.values == here.values).all()
        assert sorted(told) == list(range(5))
        again = sweep(a, Combination.of([b, a]), line(), batches, "cross_entropy", "accuracy", executor=pool)  # the same workers, other work
        assert again.values[0] == pytest.approx(here.values[0][::-1], rel=1e-5)
        with pytest.raises(ZeroDivisionError):
            sweep(a, family, line(), batches, _fails, executor=pool)
    with pytest.raises(cl.CircuitlabError, match=r"concurrent.futures.Executor.*get_executor"):
        sweep(a, family, line(), batches, "cross_entropy", executor="dask")


def _fails(output, batch):
    raise ZeroDivisionError


def _dies(output, batch):
    if multiprocessing.parent_process() is not None and float(batch[0].sum()) > 0 and os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(output, batch[1])


def test_a_broken_pool_loses_nothing(setting, monkeypatch):
    a, b, batches = setting
    family = Combination.of([a, b])
    here = sweep(a, family, line(), batches, "cross_entropy")
    monkeypatch.setenv("DIES", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.warns(UserWarning, match="the executor broke"):
            found = sweep(a, family, line(), batches, _dies, executor=pool)
    assert (found.values == here.values).all()


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50) as local:
            with distributed.Client(local) as client:
                yield client


def test_a_dask_cluster_gives_the_same_although_a_worker_is_killed(setting, cluster):
    a, b, batches = setting
    family = Combination.of([a, b])
    here = sweep(a, family, line(9), batches, "cross_entropy")
    pids, killed = cluster.run(os.getpid).values(), []

    def kill(at, values):
        if not killed:
            killed.append(min(pids))
            os.kill(killed[0], signal.SIGKILL)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sweep(a, family, line(9), batches, slow, executor=cluster.get_executor(), seen=kill)
    assert killed
    assert not [w for w in caught if "executor broke" in str(w.message)]  # it went on, on the other worker and on a new one
    assert found.complete
    assert (found.values == here.values).all()
    again = sweep(a, family, line(9), batches, lambda output, batch: F.cross_entropy(output, batch[1]), executor=cluster.get_executor(pure=True))
    assert (again.values == here.values).all()


# files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor])
def test_a_resumed_sweep_is_an_uninterrupted_one(setting, tmp_path, executor):
    a, b, batches = setting
    family, file = Combination.of([a, b]), tmp_path / "sweep.safetensors"
    whole = sweep(a, family, line(9), batches, "cross_entropy", "accuracy")
    told = []

    def stops(at, values):
        told.append(at)
        if len(told) == 4:
            raise KeyboardInterrupt

    options = {"executor": executor(2)} if executor else {}
    with pytest.warns(UserWarning, match=r"of 9 points.*sweep.safetensors"):
        part = sweep(a, family, line(9), batches, "cross_entropy", "accuracy", seen=stops, resume=file, **options)
    assert not part.complete
    assert part.done.sum() >= 4
    assert np.isnan(part.of()[~part.done]).all()
    assert (part.values[:, part.done] == whole.values[:, part.done]).all()
    assert Checkpoint.load(file).done.all(1).sum() == part.done.sum()
    runs = []

    class Counting(nn.Sequential):
        def forward(self, x):
            runs.append(1)
            return super().forward(x)

    counting = Counting(*a)
    found = sweep(counting, family, line(9), batches, "cross_entropy", "accuracy", resume=file, **options)
    assert (found.values == whole.values).all()
    assert len(runs) == (9 - part.done.sum()) * len(batches)
    assert sweep(a, family, line(9), batches, "cross_entropy", "accuracy", resume=str(file)).complete
    assert (sweep(a, family, line(17), batches, "cross_entropy", "accuracy", resume=file).values[:, ::2] == whole.values).all()


def test_a_file_of_another_sweep_is_refused(setting, tmp_path):
    a, b, batches = setting
    file = tmp_path / "sweep.safetensors"
    sweep(a, Combination.of([a, b]), line(), batches, "cross_entropy", resume=file)
    with pytest.raises(cl.CircuitlabError, match="other models"):
        sweep(a, Combination.of([a, net(5)]), line(), batches, "cross_entropy", resume=file)
    with pytest.raises(cl.CircuitlabError, match="other quantities.*'cross_entropy', and is 'cross_entropy, accuracy'"):
        sweep(a, Combination.of([a, b]), line(), batches, "cross_entropy", "accuracy", resume=file)
    with pytest.raises(cl.CircuitlabError, match="batch 1 is not the one"):
        sweep(a, Combination.of([a, b]), line(), [batches[0], batches[2]], "cross_entropy", resume=file)
    with pytest.raises(cl.CircuitlabError, match="other layers"):
        sweep(a, Combination.of([a, b], {"0"}), line(), batches, "cross_entropy", resume=file)
    with pytest.raises(cl.CircuitlabError, match="try 'sweep.safetensors'"):
        sweep(a, Combination.of([a, b]), line(), batches, "cross_entropy", resume=tmp_path / "sweep.json")
    with pytest.raises(cl.CircuitlabError, match="there is no folder"):
        sweep(a, Combination.of([a, b]), line(), batches, "cross_entropy", resume=tmp_path / "no" / "sweep.safetensors")
    sweep(a, Combination.of([a, b]), line(), batches, "cross_entropy").save(tmp_path / "result.safetensors")
    assert isinstance(Result.load(tmp_path / "result.safetensors"), Sweep)
    with pytest.raises(cl.CircuitlabError, match="holds a Sweep, not a Checkpoint"):
        sweep(a, Combination.of([a, b]), line(), batches, "cross_entropy", resume=tmp_path / "result.safetensors")


# models -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("on", torch.tensor(True), persistent=False)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) if labels is not None else None
        return SimpleNamespace(logits=logits, loss=loss)


def test_ties_integers_and_losses_of_language_models():
    torch.manual_seed(0)
    a, b, loose = Tied(), Tied(), Tied(tie=False)
    b.seen += 7
    middle = merge([a, b], [0.4, 0.6])
    assert middle.head.weight is middle.embed.weight
    assert torch.equal(middle.embed.weight, torch.lerp(a.embed.weight, b.embed.weight, 0.6))
    assert (int(middle.seen), int(merge([a, b], [0.5, 0.5]).seen), int(a.seen), int(b.seen)) == (7, 0, 0, 7)
    with pytest.raises(cl.CircuitlabError, match=r"models\[0\] ties 'embed.weight', 'head.weight', and in models\[1\]"):
        merge([a, loose])
    assert not torch.equal(merge([loose, a]).head.weight, merge([loose, a]).embed.weight)
    ids = torch.randint(0, 9, (6, 5))
    labels = ids.clone()
    labels[1, 2:] = -100
    batches = [dict(input_ids=ids[:2], labels=labels[:2]), dict(input_ids=ids[2:], labels=labels[2:])]
    found = sweep(a, Combination.of([a, b]), line(3), batches, None, "accuracy")
    with torch.no_grad():
        logits = b(ids).logits[:, :-1]
    kept = labels[:, 1:] != -100
    assert found.of()[2] == pytest.approx(float(b(ids, labels).loss.detach()), rel=1e-5)
    assert found.of("accuracy")[2] == pytest.approx(float((logits.argmax(-1) == labels[:, 1:])[kept].double().mean()))


def test_models_that_do_not_fit_are_told_apart():
    small, wide, normed = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4)), nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    with pytest.raises(cl.CircuitlabError, match=r"a has no '1.weight', '1.bias'; only models of one"):
        Combination.of([small, normed], names=["a", "b"])
    with pytest.raises(cl.CircuitlabError, match=r"different shapes: '0.weight' \[3, 2\] and \[4, 2\]"):
        Combination.of([small, wide])
    with pytest.raises(cl.CircuitlabError, match=r"different types: '0.weight' torch.float32 and torch.float64"):
        Combination.of([small, nn.Sequential(nn.Linear(2, 3)).double()])
    with pytest.raises(cl.CircuitlabError, match="compute differently: '1' is a ReLU and a GELU"):
        Combination.of([nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(2, 3), nn.GELU())])
    with pytest.raises(cl.CircuitlabError, match="has no numbers in '0.weight'"):
        Combination.of([nn.Sequential(nn.LazyLinear(3))] * 2)
    with pytest.raises(cl.CircuitlabError, match="must be a torch.nn.Module, and is a dict"):
        Combination.of([small, dict(small.state_dict())])
    with pytest.raises(cl.CircuitlabError, match="layers: .*no layer '0.wait'; did you mean '0.weight'"):
        Combination.of([small, small], {"0.wait"})
    with pytest.raises(cl.CircuitlabError, match="layers is empty"):
        Combination.of([small, small], set())
    with pytest.raises(cl.CircuitlabError, match="one finite number for each of the 2"):
        merge([small, small], [1.0])


def test_sums_of_many_and_of_halves():
    models = [net(seed) for seed in range(3)]
    made = merge(models, [0.2, -0.5, 2.0])
    expected = sum(w * m[0].weight for w, m in zip((0.2, -0.5, 2.0), models, strict=True))
    assert torch.allclose(made[0].weight, expected)
    assert made.training
    half = [nn.Linear(3, 3).bfloat16() for _ in range(3)]
    expected = sum(m.weight.float() for m in half) / 3
    assert torch.equal(merge(half).weight, expected.bfloat16())
    part = merge(models, layers="4")
    assert torch.equal(part[0].weight, models[0][0].weight)
    assert torch.allclose(part[4].weight, sum(m[4].weight for m in models) / 3)


def test_directions_may_lack_names(setting):
    a, _, batches = setting
    step = torch.randn_like(a[0].weight)
    family = Combination([state_of(a), {"0.weight": step}])
    found = sweep(a, family, [[1, 0], [1, 0.5], [1, 2]], batches, "cross_entropy").of()
    for at, size in enumerate((0, 0.5, 2)):
        moved = merge([a])
        with torch.no_grad():
            moved[0].weight += size * step
        moved.eval()
        loss = sum(F.cross_entropy(moved(x), y).item() * len(y) for x, y in batches) / 50
        assert found[at] == pytest.approx(loss, rel=1e-6)
    with pytest.raises(cl.CircuitlabError, match=r"of shape \(points, 2\)"):
        sweep(a, family, [[1, 0, 0]], batches, "cross_entropy")


# ways and measures ------------------------------------------------------------------------------------


def test_stacked_points_are_what_the_loop_gives(setting):
    a, b, batches = setting
    family = Combination.of([a, b])
    loop = sweep(a, family, line(7), batches, "cross_entropy", "accuracy")
    stacked = sweep(a, family, line(7), batches, "cross_entropy", "accuracy", way="vmap:3")
    assert stacked.values == pytest.approx(loop.values, rel=1e-5)
    assert (loop.way, stacked.way) == ("loop", "vmap:3")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", [None, "loop", "graph", "vmap:4"])
def test_on_a_gpu(setting, way):
    a, b, batches = setting
    here = sweep(a, Combination.of([a, b]), line(9), batches, "cross_entropy", "accuracy")
    a, b = merge([a]).cuda(), merge([b]).cuda()
    there = sweep(a, Combination.of([a, b]), line(9), batches, "cross_entropy", "accuracy", way=way)
    assert there.values == pytest.approx(here.values, rel=1e-4)


def test_memory_does_not_grow_with_the_points(setting):
    a, b, batches = setting
    alive = []

    def count(output, batch):
        import gc

        alive.append(sum(isinstance(thing, nn.Module) for thing in gc.get_objects()))
        return F.cross_entropy(output, batch[1])

    sweep(a, Combination.of([a, b]), line(12), batches[:1], count)
    assert len(set(alive)) == 1


def test_accuracy_of_all_shapes():
    logits, target = torch.randn(5, 3, 4), torch.randint(0, 4, (5, 3))
    right = (logits.argmax(-1) == target).double().mean()
    assert accuracy(logits, (0, target)) == pytest.approx(float(right))
    assert accuracy(logits.transpose(1, 2), (0, target)) == pytest.approx(float(right))
    assert accuracy(logits[:, 0], (0, F.one_hot(target[:, 0], 4).float())) == pytest.approx(float((logits[:, 0].argmax(-1) == target[:, 0]).double().mean()))
    with pytest.raises(cl.CircuitlabError, match=r"outputs of shape \(5, 3, 4\) and targets of shape \(2,\)"):
        accuracy(logits, (0, torch.zeros(2, dtype=torch.long)))
    with pytest.raises(cl.CircuitlabError, match="accuracy needs a target"):
        accuracy(logits, logits)


def test_what_cannot_be_measured_is_told(setting):
    a, b, batches = setting
    family = Combination.of([a, b])
    for options, match in (
        (dict(loss="hinge"), "loss='hinge' is not known"),
        (dict(loss="cross_entropy", metrics="precision"), "'precision' is 'precision'; give 'accuracy' or functions"),
        (dict(loss="cross_entropy", metrics=[accuracy, accuracy]), "two of one name"),
        (dict(loss=lambda output, batch: output), r"the loss gives a tensor of shape \[16, 4\]; give the mean"),
    ):
        with pytest.raises(cl.CircuitlabError, match=match):
            sweep(a, family, line(), batches, **options)
    with pytest.raises(cl.CircuitlabError, match="walked only once"):
        sweep(a, family, line(), iter(batches), "cross_entropy")
    with pytest.raises(cl.CircuitlabError, match="the train batches are empty"):
        sweep(a, family, line(), [], "cross_entropy")
    assert Measures("cross_entropy").weights(batches[0]) == [weight_of("cross_entropy", batches[0])]
    assert set(own_state(a)) == set(a.state_dict())
