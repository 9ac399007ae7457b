"""The wires of real models, exactly: which axes are one, where they sit, how they are named."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.zoo import ZOO

import circuitlab as cl
from circuitlab.diagram.layout import draw
from circuitlab.gallery.gpt import GPT
from circuitlab.gallery.llama import Llama


def dims(circuit, name):
    return [tuple(wire.name for wire in dim) for dim in circuit.parameters[name]]


@pytest.fixture(scope="module")
def gpt():
    return cl.trace(GPT(32, 16, 24, 3, 2), torch.zeros(2, 7, dtype=torch.long))


def test_one_residual_wire_through_everything(gpt):
    wire = gpt.wires["d"]
    assert wire.size == 24
    assert wire.permutable
    holders = {place[0] for place in wire.places}
    named = {name for name, _ in GPT(32, 16, 24, 3, 2).named_parameters()}
    hidden = {n for n in named if n.endswith(("qkv.bias", "up.bias"))}
    assert holders == named - hidden


def test_query_weight_reads_heads_times_size_although_linear_ran_first(gpt):
    (rows,), columns = dims(gpt, "blocks.0.attention.qkv.weight")
    assert columns == ("d",)
    parts = gpt.wires[rows].parts
    assert [(start, stop) for start, stop, _ in parts] == [(0, 24), (24, 48), (48, 72)]
    (q_head, q_size), (k_head, k_size), (v_head, v_size) = (names for _, _, names in parts)
    assert q_head == k_head == v_head
    assert q_size == k_size != v_size  # queries meet keys; values go to the output
    assert gpt.wires[q_head].size == 3
    assert gpt.wires[q_size].size == 8
    assert dims(gpt, "blocks.0.attention.out.weight") == [("d",), (v_head, v_size)]


def test_layers_have_heads_of_their_own(gpt):
    first = gpt.wires[dims(gpt, "blocks.0.attention.qkv.weight")[0][0]].parts[0][2]
    second = gpt.wires[dims(gpt, "blocks.1.attention.qkv.weight")[0][0]].parts[0][2]
    assert set(first).isdisjoint(second)


def test_one_hidden_wire_for_up_and_down(gpt):
    up, down = dims(gpt, "blocks.0.mlp.up.weight"), dims(gpt, "blocks.0.mlp.down.weight")
    assert up[0] == down[1]
    hidden = gpt.wires[up[0][0]]
    assert hidden.permutable
    assert hidden.places == (("blocks.0.mlp.up.weight", 0, 0, None), ("blocks.0.mlp.up.bias", 0, 0, None),
                             ("blocks.0.mlp.down.weight", 1, 0, None))


def test_tied_read_out_gives_the_vocabulary(gpt):
    out = gpt.tensor(gpt.outputs[0])
    assert [len(dim) for dim in out.dims] == [1, 1, 1]
    assert out.dims[2] == gpt.tensor("tokens.weight").dims[0]
    assert not gpt.wires[out.dims[2][0]].permutable


def test_queries_and_keys_are_positions_of_one_wire(gpt):
    scores = next(gpt.tensor(op.outputs[0]) for op in gpt.ops if op.kind == "contract")
    assert scores.dims[-1] == scores.dims[-2]
    assert gpt.wires[scores.dims[-1][0]].kind == "position"
    assert not gpt.wires[scores.dims[-1][0]].permutable


def test_grouped_queries_split_the_heads():
    circuit = cl.trace(Llama(32, 16, 4, 2, 1), torch.zeros(2, 7, dtype=torch.long))
    q, k = dims(circuit, "layers.0.attention.q.weight")[0], dims(circuit, "layers.0.attention.k.weight")[0]
    assert [circuit.wires[n].size for n in q] == [2, 2, 4] or [circuit.wires[n].size for n in q][:2] == [2, 2]
    assert q[0] == k[0]  # the group of heads that a key-value head serves
    assert len(q) == len(k) + 1
    hidden = {dims(circuit, f"layers.0.mlp.{name}.weight")[0] for name in ("gate", "up")}
    assert hidden == {dims(circuit, "layers.0.mlp.down.weight")[1]}


def test_size_alone_never_makes_two_axes_one():
    circuit = cl.trace(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)), torch.zeros(5, 5))
    wires = [circuit.tensor(circuit.inputs[0]).dims, circuit.tensor(circuit.outputs[0]).dims, circuit.tensor("0.weight").dims]
    assert len({name for found in wires for dim in found for name in dim}) == 4


def test_residual_makes_two_axes_one():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.a(x)

    circuit = cl.trace(Residual(), torch.zeros(2, 6))
    assert circuit.tensor("a.weight").dims[0] == circuit.tensor("a.weight").dims[1]


def test_names_given_by_the_user():
    circuit = cl.trace(nn.Linear(3, 4), torch.zeros(2, 5, 3), names={"input": "batch seq model"})
    assert [name for dim in circuit.tensor(circuit.inputs[0]).dims for name in dim] == ["batch", "seq", "model"]
    renamed = circuit.rename({"model": "stream.m"})
    assert renamed.wires["stream.m"].label == "m"
    assert [d[0].name for d in renamed.parameters["weight"]][1] == "stream.m"
    with pytest.raises(cl.CircuitlabError, match="did you mean"):
        circuit.rename({"modle": "m"})
    with pytest.raises(cl.CircuitlabError, match="two wires"):
        circuit.rename({"model": "seq"})


def test_names_of_a_wrong_number_say_so():
    with pytest.raises(cl.CircuitlabError, match="input"):
        cl.trace(nn.Linear(3, 4), torch.zeros(2, 3), names={"input": "batch seq model"})


def test_a_part_is_permuted_inside_its_whole():
    torch.manual_seed(0)
    model = GPT(32, 16, 24, 3, 1).double().eval()
    tokens = torch.randint(0, 32, (2, 7))
    circuit = cl.trace(model, tokens)
    permutable = {w.name: torch.randperm(w.size) for w in circuit.wires.values() if w.permutable}
    assert len(permutable) == 5  # residual, heads, key size, value size, hidden
    shuffled = circuit.permute(model, permutable)
    assert (shuffled(tokens) - model(tokens)).abs().max() < 1e-12
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), shuffled.parameters()))


def test_permuting_a_frozen_wire_gives_its_reason(gpt):
    frozen = next(w for w in gpt.wires.values() if w.kind == "vocab")
    with pytest.raises(cl.CircuitlabError, match="not permutable"):
        gpt.permute(GPT(32, 16, 24, 3, 2), {frozen.name: torch.randperm(frozen.size)})


def test_a_circuit_is_a_plain_value(gpt, tmp_path):
    import pickle

    assert pickle.loads(pickle.dumps(gpt)) == gpt
    gpt.save(tmp_path / "gpt.json")
    assert cl.load(tmp_path / "gpt.json") == gpt
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpt.title = "other"


def test_jaxtyping_annotations_name_the_axes():
    class Float:  # as jaxtyping.Float[Tensor, "b t d"] describes itself
        dim_str = "sentences words features"

    class Model(nn.Module):
        def forward(self, x: Float):
            return x.relu()

    circuit = cl.trace(Model(), torch.zeros(2, 3, 4))
    assert list(circuit.wires) == ["sentences", "words", "features"]


def test_numbers_that_go_through_python_are_seen_to_leave():
    class Scaled(nn.Module):
        def forward(self, x):
            return x * x.max().item()

    circuit = cl.trace(Scaled(), torch.randn(3, 4))
    assert [op.fn for op in circuit.ops] == ["max", "item", "mul"]
    folded = circuit.text(depth=0)
    assert "over" not in folded  # no wire passes over the module as a whole

    class Numpy(nn.Module):
        def forward(self, x):
            return torch.as_tensor(x.detach().numpy() * 2)

    circuit = cl.trace(Numpy(), torch.randn(3))
    assert [op.fn for op in circuit.opaque] == ["as_tensor"]
    assert "hatch" in circuit.svg()


def test_what_chance_does_alike_to_all_leaves_wires_permutable():
    model, (x,), _ = ZOO["chance"]()
    circuit = cl.trace(model, x)
    assert circuit.parameters["a.weight"][0][0].permutable
    report = circuit.verify(model, x)
    assert [claim.wire for claim in report.held if claim.kind == "permutable"] == ["f"]


def test_an_empty_cache_is_nothing_and_outputs_have_their_own_names():
    model, (x,), _ = ZOO["empty_cache"]()
    circuit = cl.trace(model, x)
    assert [op.kind for op in circuit.ops if op.fn == "cat"] == ["reindex"]
    assert [circuit.returned(name) for name in circuit.outputs] == ["matmul", "cat"]
    assert circuit.returns == ("[0]", "[1].cache[0].keys")
    assert "1 more output is not drawn" in circuit.text()


def test_a_long_skip_ends_at_a_flag():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(n + 4, n + 5) for n in range(30))

        def forward(self, x):
            y = x
            for layer in self.layers:
                y = layer(y).relu()
            return torch.cat([y, x], 1)

    words = [mark.text for mark in draw(cl.trace(Long(), torch.randn(2, 4))).marks if mark.role == "flag"]
    assert {"→ C", "C →"} <= set(words)


def test_compiled_modules_are_traced_eagerly():
    model = torch.compile(nn.Sequential(nn.Linear(4, 5), torch.compile(nn.Linear(5, 4)), nn.ReLU()))
    x = torch.randn(2, 4)
    circuit = cl.trace(model, x)
    assert [op.fn for op in circuit.ops] == ["linear", "linear", "relu"]
    assert set(circuit.parameters) == set(dict(model.named_parameters()))
    assert circuit.verify(model, x).ok


def kinds(name):
    model, args, kwargs = ZOO[name]()
    circuit = cl.trace(model, *args, **kwargs)
    return circuit, lambda *path: [circuit.wires[n].kind for n in dims(circuit, path[0])[path[1]]]


def test_learned_queries_are_positions_and_their_batch_is_that_of_the_input():
    circuit, kind = kinds("learned_queries")
    assert circuit.tensor(circuit.outputs[0]).dims[0] == circuit.tensor("x").dims[0]
    assert kind("queries", 1) == ["position"]
    assert kind("queries", 2) == ["width"]
    assert kind("q.weight", 0) == kind("k.weight", 0) == kind("v.weight", 0) == ["head", "head_size"]
    circuit, kind = kinds("queries_of_a_decoder")
    assert circuit.tensor(circuit.outputs[0]).dims[0] == circuit.tensor("x").dims[0]
    assert kind("queries.weight", 0) == ["position"]
    assert kind("own.out_proj.weight", 1) == kind("read.out_proj.weight", 1) == ["head", "head_size"]


def test_heads_are_groups_only_where_each_of_several_key_heads_serves_some():
    circuit, kind = kinds("a_key_shared_by_heads")
    assert kind("q.weight", 0)[0] == "head" == kind("kv.weight", 0)[0]
    _, kind = kinds("linear_attention")
    assert kind("v.weight", 0) == ["head", "head_size"]
    circuit = cl.trace(Llama(32, 16, 4, 2, 1), torch.zeros(2, 7, dtype=torch.long))
    assert [circuit.wires[n].label for n in dims(circuit, "layers.0.attention.q.weight")[0]][:2] == ["h", "g"]


def test_what_is_packed_keeps_its_batch_and_time():
    circuit, kind = kinds("packed_gru_with_residual")
    assert circuit.tensor(circuit.outputs[0]).dims == circuit.tensor("x").dims
    circuit, kind = kinds("packed_lstm")
    assert dims(circuit, "lstm.weight_hh_l0")[1] == dims(circuit, "lstm.weight_hh_l1_reverse")[1]
    assert circuit.tensor(circuit.outputs[0]).dims[1] == circuit.tensor("x").dims[1]
    circuit, kind = kinds("lstm_projected_apart")
    first, second = dims(circuit, "lstm.weight_hr_l0"), dims(circuit, "lstm.weight_hr_l1")
    assert first[0] == dims(circuit, "lstm.weight_ih_l1")[1] == dims(circuit, "lstm.weight_hh_l0")[1]
    assert set(first[0] + first[1]).isdisjoint(second[0] + second[1])
    assert all(circuit.wires[n].permutable for dim in (*first, *second) for n in dim)


def test_an_index_that_counts_leaves_the_axis_what_it_is():
    circuit, _ = kinds("last_entry_of_each")
    batch = circuit.tensor("x").dims[0]
    assert circuit.tensor(circuit.outputs[0]).dims[0] == batch == circuit.tensor("last").dims[0]
    assert circuit.wires[batch[0]].kind == "batch"
    circuit, _ = kinds("entries_in_another_order")
    assert all(circuit.tensor(output).dims[0] != circuit.tensor("x").dims[0] for output in circuit.outputs)
    circuit, _ = kinds("one_counter_for_two_axes")
    assert len({wire for dim in circuit.tensor("x").dims for wire in dim}) == 3
