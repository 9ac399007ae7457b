"""Elementwise functions, reductions, and functions that normalise."""

from __future__ import annotations

from typing import Any

import torch

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules.pattern import (
    Letter,
    NoRuleError,
    Pattern,
    axes_of,
    axis_of,
    elementwise,
    set_role,
)
from circuitlab.trace.wires import ClashError, Wires

POINTWISE = frozenset(
    """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh
    atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu
    clamp clamp_max clamp_min clip conj_physical copysign cos cosh deg2rad digamma div divide elu eq erf erfc
    erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac ge gelu gcd greater
    greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac isclose isfinite isinf
    isnan isneginf isposinf isreal lcm ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp
    logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid lshift lt masked_fill maximum minimum mish
    mod mul multiply mvlgamma nan_to_num ne neg negative nextafter not_equal polar polygamma pow rad2deg radd
    rdiv rfloordiv reciprocal relu relu6 remainder rlshift rmod rmul round rpow rrshift rshift rsqrt rsub rtruediv selu
    sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign special_digamma special_entr special_erf
    special_erfc special_erfinv special_exp2 special_expit special_expm1 special_gammaln special_log1p special_logit
    special_xlogy special_xlog1py special_i0 special_i0e special_i1 special_i1e special_ndtr special_ndtri special_log_ndtr
    sqrt square sub subtract tan tanh tanhshrink threshold true_divide truediv trunc where xlogy and or xor invert
    log_sigmoid special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
    special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
    special_chebyshev_polynomial_w special_hermite_polynomial_h special_hermite_polynomial_he
    special_laguerre_polynomial_l special_legendre_polynomial_p special_modified_bessel_i0 special_modified_bessel_i1
    special_modified_bessel_k0 special_modified_bessel_k1 special_scaled_modified_bessel_k0
    special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_zeta special_erfcx special_polygamma
    special_round special_sinc special_psi special_multigammaln special_gammainc special_gammaincc
    special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
    special_shifted_chebyshev_polynomial_w
    ror rxor complex real imag conj copy masked_fill dequantize nan_to_num zero fill
    """.split()
)
"""Functions that treat every entry alike, broadcasting their operands."""

RANDOM = frozenset("dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d feature_dropout "
                   "bernoulli rrelu normal uniform exponential random geometric log_normal cauchy "
                   "rand_like randn_like randint_like poisson".split())


def _scalars(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    return {"scalar": numbers[0]} if len(numbers) == 1 else {}


def pointwise(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """Entry by entry."""
    pattern = elementwise(w, event, event.operands, event.outs[0].shape, apart=True, **_scalars(args, kwargs))
    for name in ("negative_slope", "approximate", "alpha", "min", "max"):
        if isinstance(kwargs.get(name), (int, float, str)):
            pattern.attrs[name] = kwargs[name]
    return pattern


def like(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """zeros_like and friends: the axes of the operand, none of its values."""
    return elementwise(w, event, [input], event.outs[0].shape, "create")


def random(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """Random numbers drawn for each entry alike: as a distribution, the same for each index (dropout, noise)."""
    training = kwargs.get("training", kwargs.get("train"))
    if training is None and "dropout" in event.fn:
        flags = [a for a in args if isinstance(a, bool)]
        training = flags[0] if flags else True
    if training is False:
        pattern = elementwise(w, event, event.operands[:1], event.outs[0].shape, "elementwise", active=False)
        return pattern
    return elementwise(w, event, event.operands, event.outs[0].shape, "random")


def prelu(w: Wires, event: Event, input: Operand, weight: Operand) -> Pattern:
    """One slope, or one for each channel (dimension 1)."""
    pattern = Pattern("elementwise")
    slots = pattern.take(input)
    own = pattern.take(weight)
    if weight.ndim and own[0]:
        w.unify(input.dims[1], weight.dims[0])
        slots[1][0].role = "diagonal"
        pattern.ins[weight.slot] = [slots[1]]
    pattern.out(slots)
    return pattern


def reduce(
    w: Wires, event: Event, input: Operand, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any
) -> Pattern:
    """A sum, mean, maximum ... over dimensions."""
    if isinstance(dim, Operand):
        # max(a, b), min(a, b): entry by entry
        return elementwise(w, event, event.operands, event.outs[0].shape)
    if isinstance(dim, bool):
        dim = None
    if args and isinstance(args[-1], bool) and event.outs and len(event.outs[0].shape) == input.ndim:
        keepdim = True
    axes = axes_of(dim, input.ndim)
    keepdim = keepdim or (len(event.outs[0].shape) == input.ndim and bool(axes) and input.ndim > 0)
    order = len(event.outs) > 1 and event.fn in ("max", "min", "median", "nanmedian", "mode", "kthvalue")
    role = "ordered" if order or event.fn in ("argmax", "argmin") else "reduced"
    pattern = Pattern("reduce", dim=dim if isinstance(dim, int) else None)
    if order:
        pattern.attrs["indices"] = True
    slots = pattern.take(input)
    out: list[list[Letter]] = []
    for axis, letters in enumerate(slots):
        if axis in axes:
            set_role(letters, role)
            if keepdim:
                out.append([])
        else:
            out.append(letters)
    for _ in event.outs:
        pattern.out(out)
    return pattern


def ordered_reduce(
    w: Wires, event: Event, input: Operand, order: Any = None, dim: Any = None, keepdim: bool = False, *args: Any,
    **kwargs: Any,
) -> Pattern:
    """Norms, quantiles, k-th values: the argument before the dimension says which."""
    several = [operand for operand in event.operands if operand.slot != input.slot and operand.ndim]
    if event.fn == "kthvalue" and dim is None:
        dim = -1
    pattern = reduce(w, event, input, dim, keepdim=keepdim or len(event.outs[0].shape) - len(several) == input.ndim > 0)
    if several:  # quantiles: the first dimension of the result
        pattern.outs[0].insert(0, pattern.take(several[0])[0])
    return pattern


def softmax(w: Wires, event: Event, input: Operand, dim: Any = None, *args: Any, **kwargs: Any) -> Pattern:
    """Softmax and its kin: each index sees the others along one dimension, alike."""
    if dim is None:
        dim = 0 if input.ndim in (0, 1, 3) else 1
    return _along(event, input, axes_of(dim, input.ndim), "softmax", "normalised")


def _along(event: Event, input: Operand, axes: list[int], kind: str, role: str) -> Pattern:
    pattern = Pattern(kind)
    slots = pattern.take(input)
    for axis in axes:
        set_role(slots[axis], role)
    for _ in event.outs:
        pattern.out(slots)
    return pattern


def scan(w: Wires, event: Event, input: Operand, dim: Any = None, *args: Any, **kwargs: Any) -> Pattern:
    """Cumulative sums, flips, rolls: positions matter along a dimension, the axis stays."""
    if event.fn == "roll":
        dim = kwargs.get("dims", args[0] if args else None)
    elif event.fn == "flip":
        dim = kwargs.get("dims", dim if not args else (dim, *args))
    elif event.fn in ("fliplr", "flipud"):
        dim = 1 if event.fn == "fliplr" else 0
    return _along(event, input, axes_of(dim, input.ndim), "scan", "ordered")


def order(w: Wires, event: Event, input: Operand, *args: Any, dim: int = -1, **kwargs: Any) -> Pattern:
    """sort, topk: the axis ends, and a new one begins whose order has a meaning."""
    if event.fn == "msort":
        dim = 0
    elif event.fn == "topk":
        dim = args[1] if len(args) > 1 else dim
    elif args and isinstance(args[0], int) and not isinstance(args[0], bool):
        dim = args[0]
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("sort")
    slots = pattern.take(input)
    set_role(slots[axis], "ordered")
    out = list(slots)
    out[axis] = pattern.new(w, event.outs[0].shape[axis], "ordered", "sorted", event.name)
    for _ in event.outs:
        pattern.out(out)
    return pattern


def triangle(w: Wires, event: Event, input: Operand, diagonal: int = 0) -> Pattern:
    """tril, triu: rows and columns are compared by position."""
    return _along(event, input, [input.ndim - 2, input.ndim - 1], "elementwise", "ordered")


def layer_norm(
    w: Wires,
    event: Event,
    input: Operand,
    normalized_shape: Any,
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float | None = None,
    *args: Any,
) -> Pattern:
    """Normalise over the last dimensions (layer_norm, rms_norm); weight and bias sit on them."""
    count = len(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else 1
    pattern = _along(event, input, list(range(input.ndim - count, input.ndim)), "norm", "normalised")
    slots = pattern.ins[input.slot]
    for parameter in (weight, bias):
        if isinstance(parameter, Operand):
            for own, dim in zip(parameter.dims, input.dims[-count:], strict=True):
                w.unify(own, dim)
            pattern.ins[parameter.slot] = slots[-count:]
    return pattern


def batch_norm(
    w: Wires,
    event: Event,
    input: Operand,
    running_mean: Operand | None = None,
    running_var: Operand | None = None,
    weight: Operand | None = None,
    bias: Operand | None = None,
    training: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Pattern:
    """Batch norm: with running statistics an affine map for each channel, in training normalised over the others."""
    if event.fn == "instance_norm":
        training = True
    elif isinstance(running_mean, bool):
        raise NoRuleError
    return _per_channel(w, event, input, (running_mean, running_var, weight, bias), training)


def native_batch_norm(w: Wires, event: Event, input: Operand, weight: Any, bias: Any, mean: Any, var: Any,
                      training: bool = False, *args: Any, **kwargs: Any) -> Pattern:
    """``torch.batch_norm``, whose parameters come in another order."""
    return _per_channel(w, event, input, (mean, var, weight, bias), training or event.fn == "instance_norm")


def _per_channel(w: Wires, event: Event, input: Operand, parameters: tuple[Any, ...], training: bool) -> Pattern:
    pattern = Pattern("norm", training=training)
    slots = pattern.take(input)
    for parameter in parameters:
        if isinstance(parameter, Operand):
            w.unify(input.dims[1], parameter.dims[0])
            pattern.ins[parameter.slot] = [slots[1]]
            set_role(slots[1], "diagonal")
    if training:
        for axis, letters in enumerate(slots):
            if axis != 1 and (axis > 1 or event.fn != "instance_norm"):
                set_role(letters, "normalised")
    pattern.out(slots)
    return pattern


def group_norm(
    w: Wires,
    event: Event,
    input: Operand,
    num_groups: int,
    weight: Operand | None = None,
    bias: Operand | None = None,
    *args: Any,
    **kwargs: Any,
) -> Pattern:
    """Normalise groups of channels with all positions: channels are (groups)(channels of a group).

    Where the channel axis cannot be such a product, it is pinned.
    """
    pattern = Pattern("norm", groups=num_groups)
    slots = pattern.take(input)
    channels = input.shape[1]
    if num_groups in (1, channels):
        set_role(slots[1], "normalised" if num_groups == 1 else "diagonal")
    else:
        mark = w.mark()
        try:
            groups, within = w.regroup([input.dims[1]], [num_groups, channels // num_groups])
            slots[1] = [*(Letter("diagonal", [atom]) for atom in groups), *(Letter("normalised", [atom]) for atom in within)]
        except ClashError:
            w.rollback(mark)
            set_role(slots[1], "ordered")
    for parameter in (weight, bias):
        if isinstance(parameter, Operand):
            w.unify(input.dims[1], parameter.dims[0])
            pattern.ins[parameter.slot] = [slots[1]]
    for letters in slots[2:]:
        set_role(letters, "normalised")
    pattern.out(slots)
    return pattern


def normalize(w: Wires, event: Event, input: Operand, p: Any = 2.0, dim: Any = 1, *args: Any, **kwargs: Any) -> Pattern:
    """Divide by the norm along a dimension."""
    return _along(event, input, axes_of(dim, input.ndim), "norm", "normalised")


def weight_norm(w: Wires, event: Event, v: Operand, g: Operand, dim: int = 0) -> Pattern:
    """v · g / |v|, with one g for each index of a dimension."""
    pattern = Pattern("norm")
    slots = pattern.take(v, "normalised")
    axis = axis_of(dim, v.ndim)
    w.unify(v.dims[axis], g.dims[axis] if g.ndim == v.ndim else g.dims[0])
    set_role(slots[axis], "diagonal")
    pattern.ins[g.slot] = [slots[axis] if dims else [] for dims in g.dims]
    pattern.out(slots)
    return pattern


def local_response_norm(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Channels see their neighbours."""
    return _along(event, input, [1], "norm", "ordered")


def loss(w: Wires, event: Event, input: Operand, target: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """A loss between arrays of one shape, reduced unless asked otherwise."""
    full = _broadcast(*event.operands)
    pattern = elementwise(w, event, event.operands, full, "reduce")
    if event.outs[0].shape != tuple(full):
        if event.outs[0].shape:
            raise NoRuleError
        for column in pattern.outs[0]:
            set_role(column, "reduced")
        pattern.outs = [[]]
    return pattern


def _broadcast(*operands: Operand) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(operand.shape for operand in operands)))


def row_loss(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """A loss between vectors, with or without a batch: the last dimension is contracted, the first reduced if asked."""
    vectors = [operand for operand in event.operands if operand.ndim == event.operands[0].ndim]
    pattern = elementwise(w, event, vectors, _broadcast(*vectors), "reduce")
    columns = pattern.outs[0]
    for operand in event.operands:
        if operand not in vectors:  # a label for each pair of vectors
            for letters, dim in zip(columns, operand.dims, strict=False):
                w.unify(letters[0].atoms if letters else [], dim)
            pattern.ins[operand.slot] = [columns[n] if dim else [] for n, dim in enumerate(operand.dims)]
    set_role(columns[-1], "contracted")
    return _reduced_loss(event, pattern, columns[:-1])


def cross_entropy(w: Wires, event: Event, input: Operand, target: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Class scores (dimension 1, or 0 without a batch) against class numbers, or against as many probabilities."""
    classes = 1 if input.ndim > 1 else 0
    pattern = Pattern("reduce")
    slots = pattern.take(input)
    set_role(slots[classes], "gathered")
    for operand in event.operands:
        if operand.slot not in (input.slot, target.slot):  # a weight for each class
            w.unify(input.dims[classes], operand.dims[0])
            pattern.ins[operand.slot] = [slots[classes]]
    if target.ndim == input.ndim:
        set_role(slots[classes], "contracted")
        for letters, one, other in zip(slots, input.dims, target.dims, strict=True):
            w.unify(one, other)
            if letters is not slots[classes]:
                set_role(letters, "diagonal")
        pattern.ins[target.slot] = list(slots)
        rest = [letters for letters in slots if letters is not slots[classes]]
        return _reduced_loss(event, pattern, rest)
    rest = [letters for axis, letters in enumerate(slots) if axis != classes]
    for letters, dim, axis in zip(rest, target.dims, [a for a in range(input.ndim) if a != classes], strict=True):
        w.unify(input.dims[axis], dim)
        set_role(letters, "diagonal")
    pattern.ins[target.slot] = [letters if dim else [] for letters, dim in zip(rest, target.dims, strict=True)]
    return _reduced_loss(event, pattern, rest)


def _reduced_loss(event: Event, pattern: Pattern, rest: list[list[Letter]]) -> Pattern:
    """A loss for each index of what is left, or reduced over all."""
    if event.outs[0].shape:
        pattern.out(rest)
    else:
        for letters in rest:
            set_role(letters, "reduced")
        pattern.outs = [[]]
    return pattern


def glu(w: Wires, event: Event, input: Operand, dim: int = -1) -> Pattern:
    """a · σ(b) for the two halves a, b of a dimension."""
    axis = axis_of(dim, input.ndim)
    half = input.shape[axis] // 2
    first, second = w.slice(input.dims[axis], 0, half), w.slice(input.dims[axis], half, 2 * half)
    w.unify(first, second)
    pattern = Pattern("elementwise")
    slots = pattern.take(input)
    set_role(slots[axis], "joined")
    out = list(slots)
    out[axis] = [Letter("joined", first)] if first else []
    pattern.out(out)
    return pattern


def similarity(
    w: Wires, event: Event, x1: Operand, x2: Operand, dim: int | None = None, *args: Any, **kwargs: Any
) -> Pattern:
    """cosine_similarity, pairwise_distance: two arrays compared along one dimension."""
    if event.fn == "pairwise_distance":
        dim = -1
    elif dim is None:
        dim = 1
    shape = _broadcast(x1, x2)
    axis = axis_of(dim, len(shape))
    pattern = elementwise(w, event, [x1, x2], shape, "contract")
    columns = pattern.outs[0]
    set_role(columns[axis], "contracted")
    keep = len(event.outs[0].shape) == len(shape)
    pattern.outs = [[[] if keep and a == axis else c for a, c in enumerate(columns) if keep or a != axis]]
    return pattern


def fourier(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Transforms along one, two or all dimensions; the rest pass."""
    name = event.fn
    two, whole = name.endswith("2"), name.endswith(("n", "shift"))
    dim = kwargs.get("dim", args[1] if len(args) > 1 and not whole else None)
    if name.endswith("shift"):
        dim = kwargs.get("dim", args[0] if args else None)
    if dim is None:
        dim = (-2, -1) if two else range(input.ndim) if whole else -1
    axes = axes_of(dim if isinstance(dim, int) else list(dim), input.ndim)
    pattern = Pattern("box")
    slots = pattern.take(input)
    out = list(slots)
    for axis in axes:
        size = event.outs[0].shape[axis]
        set_role(slots[axis], "ordered")
        out[axis] = slots[axis] if size == input.shape[axis] else pattern.new(w, size, "ordered", "spectrum", event.name)
    pattern.out(out)
    return pattern


def two(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """Entry by entry, with several results."""
    pattern = pointwise(w, event, *args, **kwargs)
    for _ in event.outs[1:]:
        pattern.out(pattern.outs[0])
    return pattern


def difference(w: Wires, event: Event, input: Operand, *args: Any, dim: Any = None, **kwargs: Any) -> Pattern:
    """Neighbours along a dimension subtracted, or summed up: the axis that comes out is another one."""
    if len(event.operands) > 1:
        raise NoRuleError
    if dim is None:
        whole = event.fn == "gradient"
        dim = args[1] if event.fn == "diff" and len(args) > 1 else None if whole else -1
    pattern = Pattern("scan")
    slots = pattern.take(input)
    axes = axes_of(dim, input.ndim)
    for axis in axes:
        set_role(slots[axis], "ordered")
    for out in event.outs:
        columns = list(slots)
        for axis in axes:
            if out.shape[axis] != input.shape[axis]:
                columns[axis] = pattern.new(w, out.shape[axis], "ordered", "scan", event.name)
        pattern.out(columns)
    return pattern


def integral(w: Wires, event: Event, input: Operand, *args: Any, dim: int = -1, **kwargs: Any) -> Pattern:
    """A sum with weights by position."""
    if len(event.operands) > 1:
        raise NoRuleError
    axis = axis_of(dim, input.ndim)
    pattern = Pattern("reduce")
    slots = pattern.take(input)
    set_role(slots[axis], "ordered")
    pattern.out([letters for n, letters in enumerate(slots) if n != axis])
    return pattern


def rotated(w: Wires, event: Event, input: Operand, k: int = 1, dims: Any = (0, 1)) -> Pattern:
    """A quarter turn, k times, in the plane of two dimensions."""
    pattern = Pattern("scan")
    slots = pattern.take(input)
    out = list(slots)
    for axis in axes_of(list(dims), input.ndim):
        set_role(slots[axis], "ordered")
        out[axis] = pattern.new(w, event.outs[0].shape[axis], "ordered", "turned", event.name)
    pattern.out(out)
    return pattern


def sum_to_size(w: Wires, event: Event, input: Operand, *args: Any) -> Pattern:
    """Summed over the dimensions that the wanted shape does not have, or has with size 1."""
    lead = input.ndim - len(event.outs[0].shape)
    pattern = Pattern("reduce")
    slots = pattern.take(input)
    out: list[list[Letter]] = []
    for axis, letters in enumerate(slots):
        gone = axis < lead or event.outs[0].shape[axis - lead] != input.shape[axis]
        if gone:
            set_role(letters, "reduced")
        if axis >= lead:
            out.append([] if gone else letters)
    pattern.out(out)
    return pattern
