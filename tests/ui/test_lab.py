"""The lab: a diagram and the modules of its hidden wires, linked in the browser."""

import pytest
from playwright.sync_api import TimeoutError as NotSeen
from playwright.sync_api import expect

from tests.ui.test_notebook import LIVE, shot

pytestmark = pytest.mark.browser

CELL = """import torch
import circuitlab as cl
from circuitlab.gallery.gpt import GPT
torch.manual_seed(0)
model = GPT(24, 16, width=16, heads=2, layers=2)
batches = torch.randint(24, (16, 16)).split(8)
lab = cl.explore(model, batches[0], batches=batches, method="keys", depth=2, text=lambda batch, example, position: f"«{position}»")
lab"""


def click(page, x, y, wanted):
    """A click in a plotly figure, which listens to the pointer before it takes one: again, if it was too soon."""
    for again in (True, True, False):
        page.mouse.move(x - 1, y)
        page.mouse.move(x, y)
        page.wait_for_timeout(400)
        page.mouse.click(x, y)
        try:
            wanted.first.wait_for(timeout=15_000)
            return
        except NotSeen:
            shot(page, "not_seen")
            if not again:
                raise


def test_diagram_modules_and_positions_are_linked(jupyter):
    jupyter.write("lab.ipynb", CELL)
    jupyter.run("lab.ipynb")
    page = jupyter.page
    first, second = jupyter.kernel("print(*lab.partitions)").split()
    live = page.locator(LIVE).first
    live.scroll_into_view_if_needed()

    jupyter.kernel("lab.wire = list(lab.partitions)[1]")
    chosen = page.locator(".widget-dropdown select").first
    expect(chosen).to_have_value(second, timeout=20_000)
    live.locator("rect[data-role=block][data-block='blocks.0.mlp']").click(position={"x": 5, "y": 5})
    expect(chosen).to_have_value(first, timeout=20_000)
    assert jupyter.kernel("print(lab.wire)") == first
    shot(page, "lab_block")

    page.locator(".widget-dropdown select").nth(1).select_option(index=2)
    page.locator("table td", has_text="%").first.wait_for()
    assert jupyter.kernel("print(lab.module)") == "1"
    assert first in jupyter.kernel("print(*lab.diagram.overlay)")
    shot(page, "lab_module")

    page.locator(".plotly .xy").first.scroll_into_view_if_needed()
    box = page.locator(".plotly .nsewdrag").first.bounding_box()
    click(page, box["x"] + box["width"] / 2, box["y"] + 8, page.locator("b", has_text="module 0"))
    assert jupyter.kernel("print(lab.module)") == "0"
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    shot(page, "lab_dark")
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")


WALK = """import torch
import circuitlab as cl
from circuitlab.gallery.digits import CNN, digits, train
data = digits()
a, b = (train(lambda: CNN(8, torch.nn.BatchNorm2d), data, seed, 2) for seed in (0, 1))
path = cl.interpolate(a, b, [data.train], "cross_entropy", points=5, metrics="accuracy")
walk = path.view(points=5)
walk"""


def test_a_walk_between_two_models(jupyter):
    jupyter.write("walk.ipynb", WALK)
    jupyter.run("walk.ipynb")
    page = jupyter.page
    page.locator(".widget-slider").first.wait_for()
    handle = page.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    shot(page, "walk")
    before = jupyter.kernel("print(walk.diagram.overlay['readout.linear'])")
    handle.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".widget-readout").first).to_have_text("0.25", timeout=20_000)
    assert jupyter.kernel("print(walk.alpha)") == "0.25"
    assert float(jupyter.kernel("print(walk.diagram.overlay['readout.linear'])")) > float(before)

    bars = page.locator(".plotly .barlayer .point path")
    bars.first.scroll_into_view_if_needed()
    box = max((bar.bounding_box() for bar in bars.all()), key=lambda box: box["width"])
    click(page, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, page.locator(".legendtext", has_text="all"))
    assert jupyter.kernel("print(walk.part.layers == walk.layers, len(walk.layers))") == "True 1"
    shot(page, "walk_layer")
