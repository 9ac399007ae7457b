"""The same circuit always gives the same picture, and it is the one that was looked at."""

import json
import xml.etree.ElementTree as ET

import pytest

from circuitlab.diagram.check import look
from circuitlab.diagram.scene import Scene
from circuitlab.diagram.svg import render
from tests.golden import FOLDER, scenes

SCENES = dict(scenes())


@pytest.mark.parametrize("name", SCENES)
def test_scene_is_the_golden_one(name):
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    assert SCENES[name].to_dict() == golden
    assert Scene.from_dict(golden).to_dict() == golden


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", SCENES)
def test_svg_is_the_golden_one(name, theme):
    text = render(Scene.from_dict(json.loads((FOLDER / f"{name}.json").read_text())), theme)
    assert text == (FOLDER / f"{name}.{theme}.svg").read_text()
    root = ET.fromstring(text)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "title", "desc", "rect", "path", "circle", "text"}
    assert not any(key.lower().startswith("on") for element in root.iter() for key in element.attrib)


@pytest.mark.parametrize("name", SCENES)
def test_golden_scene_has_no_fault(name):
    assert look(SCENES[name]).ok


def test_crossings_and_bends_only_fall():
    """Of the pictures that were looked at; lower these numbers when a picture gets better."""
    most = {
        "mlp": (0, 0),
        "scaled_attention": (2, 5),
        "multi_head": (9, 10),
        "identity_resnet": (12, 8),
        "unet": (24, 18),
        "visual_attention": (45, 23),
        "gpt": (9, 16),
    }
    for name, (crossings, bends) in most.items():
        found = look(SCENES[name])
        assert found.crossings <= crossings, (name, found.crossings)
        assert found.bends <= bends, (name, found.bends)
