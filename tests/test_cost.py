"""Costs read off the wires, against torch's own counter and against the memory that a run really held."""

import sys
import weakref

import pytest
import torch
from tests.zoo import SMALL, ZOO
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import circuitlab as cl
from circuitlab.diagram.check import look
from circuitlab.diagram.layout import draw
from circuitlab.gallery import gpt, resnet, unet
from circuitlab.trace.events import tensors_in

UNSEEN = {
    "torch_transformer", "torch_transformer_encoder",  # a fused kernel, which torch's counter does not know
    "torch_lstm", "lstm_of_one_unit",  # a fused kernel too; gru and the cells are counted and agree
    "torch_bilinear", "torch_spectral_norm",  # the counter leaves out trilinear products and matrix times vector
    "experts_in_one_product", "products_of_groups",  # nor does it know grouped_mm
    "learned_queries",  # it does not take parameters as the inputs of modules
    "exception_midway",  # the counter counts the product that failed
    "per_sample_gradients", "inner_step", "jacobians", "force_field", "quantised_lstm",  # opaque
    "quantised_dynamic", "quantised_half", "quantised_static", "quantised_graph",  # the counter knows no packed products
}


def run(model, args, kwargs, mode):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mode:
        model(*args, **kwargs)


@pytest.mark.parametrize("name", [
    name if name not in UNSEEN else pytest.param(name, marks=pytest.mark.xfail(strict=True)) for name in ZOO
    if not name.startswith("flex_attention")  # torch does not run it under a counter
])
def test_flops_agree_with_the_flop_counter(name):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name]()
    model.eval()
    costs = cl.trace(model, *args, **kwargs).cost()
    counter = FlopCounterMode(display=False)
    run(model, args, kwargs, counter)
    assert costs.flops[0] == counter.get_total_flops()


class Held(TorchDispatchMode):
    """The most bytes of memory that were held at once, but for what was there before."""

    def __init__(self, before):
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.now, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.now and storage._cdata not in self.before:
                    self.now[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.now.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.now.values()))
        return result


def hugging_face(config, model, **options):
    import transformers

    settings = {**SMALL, "hidden_size": 64, "intermediate_size": 256, **options}
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def models(more=1):
    """Cases of many entries: of that many times the examples."""
    tokens = torch.randint(0, 39, (4 * more, 64))
    plain = {"use_cache": False}
    yield "gpt", gpt.GPT(), (tokens,), {}
    yield "unet", unet.UNet(), (torch.randn(2 * more, 1, 64, 64),), {}
    yield "resnet", resnet.IdentityBlock(16, 32, 2).eval(), (torch.randn(2 * more, 16, 64, 64),), {}
    yield "mlp", nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(inplace=True)), (torch.randn(32 * more, 64),), {}
    yield "transformer", nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 2), (torch.randn(4 * more, 64, 64),), {}
    yield "hf_gpt2", hugging_face("GPT2Config", "GPT2LMHeadModel"), (tokens,), plain
    yield "hf_llama", hugging_face("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=2), (tokens,), plain
    yield "hf_bert", hugging_face("BertConfig", "BertModel"), (tokens,), {}


@pytest.mark.parametrize(("name", "model", "args", "kwargs"), [pytest.param(*case, id=case[0]) for case in models()])
def test_the_peak_of_live_memory_is_within_a_fifth(name, model, args, kwargs):
    costs = cl.trace(model, *args, **kwargs).cost()
    inputs = [tensor for _, tensor in tensors_in((args, kwargs), torch.Tensor)]
    held = Held([*inputs, *model.parameters(), *model.buffers()])
    run(model, args, kwargs, held)
    mine = costs.live[0] - sum(tensor.nbytes for tensor in inputs)
    assert 0.8 * held.most <= mine <= 1.2 * held.most


def test_polynomials_are_in_wires_and_blocks_add_up():
    model = gpt.GPT()
    circuit = cl.trace(model, torch.zeros(2, 16, dtype=torch.long))
    costs = circuit.cost().set_index("name")
    assert costs.flops_in_wires["blocks.0.mlp"] == "4 b d f x̄"
    assert costs.flops["blocks.0.mlp"] == 4 * 2 * 64 * 256 * 16
    assert "2 b h k x̄²" in costs.flops_in_wires["blocks.0.attention/scaled_dot_product_attention"]
    assert costs.memory_in_wires["blocks.0.mlp.up.linear"] == "4 b f x̄"
    ops = costs[costs.kind == "op"]
    for column in ("flops", "entries", "memory"):
        assert ops[column].sum() == costs[column].iloc[0]
    assert costs.parameters.iloc[0] == sum(p.nbytes for p in model.parameters())
    assert costs.live.iloc[0] == ops.live.max()
    assert not costs.unknown.any()


def test_an_overlay_of_costs_is_drawn():
    """The darkest is the largest shown, what is open is left alone, and a scale says from where to where."""
    circuit = cl.trace(gpt.GPT(), torch.zeros(2, 16, dtype=torch.long))
    costs = circuit.cost().set_index("name").flops["blocks.0":].to_dict()
    marks = draw(circuit, depth=2, overlay=costs).marks
    tints = {mark.block: mark.opacity for mark in marks if mark.role == "block" and mark.fill == "accent"}
    assert tints["blocks.0.mlp"] > tints["blocks.0.attention"] > 0
    assert all(mark.fill != "accent" for mark in marks if mark.role == "plate" and mark.block == "blocks.0")
    assert [m.text for m in marks if m.role == "legend" and m.text] == ["0", f"{costs['blocks.0.mlp']:,}"]
    assert look(draw(circuit, depth=2, overlay=costs)).ok


def test_ops_without_a_rule_are_counted_as_unknown():
    model, args, kwargs = ZOO["jacobians"]()
    costs = cl.trace(model, *args, **kwargs).cost()
    assert costs.unknown[0] == len(cl.trace(model, *args, **kwargs).opaque) > 0


@pytest.mark.skipif("experts_in_one_product" not in ZOO, reason="this torch has no grouped_mm")
@pytest.mark.parametrize(("name", "flops"), [
    ("experts_in_one_product", 2 * 12 * 8 * 3 + 2 * (2 * 12 * 8 * 16)),
    ("products_of_groups", 2 * 3 * 8 * 16 * 8 + 2 * 16 * 16 * 16 + 2 * 8 * 16 * 16),
])
def test_each_row_is_multiplied_with_the_matrix_of_its_group(name, flops):
    model, args, kwargs = ZOO[name]()
    assert cl.trace(model, *args, **kwargs).cost().flops[0] == flops
