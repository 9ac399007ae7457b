"""Notebook output, files by suffix, text, the command line."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

import circuitlab as cl
from circuitlab import display
from circuitlab._cli import main
from circuitlab.diagram.layout import draw
from circuitlab.diagram.scene import Scene
from circuitlab.gallery.gpt import GPT
from tests.golden import hostile


@pytest.fixture(scope="module")
def circuit():
    return cl.trace(GPT(), torch.zeros(2, 16, dtype=torch.long))


def test_mimebundle_lasts_without_kernel_or_extension(circuit):
    bundle = circuit._repr_mimebundle_()
    assert set(bundle) == {display.MIME, "image/svg+xml", "text/plain"}
    document = json.loads(json.dumps(bundle[display.MIME]))
    assert document["version"] == 1
    for name, data in document["scenes"].items():
        scene = Scene.from_dict(data)
        for block, state in scene.foldable.items():  # every folded block can be drilled into
            assert state == "open" or block in document["scenes"] or block == name
    assert set(document["scenes"]) == {"", "blocks.0", "blocks.0.attention", "blocks.0.mlp"}


def test_svg_options(circuit):
    assert "× 6" in circuit.svg()
    assert circuit.svg(depth=0) != circuit.svg(depth=1) != circuit.svg(depth=2)
    assert 'data-block="blocks.0.mlp"' in circuit.svg(block="blocks.0")
    assert "GELU" in circuit.svg(open=["blocks.0", "blocks.0.mlp"])
    assert "GELU" not in circuit.svg(depth=3, closed=["blocks.0.mlp"])
    assert 'data-wire="batch"' in circuit.svg()
    assert 'data-wire="batch"' not in circuit.svg(batch=False)
    assert circuit.svg(theme="dark") != circuit.svg(theme="light")
    heat = draw(circuit, overlay={"d": 1.0, "batch": 0.0})
    strong = {m.wire: m.width for m in heat.marks if m.role == "wire"}
    assert strong["d"] > strong["batch"]
    half = draw(circuit, overlay={"d": 1.0, "batch": 0.0}, span=(0, 2))
    assert strong["d"] > {m.wire: m.width for m in half.marks if m.role == "wire"}["d"] > strong["batch"]
    assert {m.text for m in half.marks if m.role == "legend" and m.text} == {"0", "2"}
    alone = draw(circuit, overlay={"d": 1.0})
    assert not [m for m in alone.marks if m.role == "legend"]  # one number needs no scale


@pytest.mark.parametrize("suffix", [".svg", ".html", ".json", ".dot", ".png", ".pdf"])
def test_save_by_suffix(circuit, tmp_path, suffix):
    if suffix in (".png", ".pdf") and shutil.which("rsvg-convert") is None:
        pytest.skip("needs rsvg-convert")
    path = circuit.save(tmp_path / f"net{suffix}")
    content = path.read_bytes()
    heads = {".svg": b"<svg", ".html": b"<!doctype html>", ".json": b'{"format": "circuitlab.circuit"', ".dot": b"digraph",
             ".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert content.startswith(heads[suffix])
    if suffix == ".html":
        text = content.decode()
        assert "<script" not in text
        assert "prefers-color-scheme" in text
        assert not re.search(r'(?:src|href)="http', text)


def test_unknown_suffix_lists_the_known_ones(circuit, tmp_path):
    with pytest.raises(cl.CircuitlabError, match=r"\.svg, \.html, \.json"):
        circuit.save(tmp_path / "net.gif")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "circuitlab.circuit", "version": 9}', "\x00",
                                     '{"format": "circuitlab.circuit", "version": 1, "circuit": {}}'])
def test_broken_files_are_clear_errors(tmp_path, content):
    path = tmp_path / "net.json"
    path.write_text(content)
    with pytest.raises(cl.CircuitlabError):
        cl.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(cl.CircuitlabError):
        cl.load(path)


def test_markup_in_names_does_nothing(tmp_path):
    circuit = cl.trace(hostile(), torch.zeros(2, 3))
    for depth in (0, 1, 2, 3):
        root = ET.fromstring(circuit.svg(depth=depth))
        assert not any(e.tag.endswith(("script", "img")) for e in root.iter())
    page = circuit.save(tmp_path / "net.html", depth=2).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "label=<" not in circuit.to_graphviz().source  # which Graphviz would read as markup


def test_text_tells_what_passes(circuit):
    lines = circuit.text(depth=2).splitlines()
    attention = next(line for line in lines if "▣ attention" in line)
    mlp = next(line for line in lines if "▣ mlp" in line)
    assert "x̄ d → x̄ d" in attention
    assert "d → d" in mlp
    assert "over x̄ b" in mlp
    assert all(len(line) <= 60 for line in circuit.text(width=60).splitlines())


def test_graphviz_overview(circuit):
    source = circuit.to_graphviz().source
    assert "blocks.5.attention" in source
    assert source.count("->") > 20


def test_demo(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path)]) == 0
    assert "× 6" in capsys.readouterr().out
    assert (tmp_path / "gpt.svg").read_text().startswith("<svg")
    assert (tmp_path / "gpt.html").exists()


def test_draw_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(3, 4)\n")
    command = [sys.executable, "-m", "circuitlab._cli", "draw", "mine:net", "--input", "2,3"]
    done = subprocess.run([*command, "-o", "net.svg"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "net.svg").read_text().startswith("<svg")
    assert "Linear" in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["draw", "nothing"], "pkg.mod:name"),
    (["draw", "no.such:thing"], "cannot import"),
    (["draw", "torch.nn:Nonsense"], "has no 'Nonsense'"),
    (["draw", "math:pi"], "not a torch.nn.Module"),
    (["draw", "circuitlab.gallery.gpt:GPT", "--input", "a,b"], "not a shape"),
    (["draw", "circuitlab.gallery.gpt:GPT", "--input", "1,8"], "GPT.forward raised"),
])
def test_command_line_errors_are_one_clear_message(capsys, arguments, message):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


class Cached(torch.nn.Module):
    """Gives a state of every layer beside its result, as caches and hidden states do."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        states = []
        for layer in self.layers:
            x = x + layer(x).relu()
            states.append(x * 2)
        return x, states


def test_families_of_outputs_are_left_out_and_named():
    circuit = cl.trace(Cached(), torch.zeros(2, 4))
    assert len(circuit.outputs) == 6
    for text in (circuit.svg(), circuit.text()):
        assert f"5 more outputs are not drawn, such as {circuit.outputs[1]}" in text
    assert "not drawn" not in circuit.svg(outputs="all")
    assert circuit.svg(outputs="all").count("× 2") >= 5
    with pytest.raises(cl.CircuitlabError, match="outputs"):
        circuit.svg(outputs="some")


def test_a_second_result_is_drawn():
    class Two(torch.nn.Module):
        def forward(self, x):
            return x.sum(0), x.mean(1)

    assert "not drawn" not in cl.trace(Two(), torch.zeros(2, 4)).svg()
