"""Answers given without calling torch are torch's own: shape, type and layout."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from circuitlab.trace.shapes import quick

CALLS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "truediv": torch.true_divide,
         "neg": torch.neg, "tril": torch.tril, "triu": torch.triu, "logical_not": torch.logical_not,
         "masked_fill": torch.masked_fill, "rms_norm": F.rms_norm}


def tensors():
    shapes = [(), (4,), (1, 4), (3, 4), (2, 3, 4), (2, 1, 4)]
    types = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
    for shape, dtype in itertools.product(shapes, types):
        yield torch.empty(shape, dtype=dtype, device="meta")
    yield torch.empty(4, 3, device="meta").t()
    yield torch.empty(2, 1, 4, device="meta").expand(2, 3, 4)


def others(name):
    if name in ("neg", "logical_not"):
        return [()]
    if name in ("tril", "triu"):
        return [(), (1,)]
    if name == "masked_fill":
        return [(t, value) for t in tensors() for value in (0.0, float("-inf"), 1)]
    if name == "rms_norm":
        return [((4,),), ([3, 4],), *(((4,), t) for t in tensors())]
    return [(t,) for t in tensors()] + [(2,), (0.5,), (True,), (1j,)]


@pytest.mark.parametrize("name", CALLS)
def test_quick_answers_are_torchs(name):
    answered = 0
    for first, rest in itertools.product(list(tensors()), others(name)):
        found = quick(name, (first, *rest), {})
        if found is None:
            continue
        expected = CALLS[name](first, *rest)
        assert (found.shape, found.dtype, found.stride(), found.device) == (
            expected.shape, expected.dtype, expected.stride(), expected.device), (first, rest)
        answered += 1
    assert answered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("one", "other"), [((16, 8), (3, 8, 24)), ((3, 4, 8), (3, 8, 16)), ((8, 16), (16, 8)), ((3, 4, 8), (8, 16))])
def test_products_of_groups(one, other, dtype):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    offs = None if len(one) == len(other) == 3 else torch.tensor([4, 8, 16], dtype=torch.int32)
    expected = F.grouped_mm(torch.randn(one, dtype=dtype), torch.randn(other, dtype=dtype), offs=offs)
    left, right = torch.empty(one, dtype=dtype, device="meta"), torch.empty(other, dtype=dtype, device="meta")
    found = quick("grouped_mm", (left, right), {"offs": offs if offs is None else offs.to("meta")})
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert quick("grouped_mm", (left, right), {"offs": offs, "out_dtype": torch.float32}) is None
