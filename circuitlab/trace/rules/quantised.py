"""Numbers in few bits: scaling and rounding, and products with packed weights.

Rounding to a fixed scale is entry by entry. Where the scale is found in the very numbers that are rounded (``dynamic``),
all of them have a say in it; that is taken for rounding too, and what is claimed holds up to it.
"""

from __future__ import annotations

from typing import Any

from circuitlab.trace.events import Event, Operand, Packed, Value
from circuitlab.trace.rules import contract, index, pointwise, shape, spatial
from circuitlab.trace.rules.pattern import NoRuleError, Pattern, axis_of, set_role
from circuitlab.trace.wires import Wires


def rounded(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Entry by entry, with one scale."""
    pattern = Pattern("elementwise", dynamic=_is_dynamic(event))
    if any(pattern.take(operand)[0] for operand in event.operands[1:] if operand.ndim):
        raise NoRuleError
    pattern.out(pattern.take(input))
    return pattern


def per_channel(w: Wires, event: Event, input: Operand, scale: Operand, zero: Operand, dim: int, *args: Any) -> Pattern:
    """Entry by entry, with a scale for each index of one dimension."""
    return _along(w, event, input, axis_of(dim, input.ndim))


def _along(w: Wires, event: Event, input: Operand, axis: int) -> Pattern:
    """The other operands are single numbers, or have that axis."""
    pattern = Pattern("elementwise", dynamic=_is_dynamic(event))
    slots = pattern.take(input)
    for operand in event.operands[1:]:
        own = pattern.take(operand)
        if operand.shape == (0,):  # nothing was seen yet
            continue
        if operand.ndim == 1 and own[0]:
            w.unify(input.dims[axis], operand.dims[0])
            own[0] = slots[axis]
            set_role(slots[axis], "diagonal")
        elif any(own):
            raise NoRuleError
    pattern.out(slots)
    return pattern


def observed(w: Wires, event: Event, input: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Rounded in training, with a scale that follows what is seen, or one for each row."""
    return _along(w, event, input, axis_of(args[9], input.ndim))


def linear(w: Wires, event: Event, input: Operand, packed: Any, *args: Any, **kwargs: Any) -> Pattern:
    """``... i, o i -> ... o``; the bias is packed with the weight."""
    weight = _packed(packed)
    return _noted(contract.linear(w, event, input, weight), event, weight)


def conv(w: Wires, event: Event, input: Operand, packed: Any, *args: Any, **kwargs: Any) -> Pattern:
    """Convolutions; the packed weight knows its strides. That of one dimension is packed as one of two."""
    weight = _packed(packed)
    options = dict(weight.options)
    options.pop("bias")
    thin = weight.ndim == input.ndim + 1 and weight.shape[2] == 1
    seen: Operand = weight
    if thin:
        value = weight.value
        flat = Value(value.name, (*value.shape[:2], *value.shape[3:]), value.dtype, value.kind)
        flat.dims, flat.static, flat.learned = [*value.dims[:2], *value.dims[3:]], value.static, value.learned
        seen = Operand(weight.slot, flat)
        options = {key: item[1:] if isinstance(item, list) else item for key, item in options.items()}
    transposed = options.pop("transpose")
    if not transposed:
        options.pop("output_padding")
    pattern = (spatial.conv_transpose if transposed else spatial.conv)(w, event, input, seen, **options)
    if thin:
        pattern.ins[weight.slot].insert(2, [])
    return _noted(pattern, event, weight)


def embedding(w: Wires, event: Event, packed: Any, indices: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Rows of the packed weight."""
    return index.embedding(w, event, indices, _packed(packed))


def embedding_bag(w: Wires, event: Event, packed: Any, indices: Operand, *args: Any, **kwargs: Any) -> Pattern:
    """Rows of the packed weight, reduced over each bag."""
    return index.embedding_bag(w, event, indices, _packed(packed))


def batch_norm(w: Wires, event: Event, input: Operand, weight: Any, bias: Any, mean: Any, var: Any, *args: Any, **kwargs: Any) -> Pattern:
    """With fixed statistics."""
    return pointwise.batch_norm(w, event, input, mean, var, weight, bias)


def layer_norm(w: Wires, event: Event, input: Operand, sizes: Any, weight: Any, bias: Any, *args: Any, **kwargs: Any) -> Pattern:
    """As of floating numbers."""
    return pointwise.layer_norm(w, event, input, sizes, weight, bias)


def cat(w: Wires, event: Event, tensors: Any, dim: int = 0, *args: Any, **kwargs: Any) -> Pattern:
    """As of floating numbers."""
    return shape.cat(w, event, tensors, dim)


def _packed(value: Any) -> Packed:
    if not isinstance(value, Packed):
        raise NoRuleError
    return value


def _is_dynamic(event: Event) -> bool | None:
    return True if event.fn.endswith("_dynamic") or event.rule is observed else None


def _noted(pattern: Pattern, event: Event, weight: Packed) -> Pattern:
    pattern.attrs.update({key: True for key, on in (("bias", weight.options["bias"]), ("dynamic", _is_dynamic(event))) if on})
    return pattern


OPS = {
    name: rule
    for rule, names in {
        linear: "linear linear_dynamic linear_dynamic_fp16 linear_leaky_relu linear_tanh",
        conv: "conv1d conv2d conv3d conv1d_dynamic conv2d_dynamic conv3d_dynamic conv_transpose1d conv_transpose2d "
        "conv_transpose3d conv_transpose1d_dynamic conv_transpose2d_dynamic conv_transpose3d_dynamic",
        embedding: "embedding_byte embedding_4bit",
        embedding_bag: "embedding_bag_byte embedding_bag_4bit",
        batch_norm: "batch_norm batch_norm1d batch_norm2d batch_norm3d",
        layer_norm: "layer_norm",
        cat: "cat",
        pointwise.pointwise: "add mul add_scalar mul_scalar hardswish leaky_relu elu celu sigmoid relu6 clamp",
    }.items()
    for name in names.split()
}
"""Functions of ``torch.ops.quantized``. Those that end in a relu are recorded as two, see `circuitlab.trace.compose`."""
