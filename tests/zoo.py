"""Small models of many styles. Each entry makes (model, args, kwargs); every one is traced, verified and drawn."""

import collections
import dataclasses
import functools
import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from circuitlab.gallery import attention, gpt, llama, mlp, moe, resnet, unet, visual_attention

ZOO = {}


def entry(make):
    ZOO[make.__name__] = make
    return make


def style(name, *inputs, **parts):
    """A model from a forward function; parts are its submodules and parameters."""

    def decorate(forward):
        def make():
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    for key, value in parts.items():
                        setattr(self, key, value() if callable(value) and not isinstance(value, nn.Module) else value)

            Model.forward = forward
            Model.__name__ = name
            return Model(), tuple(i() if callable(i) else i.clone() for i in inputs), {}

        ZOO[name] = make
        return forward

    return decorate


def x(*shape):
    return lambda: torch.randn(*shape)


def ids(*shape, high=10):
    return lambda: torch.randint(0, high, shape)


def linear(*sizes, **options):
    return lambda: nn.Linear(*sizes, **options)


# the gallery ------------------------------------------------------------------------------------------------

ZOO["gallery_mlp"] = lambda: (mlp.Recogniser(6, 8, 4), (torch.randn(3, 6, 6),), {})
ZOO["gallery_sdpa"] = lambda: (
    attention.ScaledDotProductAttention(), (torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)), {})
ZOO["gallery_multi_head"] = lambda: (
    attention.MultiHeadAttention(16, 4), (torch.randn(2, 7, 16), torch.randn(2, 5, 16)), {})
ZOO["gallery_resnet"] = lambda: (resnet.IdentityResNet((4, 8), 2), (torch.randn(2, 3, 8, 8),), {})
ZOO["gallery_unet"] = lambda: (unet.UNet(1, 4, 3), (torch.randn(2, 1, 16, 16),), {})
ZOO["gallery_visual_attention"] = lambda: (visual_attention.VisualAttention(16, 4), (torch.randn(2, 16, 4, 6),), {})
ZOO["gallery_gpt"] = lambda: (gpt.GPT(32, 16, 16, 4, 2), (torch.randint(0, 32, (2, 7)),), {})
ZOO["gallery_llama"] = lambda: (llama.Llama(32, 16, 4, 2, 2), (torch.randint(0, 32, (2, 7)),), {})
ZOO["gallery_moe"] = lambda: (moe.MixtureOfExperts(8, 12, 3), (torch.randn(10, 8),), {})


# torch's own modules ----------------------------------------------------------------------------------------


@entry
def torch_transformer():
    return nn.Transformer(16, 4, 1, 1, 32, batch_first=True), (torch.randn(2, 5, 16), torch.randn(2, 6, 16)), {}


@entry
def torch_transformer_encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(2, 5, 16),), {}


@entry
def torch_multihead_attention():
    return nn.MultiheadAttention(16, 4), (torch.randn(5, 2, 16),) * 3, {"need_weights": True}


@entry
def torch_multihead_attention_kv():
    return (
        nn.MultiheadAttention(16, 4, kdim=8, vdim=12, batch_first=True),
        (torch.randn(2, 5, 16), torch.randn(2, 7, 8), torch.randn(2, 7, 12)),
        {"need_weights": False},
    )


@entry
def torch_lstm():
    return nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), (torch.randn(3, 5, 6),), {}


@entry
def torch_gru():
    return nn.GRU(6, 8), (torch.randn(5, 3, 6),), {}


@entry
def torch_lstm_cell():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(4, 6)

        def forward(self, x):
            h = c = torch.zeros(x.shape[1], 6)
            for step in x:
                h, c = self.cell(step, (h, c))
            return h

    return Steps(), (torch.randn(3, 2, 4),), {}


@entry
def torch_sequential_conv1d():
    return nn.Sequential(nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)), (
        torch.randn(2, 3, 16),), {}


@entry
def torch_conv_groups_dilation():
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding=2, dilation=2), nn.Conv2d(8, 12, 1), nn.SiLU()), (
        torch.randn(2, 8, 9, 9),), {}


@entry
def torch_conv3d():
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)), (
        torch.randn(2, 2, 4, 5, 6),), {}


@entry
def torch_norms():
    return nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.BatchNorm2d(8), nn.PReLU(8)), (
        torch.randn(2, 8, 5, 5),), {}


@entry
def torch_embedding_bag():
    return nn.EmbeddingBag(20, 6), (torch.randint(0, 20, (3, 4)),), {}


@entry
def torch_bilinear():
    return nn.Bilinear(4, 5, 6), (torch.randn(3, 4), torch.randn(3, 5)), {}


@entry
def torch_upsample():
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3), nn.PixelShuffle(2)), (
        torch.randn(1, 3, 4, 4),), {}


@entry
def torch_unfold_fold():
    class Patches(nn.Module):
        def forward(self, x):
            return F.fold(F.unfold(x, 2, stride=2), x.shape[-2:], 2, stride=2)

    return Patches(), (torch.randn(2, 3, 4, 6),), {}


@entry
def torch_weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), (torch.randn(2, 4),), {}


@entry
def torch_spectral_norm():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)).eval(), (torch.randn(2, 4),), {}


# styles of writing ------------------------------------------------------------------------------------------


@style("einsum_attention", x(2, 5, 8), q=linear(8, 8), k=linear(8, 8), v=linear(8, 8))
def _(self, x):
    w = torch.einsum("bid,bjd->bij", self.q(x), self.k(x)) / math.sqrt(8)
    return torch.einsum("bij,bjd->bid", w.softmax(-1), self.v(x))


@style("matmul_parameter", x(3, 4), w=lambda: nn.Parameter(torch.randn(4, 5)), b=lambda: nn.Parameter(torch.randn(5)))
def _(self, x):
    return x @ self.w + self.b


@style("addmm", x(3, 4), w=lambda: nn.Parameter(torch.randn(4, 5)), b=lambda: nn.Parameter(torch.randn(5)))
def _(self, x):
    return torch.addmm(self.b, x, self.w)


@style("baddbmm", x(2, 3, 4), x(2, 4, 5), x(2, 3, 5))
def _(self, a, b, c):
    return torch.baddbmm(c, a, b)


@style("residual_in_place", x(3, 8), a=linear(8, 8), b=linear(8, 8))
def _(self, x):
    y = self.a(x)
    y += x
    y.relu_()
    y.mul_(2).add_(self.b(y))
    return y


@style("setitem_rows", x(4, 6), a=linear(6, 6))
def _(self, x):
    out = torch.zeros_like(x)
    out[:2] = self.a(x[:2])
    out[2:] = x[2:]
    return out


@style("setitem_mask", x(4, 6))
def _(self, x):
    y = x.clone()
    y[y < 0] = 0
    return y


@style("view_of_view_written", x(2, 3, 4))
def _(self, x):
    y = x.clone()
    y.view(6, 4)[:, 0].zero_()
    return y


@style("out_argument", x(3, 4), x(3, 4))
def _(self, a, b):
    buffer = torch.empty(3, 4)
    torch.add(a, b, out=buffer)
    return buffer * 2


@style("transposed_write", x(3, 4))
def _(self, x):
    y = x.clone()
    y.t()[1] += 1
    return y


@style("chunk_gate", x(3, 8), a=linear(8, 16))
def _(self, x):
    a, b = self.a(x).chunk(2, dim=-1)
    return a * torch.sigmoid(b)


@style("glu", x(3, 8), a=linear(8, 16))
def _(self, x):
    return F.glu(self.a(x))


@style("geglu_fused", x(2, 5, 8), up=linear(8, 24), down=linear(12, 8))
def _(self, x):
    gate, value = self.up(x).split(12, dim=-1)
    return self.down(F.gelu(gate, approximate="tanh") * value)


@style("gelu_by_hand", x(3, 8), a=linear(8, 8))
def _(self, x):
    y = self.a(x)
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


@style("rms_norm_by_hand", x(2, 5, 8), w=lambda: nn.Parameter(torch.ones(8)))
def _(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w


@style("layer_norm_by_hand", x(2, 5, 8))
def _(self, x):
    mean = x.mean(dim=-1, keepdim=True)
    var = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


@style("causal_mask_buffer", x(2, 5, 5))
def _(self, s):
    mask = torch.tril(torch.ones(5, 5, dtype=torch.bool))
    return s.masked_fill(~mask, float("-inf")).softmax(-1)


@style("alibi", x(2, 4, 5, 5))
def _(self, s):
    slopes = torch.tensor([2.0**-n for n in range(1, 5)])
    distance = torch.arange(5)[None] - torch.arange(5)[:, None]
    return (s + slopes[:, None, None] * distance).softmax(-1)


@style("sinusoidal_positions", ids(2, 6), e=lambda: nn.Embedding(10, 8))
def _(self, t):
    n = torch.arange(t.shape[1])[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    return self.e(t) + torch.cat([n.sin(), n.cos()], dim=-1)


@style("cross_reshape", x(6, 4))
def _(self, x):
    return x.reshape(8, 3)


@style("patchify", x(2, 3, 8, 8), e=linear(48, 10))
def _(self, x):
    b, c, h, w = x.shape
    p = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return self.e(p)


@style("vit_qkv_unbind", x(2, 5, 12), qkv=linear(12, 36), proj=linear(12, 12))
def _(self, x):
    b, n, d = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, 3, d // 3).permute(2, 0, 3, 1, 4).unbind(0)
    y = (q * (d // 3) ** -0.5) @ k.transpose(-2, -1)
    return self.proj((y.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


@style("class_token", x(2, 5, 8), token=lambda: nn.Parameter(torch.zeros(1, 1, 8)), a=linear(8, 8))
def _(self, x):
    x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
    return self.a(x)[:, 0]


@style("stack_mean", x(3, 4), a=linear(4, 4), b=linear(4, 4))
def _(self, x):
    return torch.stack([self.a(x), self.b(x)]).mean(0)


@style("gather_select", x(3, 6), ids(3, 2, high=6))
def _(self, x, i):
    return x.gather(1, i) + x.index_select(1, torch.tensor([0, 1]))


@style("graph_conv", x(5, 6), lambda: torch.randint(0, 5, (2, 8)), a=linear(6, 6))
def _(self, x, edges):
    source, target = edges
    messages = self.a(x)[source]
    return torch.zeros_like(x).index_add(0, target, messages).relu()


@style("scatter_add", x(3, 6), ids(3, 6, high=4))
def _(self, x, i):
    return torch.zeros(3, 4).scatter_add(1, i, x)


@style("topk_sort", x(3, 6))
def _(self, x):
    values, index = x.topk(2, dim=-1)
    return values + x.sort(dim=-1).values[:, :2], index


@style("cumsum_flip", x(3, 6))
def _(self, x):
    return x.cumsum(1).flip(1)


@style("roll_window", x(2, 8, 8, 4), a=linear(4, 4))
def _(self, x):
    x = torch.roll(x, (-2, -2), (1, 2))
    w = x.view(2, 2, 4, 2, 4, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 4)
    return self.a(w)


@style("shared_layer", x(3, 4), a=linear(4, 4))
def _(self, x):
    return self.a(self.a(self.a(x)))


@style("loop_with_state", x(4, 3, 5), a=linear(5, 5), b=linear(5, 5))
def _(self, x):
    h = torch.zeros(3, 5)
    for step in x.unbind(0):
        h = torch.tanh(self.a(step) + self.b(h))
    return h


@style("branch_on_shape", x(3, 4), a=linear(4, 4))
def _(self, x):
    return self.a(x) if x.shape[0] > 2 else x


@style("branch_on_data", x(3, 4), a=linear(4, 4))
def _(self, x):
    return self.a(x) if x.sum() > -100 else x


@style("broadcasting", x(3, 1, 4), x(5, 1))
def _(self, a, b):
    return (a + b) * torch.ones(4)


@style("outer_difference", x(3, 4), x(5, 4))
def _(self, a, b):
    return (a[:, None] - b[None]).square().sum(-1).sqrt()


@style("cdist_norm", x(3, 4))
def _(self, x):
    return F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T


@style("losses", x(3, 5), ids(3, high=5))
def _(self, x, y):
    return F.cross_entropy(x, y)


@style("fft_mixer", x(2, 6, 8))
def _(self, x):
    return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


@style("complex_rotary", x(2, 5, 3, 8))
def _(self, x):
    angle = torch.outer(torch.arange(5), 1.0 / 10 ** (torch.arange(4) / 4))
    turned = torch.view_as_complex(x.reshape(2, 5, 3, 4, 2)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(turned).flatten(3)


@style("swiglu_einsum", x(2, 5, 8), w=lambda: nn.Parameter(torch.randn(2, 12, 8)), o=lambda: nn.Parameter(torch.randn(8, 12)))
def _(self, x):
    a, b = torch.einsum("bnd,gfd->gbnf", x, self.w)
    return torch.einsum("bnf,df->bnd", F.silu(a) * b, self.o)


@style("batched_experts", x(3, 4, 8), w=lambda: nn.Parameter(torch.randn(3, 8, 6)))
def _(self, x):
    return torch.bmm(x, self.w)


@style("tied_embedding", ids(2, 6), e=lambda: nn.Embedding(10, 8))
def _(self, t):
    return self.e(t) @ self.e.weight.T


@style("gram_style", x(2, 3, 4, 5))
def _(self, x):
    f = x.flatten(2)
    return f @ f.transpose(1, 2) / f.shape[-1]


@style("squeeze_excite", x(2, 8, 5, 5), a=linear(8, 4), b=linear(4, 8))
def _(self, x):
    s = x.mean((2, 3))
    return x * torch.sigmoid(self.b(F.relu(self.a(s))))[..., None, None]


@style("dropout_train", x(3, 8), a=linear(8, 8), d=lambda: nn.Dropout(0.5))
def _(self, x):
    return self.d(self.a(x))


@style("pad_and_shift", x(2, 6, 4))
def _(self, x):
    return F.pad(x, (0, 0, 1, 0))[:, :-1] + x


@style("minmax_argmax", x(3, 6))
def _(self, x):
    top, where = x.max(dim=1)
    return top - x.amin(1), where, x.argmax()


@style("named_tuple_out", x(3, 4))
def _(self, x):
    return collections.namedtuple("Out", "a b")(x + 1, {"c": [x.sum(0), None]})


@style("meshgrid_grid_sample", x(1, 2, 4, 4))
def _(self, x):
    line = torch.linspace(-1, 1, 4)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]
    return F.grid_sample(x, grid, align_corners=False)


@style("tensordot_kron", x(3, 4), x(4, 5))
def _(self, a, b):
    return torch.tensordot(a, b, dims=([1], [0])), torch.outer(a[0], b[:, 0])


@style("group_query_repeat", x(2, 6, 5, 4), x(2, 2, 5, 4))
def _(self, q, k):
    return q @ k.repeat_interleave(3, dim=1).transpose(-2, -1)


@style("cross_reshape_mapped", x(3, 6, 4), a=linear(4, 4))
def _(self, x):
    return torch.vmap(lambda each: self.a(each).reshape(8, 3))(x)


@style("einops_style", x(2, 6, 8), a=linear(8, 8))
def _(self, x):
    from einops import rearrange, reduce

    y = rearrange(self.a(x), "b n (h d) -> b h n d", h=2)
    return reduce(y, "b h n d -> b n d", "mean")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


@style("dataclass_out", x(3, 4), a=linear(4, 2))
def _(self, x):
    return Output(self.a(x), (x,))


@entry
def keyword_inputs():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, *, mask=None, scale=1.0):
            return self.a(x) * mask[..., None] * scale

    return Masked(), (torch.randn(2, 3, 4),), {"mask": torch.ones(2, 3), "scale": 0.5}


@entry
def dict_input():
    class Reads(nn.Module):
        def forward(self, batch):
            return batch["a"] + batch["b"].mean(-1, keepdim=True)

    return Reads(), ({"a": torch.randn(2, 3), "b": torch.randn(2, 5)},), {}


@entry
def recursion():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def descend(self, x, depth):
            return x if depth == 0 else self.a(self.descend(x, depth - 1) + x)

        def forward(self, x):
            return self.descend(x, 3)

    return Tree(), (torch.randn(2, 4),), {}


@entry
def buffer_update():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return x - self.mean

    return Counts(), (torch.randn(3, 4),), {}


# Hugging Face, from tiny configurations ---------------------------------------------------------------------


def hugging_face(name, config, model, *inputs, **settings):
    def make():
        import transformers

        found = getattr(transformers, config)(**settings)
        return getattr(transformers, model)(found).eval(), tuple(i() for i in inputs), {}

    ZOO[f"hf_{name}"] = make


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40}
FINAL = {**SMALL, "use_cache": False}
hugging_face("gpt2", "GPT2Config", "GPT2LMHeadModel", ids(2, 6), n_layer=2, n_embd=16, n_head=4, vocab_size=40,
             use_cache=False, bos_token_id=0, eos_token_id=0)
hugging_face("llama", "LlamaConfig", "LlamaForCausalLM", ids(2, 6), num_key_value_heads=2, **FINAL)
hugging_face("mistral", "MistralConfig", "MistralForCausalLM", ids(2, 6), num_key_value_heads=2, head_dim=4, **FINAL)
hugging_face("qwen2", "Qwen2Config", "Qwen2ForCausalLM", ids(2, 6), num_key_value_heads=2, **FINAL)
hugging_face("gemma", "GemmaConfig", "GemmaForCausalLM", ids(2, 6), num_key_value_heads=2, head_dim=4, **FINAL)
hugging_face("phi", "PhiConfig", "PhiForCausalLM", ids(2, 6), **FINAL)
hugging_face("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", ids(2, 6), **FINAL)
hugging_face("bloom", "BloomConfig", "BloomForCausalLM", ids(2, 6), hidden_size=16, n_layer=2, n_head=4,
             vocab_size=40, use_cache=False)
hugging_face("opt", "OPTConfig", "OPTForCausalLM", ids(2, 6), ffn_dim=32, max_position_embeddings=32,
             word_embed_proj_dim=16, **FINAL)
hugging_face("bert", "BertConfig", "BertModel", ids(2, 6), **SMALL)
hugging_face("distilbert", "DistilBertConfig", "DistilBertModel", ids(2, 6), dim=16, n_layers=2, n_heads=4,
             hidden_dim=32, vocab_size=40)
hugging_face("t5", "T5EncoderModel".replace("EncoderModel", "Config"), "T5EncoderModel", ids(2, 6), d_model=16, d_kv=4,
             d_ff=32, num_layers=2, num_heads=4, vocab_size=40)
hugging_face("vit", "ViTConfig", "ViTModel", x(2, 3, 16, 16), image_size=16, patch_size=4, hidden_size=16,
             num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
hugging_face("clip_vision", "CLIPVisionConfig", "CLIPVisionModel", x(2, 3, 16, 16), image_size=16, patch_size=4,
             hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
hugging_face("convnext", "ConvNextConfig", "ConvNextModel", x(1, 3, 32, 32), hidden_sizes=[8, 16], depths=[1, 1],
             num_stages=2)
hugging_face("resnet", "ResNetConfig", "ResNetModel", x(1, 3, 32, 32), embedding_size=8, hidden_sizes=[8, 16],
             depths=[1, 1], layer_type="basic")


@style("stacked_features", x(2, 3), a=linear(6, 4))
def _(self, x):
    return self.a(torch.stack([x.sin(), x.cos()], dim=-1).flatten(1))


@style("inverse_permutation", x(6, 3))
def _(self, x):
    order = x[:, 0].argsort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(6)
    return x[order][inverse]


@style("largest_taken_off", x(2, 5))
def _(self, x):
    y = torch.cat([x, torch.zeros(2, 1)], dim=-1)
    return (y - y.max(dim=-1, keepdim=True).values).softmax(-1)


@entry
def hf_gpt2_with_cache_and_hidden_states():
    import transformers

    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval(), (torch.randint(0, 40, (2, 6)),), {"output_hidden_states": True}


@style("linear_algebra", x(2, 4, 4))
def _(self, x):
    u, s, v = torch.linalg.svd(x)
    return torch.linalg.inv(x @ x.mT + torch.eye(4)), u * s[..., None, :], torch.linalg.det(x)


@style("histogram", x(3, 5))
def _(self, x):
    return torch.histc(x, 4), torch.bucketize(x, torch.tensor([0.0, 1.0]))


@style("norms_and_quantiles", x(3, 4))
def _(self, x):
    return x.norm(dim=1), torch.linalg.vector_norm(x, 2, 0), x.quantile(0.5, dim=1), x.kthvalue(2).values, x.diagonal()


@style("entries_picked_from_a_map", x(2, 4), a=linear(4, 3))
def _(self, x):
    y = self.a(x).repeat_interleave(2, -1)
    return torch.cat(y.chunk(3, -1)[::-1], -1), F.pad(self.a(x), (1, 1))[:, :3]


@style("masked_rows", x(4, 3), x(2, 5))
def _(self, a, b):
    c = a.clone()
    c[a[:, 0] > 0] = 1.0
    return a[a[:, 0] > -9], b[:, b[0] > 0], a[a > 0], c


@style("numbers_through_python", x(3, 4), a=linear(4, 4))
def _(self, x):
    y = self.a(x)
    return y * y.max().item() if float(y.sum()) > -1e9 else y


@style("chance", x(3, 6), a=linear(6, 8), b=linear(8, 6))
def _(self, x):
    hidden = F.dropout(self.a(x).relu(), 0.3, training=True)
    hidden = hidden + 0.1 * torch.randn_like(hidden) * torch.rand(8)
    return x + F.dropout1d(self.b(hidden), 0.1, training=True)


@style("empty_cache", x(2, 5, 6), k=linear(6, 6))
def _(self, x):
    cache = torch.cat([torch.tensor([]), self.k(x)], dim=1)
    return x @ cache.transpose(1, 2), {"cache": [{"keys": cache}]}


@style("dense", x(3, 4), **{f"l{n}": linear(4 * n, 4) for n in range(1, 10)})
def _(self, x):
    found = [x]
    for n in range(1, 10):
        found.append(torch.relu(getattr(self, f"l{n}")(torch.cat(found, -1))))
    return found[-1]


@style("empty_axis", x(2, 3, 4), a=linear(4, 4))
def _(self, x):
    rest = self.a(x[:, 3:]).repeat_interleave(2, 1)
    return torch.cat([x, rest.softmax(-1) + rest], 1), rest.sum(1)


@style("grids_that_cross", x(2, 12), x(2, 12), a=linear(4, 4))
def _(self, x, y):
    return self.a(x.view(2, 3, 4)).flatten(1) * torch.relu(y.view(2, 4, 3)).flatten(1) + 1


@style("padding_that_is_computed", x(2, 5, 4), a=linear(4, 4), n=lambda: nn.Buffer(torch.tensor(2)))
def _(self, x):
    return F.pad(self.a(x).mT, (self.n, self.n - 1)).mT


# aliasing and writes ----------------------------------------------------------------------------------------


@style("write_after_read", x(3, 4), a=linear(4, 4))
def _(self, x):
    y = self.a(x)
    before = y * 2  # reads y as it was
    y.add_(1)
    return before + y


@style("two_views_of_one_base", x(4, 6))
def _(self, x):
    y = x.clone()
    left, top = y[:, :3], y[:2]
    left.mul_(2)
    top.add_(left[:2].sum())  # sees what was written through the other view
    return y, left


@style("write_into_a_part", x(3, 8), a=linear(8, 8))
def _(self, x):
    y = self.a(x)
    first, second = y[:, :4], y[:, 4:]
    first.copy_(second.tanh())
    return y


@style("accumulate_in_slices", x(2, 6, 4))
def _(self, x):
    total = torch.zeros(2, 6)
    for n in range(4):
        total[:, n:] += x[:, n:, n]
    return total


@style("filled_list_by_index", x(3, 4), a=linear(4, 4))
def _(self, x):
    rows = [None] * 3
    for n in reversed(range(3)):
        rows[n] = self.a(x[n])
    return torch.stack(rows)


@style("transposed_and_written_diagonal", x(4, 4))
def _(self, x):
    y = x.T.clone()
    y.diagonal().fill_(0)
    return y @ x


@style("index_put_accumulates", x(5, 3), ids(4, high=5), x(4, 3))
def _(self, x, i, v):
    return x.index_put((i,), v, accumulate=True)


@style("masked_scatter_and_select", x(3, 4), x(12))
def _(self, x, source):
    mask = x > -9
    return x.masked_scatter(mask, source), x.masked_select(mask)


@style("in_place_activation_of_a_view", x(2, 3, 4))
def _(self, x):
    y = x * 1
    F.relu(y[:, 0], inplace=True)
    return y.flatten(1)


@style("swapped_data", x(3, 4))
def _(self, x):
    y, z = x + 1, x * 2
    y, z = z, y
    y -= z
    return y


# control flow -----------------------------------------------------------------------------------------------


@style("while_until_small", x(3, 4), a=linear(4, 4))
def _(self, x):
    steps = 0
    while steps < 5 and float(x.abs().max()) > 0.5:
        x = 0.1 * self.a(x)
        steps += 1
    return x


@style("generator_of_layers", x(3, 4), a=linear(4, 4), b=linear(4, 4))
def _(self, x):
    def layers():
        yield self.a
        yield self.b

    for layer in layers():
        x = layer(x).relu()
    return x


@style("comprehension_and_zip", x(2, 3, 4), a=linear(4, 4), b=linear(4, 4), c=linear(4, 4))
def _(self, x):
    return torch.stack([layer(row) for layer, row in zip((self.a, self.b, self.c), x.unbind(1))], 1)


@style("exception_midway", x(3, 4), a=linear(4, 5), b=linear(4, 4))
def _(self, x):
    try:
        return self.a(x) + x  # 5 against 4
    except RuntimeError:
        return self.b(x) + x


@style("context_managers", x(3, 4), a=linear(4, 4))
def _(self, x):
    with torch.no_grad():
        scale = self.a(x).detach().abs().mean()
    with torch.enable_grad():
        return self.a(x) / scale


@style("lambda_and_partial", x(3, 4), a=linear(4, 4))
def _(self, x):
    import functools

    twice = functools.partial(lambda f, n, v: f(v) * n, self.a, 2)
    return twice(x)


@style("checkpointed", x(3, 4), a=linear(4, 8), b=linear(8, 4))
def _(self, x):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda y: self.b(self.a(y).relu()), x, use_reentrant=False)


@style("mutual_recursion", x(2, 8))
def _(self, x):
    def halve(y):
        return y if y.shape[1] == 1 else join(*y.chunk(2, 1))

    def join(a, b):
        return halve(a) + halve(b)

    return halve(x)


@entry
def early_exit():
    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            for number, layer in enumerate(self.layers):
                x = layer(x)
                if number == 1:
                    return x, number
            return x, -1

    return Exits(), (torch.randn(2, 4),), {}


# modules and what they hold ---------------------------------------------------------------------------------


@entry
def hooks_of_the_user():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model, (torch.randn(3, 4),), {}


@entry
def parameter_tied_to_another_module():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(6, 3), nn.Linear(3, 6)
            self.decode.weight = nn.Parameter(self.encode.weight.detach().T.clone())
            self.again = nn.Linear(6, 3)
            self.again.weight = self.encode.weight

        def forward(self, x):
            return self.again(self.decode(self.encode(x)))

    return Tied(), (torch.randn(2, 6),), {}


@entry
def one_module_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x).tanh())

    return Twice(), (torch.randn(2, 4),), {}


@entry
def parameter_list_and_dict():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
            self.named = nn.ParameterDict({"scale": torch.randn(4)})

        def forward(self, x):
            for weight in self.weights:
                x = x @ weight
            return x * self.named["scale"]

    return Held(), (torch.randn(2, 4),), {}


@entry
def running_statistics_in_training():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()).train(), (torch.randn(5, 4),), {}


@entry
def counter_buffer():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            self.steps += 1
            return self.a(x) / self.steps

    return Counts(), (torch.randn(3, 4),), {}


@entry
def ring_buffer_written_by_index():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("memory", torch.zeros(5, 4))
            self.at = 3

        def forward(self, x):
            self.memory[self.at] = x.mean(0)
            return x @ self.memory.T

    return Memory(), (torch.randn(3, 4),), {}


@entry
def reparametrised_orthogonal():
    return nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), (torch.randn(2, 4),), {}


@entry
def functional_call_with_other_weights():
    class Meta(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.shift = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            weights = {"weight": self.inner.weight + self.shift, "bias": self.inner.bias}
            return torch.func.functional_call(self.inner, weights, (x,))

    return Meta(), (torch.randn(2, 4),), {}


@entry
def module_made_in_forward():
    class Makes(nn.Module):
        def forward(self, x):
            return nn.Softmax(dim=-1)(nn.Flatten()(x))

    return Makes(), (torch.randn(2, 3, 4),), {}


# inputs, outputs, types -------------------------------------------------------------------------------------


@style("none_and_nested_outputs", x(3, 4), a=linear(4, 4))
def _(self, x):
    return {"loss": None, "out": (self.a(x), [x, {"deep": x.sum()}])}


@style("input_given_back", x(3, 4), x(2, 5))
def _(self, x, unused):
    return x, x.abs()


@style("mixed_dtypes", x(3, 4), ids(3, 4, high=5))
def _(self, x, i):
    half = x.half().float() + i
    return half * (i > 2) + (i // 2).double() - x.to(torch.int64).clamp(-1, 1)


@style("whole_numbers_and_bits", ids(3, 4, high=16))
def _(self, i):
    bits = (i[..., None] >> torch.arange(4)) & 1
    return bits.bool().any(-1) ^ (i % 2 == 0), bits.sum(-1)


@style("scalars_and_size_one", x(1, 4), x(1))
def _(self, x, s):
    return (x * s + x.mean()).squeeze(0), s.squeeze()


@style("nothing_selected", x(3, 4))
def _(self, x):
    return torch.cat([x[:0], x, x.new_zeros(0, 4)])


@style("sizes_used_as_numbers", x(3, 4))
def _(self, x):
    b, d = x.shape
    return x.reshape(b * d).view(b, d) / math.sqrt(x.size(-1)) + x.numel()


@style("strided_and_reversed", x(2, 8))
def _(self, x):
    return x[:, ::2] + x[:, 1::2], x.flip(-1)[:, ::3]


# more of what modules compute -------------------------------------------------------------------------------


@style("differences", x(3, 6), a=linear(6, 6))
def _(self, x):
    y = self.a(x)
    return y[:, 1:] - y[:, :-1], torch.diff(y, dim=0)


@style("shifted_onto_itself", x(2, 6, 4), a=linear(4, 4))
def _(self, x):
    y = self.a(x)
    return y + F.pad(y, (0, 0, 1, 0))[:, :-1] + F.pad(y, (0, 0, 0, 1))[:, 1:]


@style("delayed_beside_a_cache", x(2, 7, 8), a=linear(8, 4), b=linear(8, 4))
def _(self, x):
    last = F.pad(x.transpose(1, 2), (2, 0))[..., -2:]  # cuts the positions where the slice below is no part of them
    delayed = torch.cat([self.a(x.new_zeros(2, 1, 8)), self.a(x)[:, :-1]], 1)
    return torch.cat([self.b(x), delayed], -1), last


def moved_up(x, dim):
    y = x.clone()
    y.narrow(dim, 0, 5).copy_(x.narrow(dim, 1, 5))
    return y


@style("rows_moved_up_in_place", x(6, 6))
def _(self, x):
    return moved_up(x, 0).flatten(0, 1).softmax(0), moved_up(x, 0), x @ moved_up(x, 0)


@style("columns_moved_up_beside_halves", x(6, 6))
def _(self, x):
    weight = x.softmax(1)
    first, second = weight[:2].chunk(2, 1)
    return moved_up(x, 1), x @ weight, first * second.sigmoid()


@style("channel_shuffled", x(2, 6, 4, 4), a=lambda: nn.Conv2d(6, 6, 1, groups=3))
def _(self, x):
    return F.channel_shuffle(self.a(x), 3)


@style("routed_to_the_best", x(6, 4), gate=linear(4, 3), w=lambda: nn.Parameter(torch.randn(3, 4, 4)))
def _(self, x):
    weight, expert = self.gate(x).softmax(-1).topk(2, -1)
    return (torch.einsum("td,tkdf->tkf", x, self.w[expert]) * weight[..., None]).sum(1)


@style("triplet_and_cosine", x(3, 5), x(3, 5), x(3, 5))
def _(self, a, b, c):
    return F.triplet_margin_loss(a, b, c), F.cosine_embedding_loss(a, b, torch.tensor([1, -1, 1]))


@style("soft_labels_and_weights", x(3, 5), ids(3, high=5), weight=lambda: nn.Buffer(torch.rand(5)))
def _(self, x, y):
    return F.cross_entropy(x, x.softmax(-1)) + F.cross_entropy(x, y, weight=self.weight, reduction="none")


@style("covariance_and_trace", x(4, 6))
def _(self, x):
    return torch.cov(x), torch.trace(x @ x.T), torch.einsum("ii->i", x @ x.T)


@style("kronecker_adapter", x(3, 4), a=lambda: nn.Parameter(torch.randn(2, 2)), b=lambda: nn.Parameter(torch.randn(2, 2)))
def _(self, x):
    return x @ torch.kron(self.a, self.b)


@style("solved", x(2, 4, 4), x(2, 4, 3))
def _(self, a, b):
    return torch.linalg.solve(a @ a.mT + torch.eye(4), b)


@style("bucketed_positions", x(3, 4), e=lambda: nn.Embedding(6, 4))
def _(self, x):
    return self.e(torch.bucketize(x, torch.linspace(-1, 1, 5)))


@style("unpooled", x(2, 3, 8))
def _(self, x):
    pooled, where = F.max_pool1d(x, 2, return_indices=True)
    return F.max_unpool1d(pooled, where, 2)


@style("same_size_windows_and_strides", x(2, 3, 5), a=lambda: nn.Conv1d(3, 3, 5, stride=2, padding=4))
def _(self, x):
    return self.a(x)  # as many positions as before, and not the same ones


@style("neighbours_side_by_side", x(2, 7, 4), a=linear(12, 4))
def _(self, x):
    after, before = F.pad(x[:, 1:], (0, 0, 0, 1)), F.pad(x[:, :-1], (0, 0, 1, 0))
    return self.a(torch.cat([after, x, before], 2)) + before * x


@style("given_back", x(3, 4))
def _(self, x):
    return x


@style("reductions_of_long_names", x(3, 4))
def _(self, x):
    loss = F.binary_cross_entropy_with_logits(x, x.sigmoid())
    return loss.sqrt(), torch.special.log_ndtr(x.sum()), torch.linalg.matrix_norm(x) * F.softplus(x.mean())


@style("numbers_of_numpy", x(3, 4), a=linear(4, 4))
def _(self, x):
    import numpy as np

    return self.a(x) / np.sqrt(4) + np.float64(0.5)


# sequences of different lengths -----------------------------------------------------------------------------


@style("packed_lstm", x(3, 5, 4), lambda: torch.tensor([2, 5, 3]),
       lstm=lambda: nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), read=linear(12, 2))
def _(self, x, lengths):
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, (h, _) = self.lstm(packed)
    out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
    return self.read(out), h[-1]


@style("packed_gru_with_residual", x(5, 3, 4), gru=lambda: nn.GRU(4, 4))
def _(self, x):
    out, _ = self.gru(nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2]))
    return x + nn.utils.rnn.pad_packed_sequence(out)[0]


@style("packed_with_total_length", x(3, 7, 4), rnn=lambda: nn.RNN(4, 6, batch_first=True))
def _(self, x):
    out, _ = self.rnn(nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2], batch_first=True))
    return nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=7)[0]


@style("sequences_packed", x(5, 4), x(3, 4), gru=lambda: nn.GRU(4, 6, batch_first=True))
def _(self, a, b):
    packed, h = self.gru(nn.utils.rnn.pack_sequence([b, a], enforce_sorted=False))
    return nn.utils.rnn.pad_sequence(nn.utils.rnn.unpack_sequence(packed), batch_first=True), h


@style("lstm_projected", x(5, 3, 4), lstm=lambda: nn.LSTM(4, 8, 2, proj_size=3, bidirectional=True))
def _(self, x):
    out, (h, c) = self.lstm(x)
    return out, h, c


@style("lstm_projected_apart", x(5, 3, 4), lstm=lambda: nn.LSTM(4, 8, 2, proj_size=3), read=linear(3, 2))
def _(self, x):
    return self.read(self.lstm(x)[0])


@style("lstm_of_one_unit", x(5, 3, 4), lstm=lambda: nn.LSTM(4, 1, 2, bidirectional=True))
def _(self, x):
    return self.lstm(x)[0]


@entry
def packed_input():
    rows = [torch.randn(4, 3), torch.randn(2, 3)]
    return nn.GRU(3, 5, 2), (nn.utils.rnn.pack_sequence(rows),), {}


# entries chosen for each example ----------------------------------------------------------------------------

hugging_face("gpt2_classifier", "GPT2Config", "GPT2ForSequenceClassification", ids(3, 6), n_layer=1, n_embd=16, n_head=4,
             vocab_size=40, use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=39)


@style("last_entry_of_each", x(3, 5, 4), ids(3, high=5), a=linear(4, 6))
def _(self, x, last):
    return self.a(x)[torch.arange(x.shape[0], device=x.device), last]


@style("top_entries_of_each", x(3, 5, 4), a=linear(4, 6))
def _(self, x):
    best = self.a(x).sum(-1).topk(2).indices
    rows = torch.arange(len(x)).unsqueeze(1)
    return x[rows, best] + x[rows.expand(-1, 2), best].flip(1)


@style("entries_by_list", x(3, 5, 4), ids(3, high=5))
def _(self, x, i):
    return x[range(3), i], x[[0, 2, 1], i], x[[0, 1, 2], [4, 0, 2]]


@style("entries_in_another_order", x(3, 5, 4), ids(3, high=5))
def _(self, x, i):
    n = torch.arange(3)
    changed = torch.arange(3)
    changed[0] = 2
    return x[n.flip(0), i] + x[n * 2 - n, i] + x[n[i % 3], i] + x[changed, i], x[torch.arange(0, 3, 2), i[::2]]


@style("entries_written_for_each", x(3, 5, 4), ids(3, high=5), x(3, 4))
def _(self, x, i, v):
    y = x.clone()
    y[torch.arange(3), i] = v
    return y.index_select(0, torch.arange(3)) + x


@style("index_between_indices", x(3, 3, 3, 3), ids(3, high=3))
def _(self, x, i):
    return x[:, i, 0, i], x[:, i, :, i], x[:, i, None, i], x[torch.arange(3), :, i]


@style("one_counter_for_two_axes", x(3, 3, 4), linear=linear(4, 4))
def _(self, x):
    n = torch.arange(x.shape[0])
    return self.linear(x)[n[:, None], n[None]], x[n, n]


@style("writes_through_views", x(2, 6, 4), a=linear(4, 8), b=linear(8, 3))
def _(self, x):
    y = self.a(x)
    y[:, 1:3].mul_(2)
    y.transpose(0, 1)[::2].add_(1)
    y.view(2, 6, 2, 4)[:, :, 0].tanh_()
    return self.b(y)


if hasattr(F, "grouped_mm"):  # since torch 2.10

    @style("experts_in_one_product", x(12, 8), route=linear(8, 3), up=lambda: nn.Parameter(torch.randn(3, 16, 8)),
           down=lambda: nn.Parameter(torch.randn(3, 16, 8)))
    def _(self, x):
        gates, expert = self.route(x).softmax(-1).max(-1)
        order = expert.argsort()
        ends = torch.histc(expert.float(), bins=3, min=0, max=2).cumsum(0).to(torch.int32)
        hidden = F.grouped_mm(x[order], self.up.transpose(1, 2), offs=ends).relu()
        out = F.grouped_mm(hidden, self.down, offs=ends) * gates[order, None]
        return torch.zeros_like(x).index_add(0, order, out)

    @style("products_of_groups", x(3, 8, 16), x(16, 16), lambda: torch.tensor([4, 8, 16], dtype=torch.int32))
    def _(self, x, y, ends):
        return F.grouped_mm(x, x.transpose(1, 2).contiguous()), F.grouped_mm(y, y.t(), offs=ends), F.grouped_mm(x, y, offs=ends)


# windows ----------------------------------------------------------------------------------------------------


@style("overlapping_chunks", x(2, 8, 6), a=linear(6, 5), b=linear(5, 3))
def _(self, x):
    chunks = self.a(x).view(2, 2, 4, 5)
    size, stride = list(chunks.size()), list(chunks.stride())
    size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
    return self.b(chunks.as_strided(size, stride)).softmax(2)


@style("any_strides", x(4, 4, 4))
def _(self, x):
    x = x + 1
    swapped = x.as_strided((4, 4, 4), (4, 16, 1))
    diagonal = x.as_strided((4, 4), (20, 1))
    doubled = x.as_strided((4, 3, 4), (16, 0, 1))
    shifted = x.as_strided((3, 4, 4), (16, 4, 1), 16)
    return swapped, diagonal, doubled, shifted, x.as_strided((3, 4, 4), (16, 4, 1), 2), x.as_strided((4, 16), (16, 1))


@style("strides_of_another_order", x(3, 5, 5), x(5, 4, 5, 6), x(2, 5, 3))
def _(self, x, y, z):
    turned = y.permute(2, 0, 3, 1).as_strided((5, 3, 5, 6), (120, 30, 6, 1))
    return x.transpose(1, 2).as_strided((3, 5, 5), (25, 5, 1)), turned, \
        z.mT.contiguous().as_strided((2, 2, 5), (15, 5, 1)).softmax(2)


@style("strides_over_more_than_the_array", x(3, 5, 4))
def _(self, x):
    return x[:2].as_strided((3, 5), (20, 1)), x[1:].as_strided((3, 5), (20, 1), 0), x[:, :, 0].as_strided((3, 5), (1, 3))


@style("windows_side_by_side", x(2, 3, 8, 6), a=linear(18, 4))
def _(self, x):
    patches = self.a(F.unfold(x, (3, 2), padding=(1, 0), stride=(3, 2)).mT), self.a(F.unfold(x[:, :, :6], (3, 2), stride=(3, 2)).mT)
    return *patches, x.unfold(2, 4, 4), x.unfold(3, 6, 1), x.unfold(2, 3, 3), x.unfold(3, 3, 2)


@style("relative_shift", x(2, 3, 5, 5), x(2, 3, 5, 5))
def _(self, scores, shifted):
    b, h, q, k = shifted.shape
    padded = torch.cat([shifted.new_zeros(b, h, q, 1), shifted], -1).view(b, h, k + 1, q)
    return (scores + padded[:, :, 1:].view(b, h, q, k)).softmax(-1)


# learned queries, repeated for each example --------------------------------------------------------------------


def heads(x, count):
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@style("learned_queries", x(2, 5, 12), queries=lambda: nn.Parameter(torch.randn(1, 3, 16)), q=linear(16, 16), k=linear(12, 16),
       v=linear(12, 16), o=linear(16, 16), q2=linear(16, 16), kv2=linear(16, 32), o2=linear(16, 16))
def _(self, x):
    rows = self.queries.expand(x.shape[0], -1, -1)
    rows = self.o(attend(heads(self.q(rows), 2), heads(self.k(x), 2), heads(self.v(x), 2)))
    k, v = self.kv2(rows).chunk(2, -1)
    return rows + self.o2(attend(heads(self.q2(rows), 2), heads(k, 2), heads(v, 2)))


@style("queries_of_a_decoder", x(2, 5, 16), queries=lambda: nn.Embedding(3, 16),
       own=lambda: nn.MultiheadAttention(16, 2, batch_first=True), read=lambda: nn.MultiheadAttention(16, 2, batch_first=True))
def _(self, x):
    place = self.queries.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
    rows = torch.zeros_like(place)
    rows = rows + self.own(rows + place, rows + place, rows)[0]
    return rows + self.read(rows + place, x, x)[0]


@style("a_key_shared_by_heads", x(2, 5, 16), q=linear(16, 32), kv=linear(16, 32), shared=linear(16, 4), o=linear(16, 16))
def _(self, x):
    k, v = heads(self.kv(x), 4).split(4, -1)
    shared = self.shared(x).unsqueeze(1).expand(-1, 4, -1, -1)
    return self.o(attend(heads(self.q(x), 4), torch.cat([k, shared], -1), v))


@style("linear_attention", x(2, 5, 16), q=linear(16, 16), k=linear(16, 16), v=linear(16, 16), o=linear(16, 16))
def _(self, x):
    q, k, v = heads(self.q(x), 2).softmax(-1), heads(self.k(x), 2).softmax(-2), heads(self.v(x), 2)
    return self.o((q @ (k.mT @ v)).transpose(1, 2).flatten(2))


# torch.func ---------------------------------------------------------------------------------------------------


@style("vmap", x(3, 4), a=linear(4, 5))
def _(self, x):
    return torch.vmap(lambda row: torch.tanh(row))(self.a(x))


@style("vmap_heads", x(2, 6, 8), q=linear(8, 8), k=linear(8, 8), v=linear(8, 6))
def _(self, x):
    def head(q, k, v):
        return torch.softmax(q @ k.mT / 2, -1) @ v

    q, k, v = (part(x).unflatten(-1, (2, -1)) for part in (self.q, self.k, self.v))
    return torch.vmap(torch.vmap(head, in_dims=(1, 0, 1), out_dims=1))(q, k.transpose(1, 2), v).flatten(-2)


@style("vmap_square", x(3, 3, 3))
def _(self, x):
    return torch.vmap(torch.vmap(lambda row: row.cumsum(0), in_dims=1, out_dims=1), in_dims=2, out_dims=1)(x)


@style("vmap_trees", x(7, 6), x(6), x(2, 7))
def _(self, a, b, c):
    def each(given):
        return {"s": given["a"] * given["rest"][0], "t": given["rest"][1].sum() + given["a"].sum(), "u": given["rest"][0] * 2}

    return torch.vmap(each, in_dims=({"a": 0, "rest": (None, 1)},), out_dims={"s": -1, "t": 0, "u": 0})({"a": a, "rest": (b, c)})


@style("vmap_ensemble", x(5, 4), members=lambda: nn.ModuleList(nn.Sequential(
    nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval() for _ in range(3)))
def _(self, x):
    parameters, buffers = torch.func.stack_module_state(list(self.members))
    return torch.vmap(lambda *state: torch.func.functional_call(self.members[0], state, (x,)))(parameters, buffers).mean(0)


@entry
def vmap_ensemble_kept_apart():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            members = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(3)]
            stacked, _ = torch.func.stack_module_state(members)
            self.stacked = nn.ParameterDict({name.replace(".", "_"): part.detach() for name, part in stacked.items()})
            self.one = members[0].to("meta").requires_grad_(False)

        def forward(self, x):
            parts = {name.replace("_", "."): part for name, part in self.stacked.items()}
            return torch.vmap(lambda own: torch.func.functional_call(self.one, own, (x,)))(parts)

    return Ensemble(), (torch.randn(5, 4),), {}


@style("vmap_experts", x(2, 7, 8), w=lambda: nn.Parameter(torch.randn(4, 8, 3)))
def _(self, x):
    gate = torch.softmax(x.mean(-1), -1)
    y = torch.vmap(torch.vmap(lambda w, tokens: tokens @ w, (0, None)), (None, 0))(self.w, x)
    return (y * gate[:, None, :, None]).sum(1)


@style("vmap_writes", x(4, 6))
def _(self, x):
    def each(row):
        row.mul_(2)
        row[0] = row[1]
        row.view(2, 3)[1].add_(row[:3])
        return row.sum()

    y, z = x * 1, x.T * 1
    return torch.vmap(each)(y), y, torch.vmap(lambda row: row.add_(1).sum(), in_dims=1)(z), z


@style("vmap_mask", x(5, 4))
def _(self, x):
    at = torch.arange(len(x))
    causal = torch.vmap(torch.vmap(lambda i, j: i >= j, (None, 0)), (0, None))(at, at)
    scores = (x @ x.T).masked_fill(~causal, float("-inf"))
    return (scores + 1 if causal.any() else scores).softmax(-1) @ x


@style("vmap_reads", x(3, 4, 6), ids(3, 2, high=4))
def _(self, x, i):
    return torch.vmap(lambda rows, at: rows[at])(x, i), torch.vmap(lambda rows: rows.topk(2, 0).values)(x)


@style("vmap_closure", x(3, 4, 6), a=linear(6, 5))
def _(self, x):
    h = self.a(x)
    return torch.vmap(lambda rows: torch.vmap(lambda row: h.sum((0, 1)) * (row * rows).sum(0))(rows))(h)


@style("vmap_chunks", x(7, 6), a=linear(6, 3))
def _(self, x):
    return torch.vmap(self.a, chunk_size=3)(x)


@style("vmap_noise", x(7, 6), a=linear(6, 3))
def _(self, x):
    return torch.vmap(lambda row: F.dropout(self.a(row) + torch.randn(3), 0.5), randomness="different")(x)


@style("per_sample_gradients", x(5, 4), a=linear(4, 3))
def _(self, x):
    def loss(parameters, row):
        return torch.func.functional_call(self.a, parameters, (row[None],)).square().mean()

    parameters = dict(self.a.named_parameters())
    gradients, values = torch.vmap(torch.func.grad_and_value(loss), (None, 0))(parameters, x)
    return values, sum(each.flatten(1).norm(dim=1) for each in gradients.values())


@style("inner_step", x(5, 4), a=linear(4, 4))
def _(self, x):
    def loss(parameters):
        return torch.func.functional_call(self.a, parameters, (x,)).square().mean()

    parameters = dict(self.a.named_parameters())
    steps = torch.func.grad(loss)(parameters)
    return torch.func.functional_call(self.a, {name: each - 0.1 * steps[name] for name, each in parameters.items()}, (x,))


@style("jacobians", x(5, 4), a=linear(4, 3))
def _(self, x):
    def each(row):
        return torch.tanh(self.a(row))

    return torch.vmap(torch.func.jacrev(each))(x), torch.vmap(torch.func.jacfwd(each))(x)


@style("force_field", x(5, 3), a=linear(3, 8), b=linear(8, 1))
def _(self, x):
    with torch.enable_grad():
        x = x.requires_grad_()
        energy = self.b(torch.tanh(self.a(x))).sum()
        return energy, -torch.autograd.grad(energy, x)[0]


# flex_attention -----------------------------------------------------------------------------------------------


def flexible(score_mod=None, mask_mod=None, groups=1, compiled=False, **options):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.ModuleList([nn.Linear(16, 4 * 8), nn.Linear(16, 4 // groups * 8), nn.Linear(16, 4 // groups * 6)])
            self.bias, self.table, self.out = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 12)), nn.Linear(24, 16)
            self.register_buffer("document", torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]]))

        def forward(self, x):
            q, k, v = (part(x).unflatten(-1, (-1, size)).transpose(1, 2) for part, size in zip(self.qkv, (8, 8, 6), strict=True))
            run = torch.compile(flex_attention) if compiled else flex_attention
            mask = create_block_mask(mask_mod(self), 2, None, 6, 6, device=x.device) if mask_mod else None
            made = run(q, k, v, score_mod(self) if score_mod else None, mask, enable_gqa=groups > 1, **options)
            made, *rest = made if isinstance(made, tuple) else (made,)
            return self.out(made.transpose(1, 2).flatten(2)), *rest

    return Attention(), (torch.randn(2, 6, 16),), {}


ZOO["flex_attention"] = lambda: flexible(lambda self: lambda score, b, h, q, k: torch.where(q >= k, score, -float("inf")), compiled=True)
ZOO["flex_attention_groups"] = lambda: flexible(lambda self: lambda score, b, h, q, k: score + self.bias[h] * (q - k), groups=2)
ZOO["flex_attention_table"] = lambda: flexible(lambda self: lambda score, b, h, q, k: 20 * torch.tanh(score + self.table[h][q - k + 6]))
ZOO["flex_attention_blocks"] = lambda: flexible(
    mask_mod=lambda self: lambda b, h, q, k: (self.document[b, q] == self.document[b, k]) & (q >= k), groups=2, return_lse=True)


# few bits -----------------------------------------------------------------------------------------------------


def feed_forward():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def quantised(make):
    """Torch says of all its quantisation that it moves to another package."""

    @functools.wraps(make)
    def quiet():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return entry(quiet)


@quantised
def quantised_dynamic():
    return torch.ao.quantization.quantize_dynamic(feed_forward(), {nn.Linear}), (torch.randn(3, 5, 8),), {}


@quantised
def quantised_half():
    return torch.ao.quantization.quantize_dynamic(feed_forward(), {nn.Linear}, dtype=torch.float16), (torch.randn(3, 8),), {}


@quantised
def quantised_lstm():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.read(x)[0])

    return torch.ao.quantization.quantize_dynamic(Reader().eval(), {nn.LSTM, nn.Linear}), (torch.randn(2, 5, 6),), {}


@quantised
def quantised_static():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
            self.wide, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
            self.more, self.add = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2), torch.ao.nn.quantized.FloatFunctional()
            self.line, self.head = nn.Conv1d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            x = self.relu(self.norm(self.wide(self.into(x))))
            x = self.add.cat([self.add.add(x[:, :, ::2, ::2], self.more(x)), self.more(x)], 1)[:, 4:12]
            return self.out(self.head(self.line(x.flatten(2)).mean(-1)))

    net = torch.ao.quantization.fuse_modules(Net().eval(), [["wide", "norm", "relu"]])
    net.qconfig = torch.ao.quantization.default_qconfig
    net, x = torch.ao.quantization.prepare(net), torch.randn(2, 3, 6, 6)
    net(x)
    return torch.ao.quantization.convert(net), (x,), {}


@quantised
def quantised_graph():
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = torch.randn(3, 8)
    net = prepare_fx(feed_forward(), torch.ao.quantization.get_default_qconfig_mapping(), (x,))
    net(x)
    return convert_fx(net), (x,), {}


@quantised
def quantised_in_training():
    net = feed_forward().train()
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    return torch.ao.quantization.prepare_qat(net), (torch.randn(3, 8),), {}


@quantised
def quantised_embedding():
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)).eval()
    net[0].qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    return torch.ao.quantization.convert(torch.ao.quantization.prepare(net)), (torch.randint(0, 10, (3, 4)),), {}


@quantised
def quantised_embedding_bag():
    net = nn.Sequential(nn.EmbeddingBag(10, 8, mode="sum"), nn.Linear(8, 4)).eval()
    net[0].qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    return torch.ao.quantization.convert(torch.ao.quantization.prepare(net)), (torch.randint(0, 10, (3, 4)),), {}


@style("rounded_by_hand", x(3, 8), a=linear(8, 4))
def _(self, x):
    rows = torch.full((4,), 0.05), torch.zeros(4, dtype=torch.long)
    x = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8).dequantize()
    w = torch.quantize_per_channel(self.a.weight.float(), *rows, 0, torch.qint8).dequantize()
    return F.linear(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127), w.to(x.dtype), self.a.bias)


@style("four_bits", x(3, 8), packed=lambda: nn.Buffer(torch.randint(0, 255, (5, 4), dtype=torch.uint8)),
       scale=lambda: nn.Buffer(torch.rand(5)))
def _(self, x):
    w = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).to(x.dtype) - 8
    return F.linear(x, w * self.scale[:, None])


class EightBits(torch.Tensor):
    """A weight of eight bits with a scale for each row, as libraries wrap them."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.whole.to(x.dtype)) * weight.scale.to(x.dtype) + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].whole), func(args[0].scale))
        raise NotImplementedError(func)


@entry
def wrapped_weight():
    net = feed_forward()
    net[0].weight = nn.Parameter(EightBits(torch.randint(-128, 127, (16, 8), dtype=torch.int8), torch.rand(16)), False)
    return net, (torch.randn(3, 8),), {}
