"""The table: torch function -> the rule that says what it does to each axis.

A rule takes ``(w, event, *args, **kwargs)``: the wires, the event, and the call's own arguments with an `Operand`
for each tensor. It unites, splits and makes wires in ``w``, and gives back a `Pattern`. It raises `NoRuleError` (or
`ClashError`) where it does not cover the call: the op is then opaque, and nothing of what it did remains. To teach
circuitlab a function, add its name to a table here; `verify` finds out whether the rule is true.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from circuitlab.trace.events import Event, Operand
from circuitlab.trace.rules import algebra, contract, index, lift, pointwise, quantised, recurrent, shape, spatial
from circuitlab.trace.rules.pattern import Letter, NoRuleError, Pattern
from circuitlab.trace.wires import ClashError, Wires

torch_op_packet = torch._ops.OpOverloadPacket
torch_op = torch._ops.OpOverload

Rule = Callable[..., Pattern]


def opaque(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """No rule: all wires end, new ones begin, nothing is claimed."""
    pattern = Pattern("opaque")
    for operand in event.operands:
        pattern.take(operand, "opaque")
    for number, out in enumerate(event.outs):
        pattern.out([
            pattern.new(w, size, "opaque", "opaque", event.name, number, axis) for axis, size in enumerate(out.shape)
        ])
    return pattern


def probed(w: Wires, event: Event) -> Pattern:
    """No rule, and the axes that probing found; of all others nothing is claimed."""
    pattern = opaque(w, event)
    pattern.attrs["probed"] = True
    operands = {operand.slot: operand for operand in event.operands}
    for axis in event.probed:
        dims = [operands[slot].dims[dim] for slot, dim in axis.ins]
        for other in dims[1:]:
            w.unify(dims[0], other)
        letters = [Letter(axis.role, dims[0])]
        for slot, dim in axis.ins:
            pattern.ins[slot][dim] = letters
        for number, dim in axis.outs:
            pattern.outs[number][dim] = letters
    return pattern


def leave(w: Wires, event: Event, *args: Any, **kwargs: Any) -> Pattern:
    """Numbers given to Python: whatever is done with them there, these wires were looked at entry by entry."""
    pattern = Pattern("box")
    for operand in event.operands:
        pattern.take(operand, "ordered")
    return pattern


write = shape.write

_NAMES: dict[Rule, str] = {
    pointwise.prelu: "prelu",
    pointwise.reduce: "sum mean amax amin max min nansum nanmean prod var std var_mean std_mean logsumexp all any median "
    "nanmedian mode count_nonzero argmax argmin aminmax special_logsumexp",
    pointwise.ordered_reduce: "norm linalg_norm linalg_vector_norm vector_norm quantile nanquantile kthvalue",
    pointwise.softmax: "softmax log_softmax softmin special_softmax special_log_softmax _softmax _log_softmax _safe_softmax",
    pointwise.scan: "cumsum cumprod cummax cummin logcumsumexp flip fliplr flipud roll",
    pointwise.order: "sort topk argsort msort",
    pointwise.triangle: "tril triu",
    pointwise.layer_norm: "layer_norm rms_norm",
    pointwise.group_norm: "group_norm",
    pointwise.normalize: "normalize",
    pointwise.weight_norm: "_weight_norm",
    pointwise.local_response_norm: "local_response_norm",
    pointwise.loss: "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits "
    "kl_div poisson_nll_loss soft_margin_loss hinge_embedding_loss margin_ranking_loss gaussian_nll_loss dist",
    pointwise.row_loss: "cosine_embedding_loss triplet_margin_loss",
    pointwise.cross_entropy: "cross_entropy nll_loss nll_loss2d nll_loss_nd cross_entropy_loss",
    pointwise.glu: "glu",
    pointwise.similarity: "cosine_similarity pairwise_distance",
    pointwise.two: "frexp",
    pointwise.difference: "diff gradient cumulative_trapezoid",
    pointwise.integral: "trapezoid trapz",
    pointwise.rotated: "rot90",
    pointwise.sum_to_size: "sum_to_size",
    pointwise.like: "zeros_like ones_like full_like empty_like",
    contract.linear: "linear",
    contract.bilinear: "bilinear",
    contract.matmul: "matmul mm bmm mv dot vdot linalg_matmul",
    contract.rmatmul: "rmatmul",
    contract.outer: "outer ger",
    contract.inner: "inner",
    contract.vecdot: "linalg_vecdot vecdot",
    contract.chain: "linalg_multi_dot chain_matmul",
    contract.trace: "trace linalg_trace",
    contract.kron: "kron",
    contract.cov: "cov corrcoef",
    contract.addmm: "addmm baddbmm addmv addr addbmm",
    contract.tensordot: "tensordot",
    contract.einsum: "einsum",
    contract.cdist: "cdist",
    shape.same: "contiguous clone detach to float double half bfloat16 int long short char byte bool type alias "
    "type_as requires_grad cpu cuda data positive alias_copy resolve_conj resolve_neg",
    shape.view: "view reshape flatten unflatten ravel view_as reshape_as squeeze unsqueeze "
    "_unsafe_view",
    shape.at_least: "atleast_1d atleast_2d atleast_3d",
    shape.permute: "permute",
    shape.transpose: "transpose swapaxes swapdims",
    shape.turned: "T t mT mH H adjoint numpy_T",
    shape.movedim: "movedim moveaxis",
    shape.expand: "expand expand_as broadcast_to",
    shape.broadcast_tensors: "broadcast_tensors",
    shape.repeat: "repeat tile",
    shape.repeat_interleave: "repeat_interleave",
    shape.pieces: "split chunk tensor_split split_with_sizes unsafe_split unsafe_chunk hsplit vsplit dsplit",
    shape.narrow: "narrow",
    shape.unbind: "unbind",
    shape.select: "select",
    shape.cat: "cat concat concatenate",
    shape.stacked: "hstack vstack row_stack dstack column_stack",
    shape.stack: "stack",
    shape.pad: "pad constant_pad_nd",
    shape.pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    shape.channel_shuffle: "channel_shuffle native_channel_shuffle",
    shape.meshgrid: "meshgrid",
    spatial.conv: "conv1d conv2d conv3d",
    spatial.conv_transpose: "conv_transpose1d conv_transpose2d conv_transpose3d",
    spatial.pool: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices",
    spatial.unpool: "max_unpool1d max_unpool2d max_unpool3d",
    spatial.resize: "interpolate upsample upsample_nearest upsample_bilinear",
    spatial.spectrogram: "stft istft",
    spatial.unfold: "unfold",
    spatial.as_strided: "as_strided",
    spatial.fold: "fold",
    index.getitem: "getitem",
    index.indexed: "index",
    index.setitem: "setitem",
    index.embedding: "embedding",
    index.embedding_bag: "embedding_bag",
    index.one_hot: "one_hot",
    index.index_select: "index_select",
    index.nonzero: "nonzero argwhere masked_select",
    index.take: "take",
    index.put: "put masked_scatter",
    index.index_put: "index_put",
    index.multinomial: "multinomial",
    index.gather: "gather",
    index.take_along_dim: "take_along_dim",
    index.scatter: "scatter scatter_add scatter_reduce",
    index.index_add: "index_add index_copy index_fill",
    index.created: "zeros ones full empty new_zeros new_ones new_full new_empty arange range linspace logspace eye rand "
    "randn randint randperm tensor as_tensor new_tensor scalar_tensor tril_indices triu_indices hann_window "
    "hamming_window from_numpy empty_strided",
    recurrent.cell: "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
    spatial.grid_sampler: "grid_sampler grid_sampler_2d grid_sampler_3d",
    shape.diagonal: "diagonal linalg_diagonal",
    shape.diagonals: "diag_embed diag diagflat",
    shape.to_complex: "view_as_complex",
    shape.to_real: "view_as_real",
    pointwise.fourier: "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 "
    "fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift",
    algebra.matrix: algebra.MATRIX,
    algebra.matrix_norm: "linalg_matrix_norm",
    algebra.matrices: algebra.MATRICES,
    algebra.cross: "cross linalg_cross",
    algebra.counts: "histc bincount histogram unique unique_consecutive unique_dim _unique _unique2 combinations pdist "
    "cartesian_prod block_diag ctc_loss multilabel_margin_loss multi_margin_loss nonzero_static",
    algebra.buckets: "bucketize searchsorted",
    algebra.member: "isin",
    algebra.grouped_mm: "grouped_mm _grouped_mm",
    recurrent.recurrent: "lstm gru rnn_tanh rnn_relu",
    recurrent.pack: "_pack_padded_sequence",
    recurrent.unpack: "_pad_packed_sequence",
    recurrent.pad: "pad_sequence",
    quantised.rounded: "quantize_per_tensor quantize_per_tensor_dynamic fake_quantize_per_tensor_affine int_repr "
    "_fake_quantize_learnable_per_tensor_affine",
    quantised.per_channel: "quantize_per_channel fake_quantize_per_channel_affine _fake_quantize_learnable_per_channel_affine",
    quantised.observed: "fused_moving_avg_obs_fake_quant",
}

TABLE: dict[str, Rule] = dict.fromkeys(pointwise.POINTWISE, pointwise.pointwise)
TABLE.update(dict.fromkeys(pointwise.RANDOM, pointwise.random))
for _rule, _names in _NAMES.items():
    TABLE.update(dict.fromkeys(_names.split(), _rule))

_SAME_NAME = {"fft", "sparse", "linalg", "masked"}
_OPERATORS = {"iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_", "ifloordiv": "floor_divide_",
              "imod": "remainder_", "ipow": "pow_", "iand": "logical_and_", "ior": "logical_or_", "ixor":
              "logical_xor_", "radd": "add", "rmul": "mul", "ror": "or", "rand": "and", "rxor": "xor", "and": "and"}


def name_of(func: Any) -> str:
    """The plain name of a torch function: ``__iadd__`` is "add_", ``Tensor.T.__get__`` is "T"."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):
        owner = getattr(func, "__self__", None)
        return getattr(owner, "__name__", "") + ("=" if name == "__set__" else "")
    if isinstance(func, (torch_op_packet, torch_op)):
        return str(getattr(func, "_schema", None) and func._schema.name or func).split("::")[-1].split(".")[-1]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return _OPERATORS.get(name, name)
    return name


def in_place(name: str) -> bool:
    """Whether a function of this name writes to its first operand."""
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def lookup(func: Any, name: str) -> Rule:
    """The rule of a torch function, `opaque` if there is none.

    Only functions of torch itself are looked up by name: another library's ``linear`` may mean anything.
    """
    module = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__module__", "") or ""
    if isinstance(func, types.FunctionType) and not module.startswith("torch"):
        return opaque
    if isinstance(func, (torch_op_packet, torch_op)) and not str(func).startswith("aten"):
        return quantised.OPS.get(name, opaque) if str(func).startswith("quantized.") else opaque
    if set(module.split(".")) & _SAME_NAME and not module.endswith("linalg"):
        return opaque
    if name in ("batch_norm", "instance_norm"):
        python = isinstance(func, types.FunctionType)
        return pointwise.batch_norm if python else pointwise.native_batch_norm
    if name == "where":
        return index.where
    bare = name[:-1] if in_place(name) and name not in TABLE and name != "setitem" else name
    return TABLE.get(bare) or TABLE.get(bare.removesuffix("_copy"), opaque)


def apply(w: Wires, event: Event) -> Pattern:
    """The pattern of an event; the opaque one where its rule does not cover it or does not fit the shapes."""
    if event.levels:
        return lift.apply(w, event, apply)
    mark = w.mark()
    try:
        kwargs = {_KEYWORDS.get(key, key): value for key, value in event.kwargs.items()}
        pattern = event.rule(w, event, *event.args, **kwargs)
        _fits(event, pattern)
    except Exception:  # a call that its rule was not written for: whatever came of it, nothing is claimed
        w.rollback(mark)
        # arrays of one entry have no axes to be wrong about
        single = event.rule is not opaque and all(prod(v.shape) == 1 for v in (*event.operands, *event.outs))
        pattern = leave(w, event) if single else opaque(w, event)
        if single:
            pattern.outs = [[[] for _ in out.shape] for out in event.outs]
    if event.probed and pattern.kind == "opaque":
        w.rollback(mark)
        try:
            pattern = probed(w, event)
            _fits(event, pattern)
        except (NoRuleError, ClashError):
            w.rollback(mark)
            pattern = opaque(w, event)
    w.commit()
    return pattern


_KEYWORDS = {"axis": "dim", "keepdims": "keepdim", "mat": "mat2"}


def _fits(event: Event, pattern: Pattern) -> None:
    """A pattern speaks of every operand and result, with the sizes that they have."""
    sides = [(operand.shape, pattern.ins.get(operand.slot)) for operand in event.operands]
    sides += [(out.shape, slots) for out, slots in zip(event.outs, pattern.outs, strict=True)]
    for shape_, slots in sides:
        if slots is None:
            if shape_:
                raise NoRuleError
            continue
        if len(slots) != len(shape_):
            raise NoRuleError
        for size, letters in zip(shape_, slots, strict=True):
            product = 1
            for letter in letters:
                for atom in letter.atoms:
                    product *= atom.size
            if product != size:
                raise NoRuleError



__all__ = ["TABLE", "Letter", "Operand", "Pattern", "apply", "in_place", "leave", "lookup", "name_of", "opaque", "write"]
