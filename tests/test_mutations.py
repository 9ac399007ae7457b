"""Broken rules: verify notices them. Each mutant changes what one rule says of one op, and all else stays.

A mutant is applied where the tracer looks its rules up, so that it goes through everything that a true rule goes
through. It counts only if it says something else than the rule does.
"""

import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import circuitlab as cl
from circuitlab.trace import rules
from circuitlab.trace.rules.pattern import Letter, Pattern

PASSING = {"broadcast", "diagonal"}
TESTED = PASSING | {"contracted", "reduced", "normalised", "created"}


class Once(nn.Module):
    """A function as a module."""

    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def x(*shape):
    return torch.randn(*shape)


# function, inputs, parameters. Equal sizes, where the function allows it: only identity tells axes apart
CASES = {
    "relu": (torch.relu, [x(3, 3)], []),
    "add": (torch.add, [x(3, 3), x(3, 3)], []),
    "mul_broadcast": (torch.mul, [x(3, 3), x(3)], []),
    "where": (lambda a, b: torch.where(a > 0, a, b), [x(3, 3), x(3, 3)], []),
    "lerp": (torch.lerp, [x(3, 3), x(3, 3), x(3, 3)], []),
    "sum": (lambda a: a.sum(1), [x(3, 3, 3)], []),
    "mean_keepdim": (lambda a: a.mean(0, keepdim=True), [x(3, 3)], []),
    "amax": (lambda a: a.amax((0, 2)), [x(3, 3, 3)], []),
    "max": (lambda a: a.max(1).values, [x(3, 3)], []),
    "argmin": (lambda a: a.argmin(0), [x(4, 4)], []),
    "logsumexp": (lambda a: a.logsumexp(-1), [x(3, 3)], []),
    "var": (lambda a: a.var(1), [x(3, 3)], []),
    "norm": (lambda a: a.norm(dim=0), [x(3, 3)], []),
    "softmax": (lambda a: a.softmax(1), [x(3, 3)], []),
    "log_softmax": (lambda a: a.log_softmax(0), [x(3, 3)], []),
    "layer_norm": (lambda a, w, b: F.layer_norm(a, (3,), w, b), [x(3, 3)], [x(3), x(3)]),
    "rms_norm": (lambda a, w: F.rms_norm(a, (3,), w), [x(3, 3)], [x(3)]),
    "group_norm": (lambda a, w, b: F.group_norm(a, 1, w, b), [x(4, 4, 4)], [x(4), x(4)]),
    "batch_norm": (lambda a, m, v, w, b: F.batch_norm(a, m, v.abs(), w, b), [x(3, 3)], [x(3), x(3), x(3), x(3)]),
    "instance_norm": (F.instance_norm, [x(3, 3, 3)], []),
    "normalize": (lambda a: F.normalize(a, dim=1), [x(3, 3)], []),
    "cumsum": (lambda a: a.cumsum(1), [x(3, 3)], []),
    "flip": (lambda a: a.flip(0), [x(3, 3)], []),
    "roll": (lambda a: a.roll(1, 1), [x(3, 3)], []),
    "sort": (lambda a: a.sort(1).values, [x(3, 3)], []),
    "topk": (lambda a: a.topk(2, 0).values, [x(3, 3)], []),
    "tril": (lambda a: a.tril(), [x(3, 3, 3)], []),
    "linear": (F.linear, [x(3, 3)], [x(3, 3), x(3)]),
    "matmul": (torch.matmul, [x(3, 3, 3), x(3, 3, 3)], []),
    "bmm": (torch.bmm, [x(3, 3, 3), x(3, 3, 3)], []),
    "addmm": (torch.addmm, [x(3, 3), x(3, 3), x(3, 3)], []),
    "einsum": (lambda a, b: torch.einsum("ijk,kl->ilj", a, b), [x(3, 3, 3), x(3, 3)], []),
    "outer": (torch.outer, [x(3), x(3)], []),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([0], [1])), [x(3, 3), x(3, 3)], []),
    "bilinear": (F.bilinear, [x(3, 3), x(3, 3)], [x(3, 3, 3), x(3)]),
    "cdist": (torch.cdist, [x(3, 3), x(3, 3)], []),
    "cosine": (lambda a, b: F.cosine_similarity(a, b, dim=0), [x(3, 3), x(3, 3)], []),
    "transpose": (lambda a: a.transpose(0, 2), [x(3, 3, 3)], []),
    "permute": (lambda a: a.permute(2, 0, 1), [x(3, 3, 3)], []),
    "movedim": (lambda a: a.movedim(0, 2), [x(3, 3, 3)], []),
    "view": (lambda a: a.view(3, 9), [x(3, 3, 3)], []),
    "unflatten": (lambda a: a.unflatten(1, (2, 2)), [x(4, 4)], []),
    "expand": (lambda a: a[:, None].expand(3, 3, 3), [x(3, 3)], []),
    "repeat": (lambda a: a.repeat(2, 2), [x(2, 2)], []),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 1), [x(2, 2)], []),
    "cat": (lambda a, b: torch.cat([a, b], 1), [x(3, 3), x(3, 3)], []),
    "stack": (lambda a, b: torch.stack([a, b], 1), [x(3, 3), x(3, 3)], []),
    "chunk": (lambda a: a.chunk(2, 1), [x(4, 6)], []),
    "split": (lambda a: a.split([2, 4], 0), [x(6, 6)], []),
    "glu": (lambda a: F.glu(a, 0), [x(6, 6)], []),
    "select": (lambda a: a.select(1, 1), [x(3, 3)], []),
    "slice": (lambda a: a[1:], [x(4, 4)], []),
    "getitem": (lambda a, i: a[i], [x(4, 4), torch.tensor([3, 1, 0, 2])], []),
    "index_select": (lambda a, i: a.index_select(1, i), [x(4, 4), torch.tensor([3, 1, 0, 2])], []),
    "gather": (lambda a, i: a.gather(1, i), [x(3, 3), torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0]])], []),
    "scatter_add": (lambda a, i: torch.zeros(3, 3).scatter_add(1, i, a),
                    [x(3, 3), torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0]])], []),
    "embedding": (F.embedding, [torch.tensor([[0, 2, 1], [1, 2, 0], [2, 0, 1]])], [x(3, 3)]),
    "setitem": (lambda a, b: a.clone().index_fill_(0, torch.tensor([1]), 2.0) + b, [x(3, 3), x(3, 3)], []),
    "pad": (lambda a: F.pad(a, (1, 1)), [x(3, 3)], []),
    "conv1d": (F.conv1d, [x(3, 3, 5)], [x(3, 3, 3), x(3)]),
    "conv_groups": (lambda a, w: F.conv1d(a, w, groups=3), [x(3, 3, 5)], [x(3, 1, 3)]),
    "conv_transpose": (F.conv_transpose1d, [x(3, 3, 5)], [x(3, 3, 3)]),
    "conv_pointwise": (F.conv1d, [x(3, 3, 3)], [x(3, 3, 1)]),
    "max_pool": (lambda a: F.max_pool1d(a, 2), [x(3, 3, 6)], []),
    "avg_pool": (lambda a: F.adaptive_avg_pool1d(a, 1), [x(3, 3, 3)], []),
    "interpolate": (lambda a: F.interpolate(a, scale_factor=2), [x(3, 3, 3)], []),
    "fft": (lambda a: torch.fft.fft(a, dim=0).real, [x(3, 3)], []),
    "mse_loss": (F.mse_loss, [x(3, 3), x(3, 3)], []),
    "inverse": (lambda a: torch.linalg.inv(a + 4 * torch.eye(3)), [x(3, 3, 3)], []),
    "diagonal": (lambda a: a.diagonal(dim1=0, dim2=2), [x(3, 3, 3)], []),
    "kron": (torch.kron, [x(2, 2), x(2, 2)], []),
    "lstm_cell": (lambda a, h, c, w, u: torch.lstm_cell(a, (h, c), w, u)[0], [x(3, 3), x(3, 3), x(3, 3)],
                  [x(12, 3), x(12, 3)]),
}


def letters_of(pattern):
    """Distinct letters of a pattern, with the places that they stand at."""
    found = {}
    for side, arrays in (("in", list(pattern.ins.items())), ("out", list(enumerate(pattern.outs)))):
        for number, slots in arrays:
            for dim, letters in enumerate(slots):
                for letter in letters:
                    found.setdefault(id(letter), (letter, []))[1].append((side, number, dim))
    return list(found.values())


def size(letter):
    total = 1
    for atom in letter.atoms:
        total *= atom.size
    return total


def strengthened(rng, w, pattern):
    """An axis that is acted on passes."""
    # what is created by a weight passes over the weight's rows: that would be true
    acted = [letter for letter, places in letters_of(pattern)
             if letter.role not in (*PASSING, "created") and {side for side, *_ in places} == {"in", "out"} and size(letter) > 1]
    if not acted:
        return False
    rng.choice(acted).role = "broadcast"
    return True


def claimed_alike(rng, w, pattern):
    """An axis whose positions matter is said to be one whose indices are alike."""
    if pattern.kind == "sort":
        return False  # what comes out sorted does not depend on the order of what went in
    acted = [letter for letter, places in letters_of(pattern) if letter.role in ("ordered", "indexed", "gathered")
             and {side for side, *_ in places} != {"out"} and size(letter) > 1]
    if not acted:
        return False
    letter = rng.choice(acted)
    letter.role = "normalised" if any(side == "out" for l, places in letters_of(pattern) if l is letter
                                      for side, *_ in places) else "reduced"
    return True


def swapped(rng, w, pattern):
    """Two dimensions of one result, or of one operand, change places."""
    choices = []
    for slots in (*pattern.outs, *pattern.ins.values()):
        for i in range(len(slots)):
            for j in range(i):
                a, b = slots[i], slots[j]
                tested = any(letter.role in TESTED for letter in (*a, *b))
                if a and b and [size(l) for l in a] == [size(l) for l in b] and tested and a[0] is not b[0]:
                    choices.append((slots, i, j))
    if not choices:
        return False
    slots, i, j = rng.choice(choices)
    slots[i], slots[j] = slots[j], slots[i]
    return True


def merged(rng, w, pattern):
    """Two axes of one size are said to be one."""
    found = [(letter, places) for letter, places in letters_of(pattern) if letter.role in TESTED and size(letter) > 1]
    pairs = [(a, b) for a, pa in found for b, pb in found if a is not b and size(a) == size(b)
             and not {p[:2] for p in pa} & {p[:2] for p in pb}]  # not twice in one array
    pairs = pairs or [(a, b) for a, pa in found for b, pb in found if a is not b and size(a) == size(b)]
    if not pairs:
        return False
    keep, gone = rng.choice(pairs)
    w.unify(keep.atoms, gone.atoms)
    for slots in (*pattern.outs, *pattern.ins.values()):
        for dim, letters in enumerate(slots):
            slots[dim] = [keep if letter is gone else letter for letter in letters]
    keep.role = "diagonal" if {keep.role, gone.role} & PASSING else keep.role
    return True


def omitted(rng, w, pattern):
    """One operand's axis is said to have nothing to do with the others: it is summed up."""
    choices = [(letter, slots, dim) for letter, places in letters_of(pattern) if letter.role in TESTED and len(places) > 1
               for slots in pattern.ins.values() for dim, letters in enumerate(slots) if letters == [letter]]
    if not choices:
        return False
    letter, slots, dim = rng.choice(choices)
    slots[dim] = [Letter("reduced", list(letter.atoms))]
    return True


def taken_from_another(rng, w, pattern):
    """The result is said to have the axes of an operand, in order, as an elementwise function has."""
    for slots in rng.sample(list(pattern.ins.values()), len(pattern.ins)):
        for number, out in enumerate(pattern.outs):
            same = [[size(l) for l in a] == [size(l) for l in b] for a, b in zip(slots, out)]
            if len(slots) == len(out) and all(same) and any(a and a[0] is not b[0] for a, b in zip(slots, out)):
                pattern.outs[number] = list(slots)
                for letters in slots:
                    for letter in letters:
                        letter.role = "broadcast"
                return True
    return False


MUTATIONS = [strengthened, claimed_alike, swapped, merged, omitted, taken_from_another]


def signature(circuit):
    return [(op.kind, sorted((a.role, a.ins, a.outs) for a in op.axes)) for op in circuit.ops]


@functools.cache
def true_circuit(name):
    function, inputs, weights = CASES[name]
    torch.manual_seed(0)
    model = Once(function, *weights)
    circuit = cl.trace(model, *inputs, device="live")
    assert circuit.verify(model, *inputs).ok
    return model, inputs, circuit


def mutant_is_found(name, mutation, seed, monkeypatch):
    """Whether verify notices a mutant; None where there is none."""
    model, inputs, circuit = true_circuit(name)
    targets = [op for op in circuit.ops if op.kind not in ("create", "random")]
    rng = random.Random(f"{name} {mutation.__name__} {seed}")
    target = rng.choice(targets).name
    apply, done = rules.apply, []

    def mutating(w, event):
        pattern = apply(w, event)
        if event.name == target and isinstance(pattern, Pattern):
            done.append(mutation(rng, w, pattern))
        return pattern

    with monkeypatch.context() as patch:
        patch.setattr(rules, "apply", mutating)
        mutant = cl.trace(model, *inputs, device="live")
    if done != [True] or signature(mutant) == signature(circuit):
        return None
    return not mutant.verify(model, *inputs).ok


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_verify_notices_broken_rules(mutation, monkeypatch):
    torch.manual_seed(0)
    found = {name: mutant_is_found(name, mutation, 0, monkeypatch) for name in CASES}
    tried = [name for name, result in found.items() if result is not None]
    missed = [name for name in tried if not found[name]]
    assert len(tried) >= 10
    assert len(missed) <= 0.05 * len(tried), f"{len(missed)} of {len(tried)} not noticed: {missed}"
