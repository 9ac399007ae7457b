"""The main job in a real browser: draw, unfold, select, search, dark mode, save, reopen without a kernel."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
LIVE = ".circuitlab:has(input[type=range])"
LASTING = ".circuitlab:has(.cl-path)"
SHOTS = Path(__file__).parent / "artifacts"


def shot(page, name):
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def test_draw_unfold_select_search_dark_save_reopen(jupyter, lab):
    page = jupyter.page
    jupyter.run("01_draw.ipynb")

    # the lasting drawing, by the extension
    lasting = page.locator(LASTING).first
    lasting.scroll_into_view_if_needed()
    lasting.locator("svg").wait_for()
    assert_inside(page)
    shot(page, "lasting")

    # the live one
    live = page.locator(LIVE).first
    live.scroll_into_view_if_needed()
    live.locator("rect[data-role=block][data-block='blocks.0.mlp']").wait_for()
    shot(page, "live")

    live.locator("rect[data-role=block][data-block='blocks.0.mlp']").click(position={"x": 5, "y": 5})
    live.locator("text[data-role=title][data-block='blocks.0.mlp']").wait_for()
    assert jupyter.kernel("print(view.opened)") == "('blocks.0.mlp',)"
    shot(page, "unfolded")
    live.locator("text[data-role=title][data-block='blocks.0.mlp']").click()
    live.locator("rect[data-role=block][data-block='blocks.0.mlp']").wait_for()
    assert jupyter.kernel("print(view.closed)") == "('blocks.0.mlp',)"

    wire = jupyter.kernel("print(next(w.name for w in circuit.wires.values() if w.kind == 'position'))")
    label = live.locator(f"text[data-wire='{wire}']").first
    label.click()
    page.wait_for_function(
        "name => document.querySelectorAll(`.circuitlab .cl-on[data-wire='${name}']`).length > 3", arg=wire
    )
    assert jupyter.kernel("print(view.selection)") == wire
    jupyter.kernel("view.selection = 'd'")
    page.wait_for_function("() => document.querySelectorAll(\".circuitlab .cl-on[data-wire='d']\").length > 3")

    live.locator("input[type=search]").fill("mlp.down")
    page.wait_for_function("() => document.querySelectorAll('.circuitlab .cl-found').length > 0")
    assert "blocks.0.mlp" in jupyter.kernel("print(view.found)")

    # keyboard: walk to a block and unfold it
    live.locator("input[type=search]").press("Escape")
    view = live.locator(".cl-view")
    view.focus()
    for _ in range(12):
        view.press("ArrowRight")
        if live.locator("rect.cl-at[data-role=block]").count():
            break
    view.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.circuitlab rect.cl-at[data-role=block]').length === 0")
    assert jupyter.kernel("print(len(view.opened))") == "1"

    with page.expect_download() as download:
        live.get_by_label("Save as SVG").click()
    text = Path(download.value.path()).read_text()
    assert text.startswith("<svg") and "<script" not in text
    with page.expect_download() as download:
        live.get_by_label("Save as PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as download:
        jupyter.command("circuitlab:save-svg")
    assert Path(download.value.path()).read_text().startswith("<svg")

    jupyter.command("apputils:change-theme", {"theme": "JupyterLab Dark"})
    page.wait_for_function("() => document.querySelector('.circuitlab').dataset.theme === 'dark'")
    page.wait_for_function("() => !document.getElementById('jupyterlab-splash')")  # else JupyterLab trips over it
    shot(page, "dark")
    jupyter.command("apputils:change-theme", {"theme": "JupyterLab Light"})
    page.wait_for_function("() => !document.getElementById('jupyterlab-splash')")

    # saved, reopened, no kernel: the drawing is still there, and can be drilled into
    jupyter.command("docmanager:save")
    assert "application/vnd.circuitlab.v1+json" in (lab[2] / "01_draw.ipynb").read_text()
    jupyter.command("notebook:shutdown-kernel")
    jupyter.open("01_draw.ipynb")
    lasting = page.locator(LASTING).first
    block = lasting.locator("rect[data-role=block]").first
    block.wait_for()
    name = block.get_attribute("data-block")
    block.click(position={"x": 5, "y": 5})
    lasting.locator(f".cl-path button[title='{name}']").wait_for()
    shot(page, "reopened")


def test_circuit_file_opens_without_a_kernel(jupyter, lab):
    import torch

    import circuitlab as cl
    from tests.golden import hostile

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    cl.trace(model, torch.zeros(5, 3)).save(lab[2] / "net.circuit.json")
    (lab[2] / "broken.circuit.json").write_text('{"version": 7}')
    jupyter.open("net.circuit.json")
    jupyter.page.locator(".circuitlab svg text[data-role=label]").first.wait_for()
    shot(jupyter.page, "file")
    jupyter.command("docmanager:open", {"path": "broken.circuit.json"})
    jupyter.page.get_by_text("cannot be shown").wait_for()

    # names of modules are text
    cl.trace(hostile(), torch.zeros(2, 3)).save(lab[2] / "hostile.circuit.json")
    jupyter.page.on("dialog", lambda dialog: jupyter.problems.append(f"dialog: {dialog.message}"))
    jupyter.command("docmanager:open", {"path": "hostile.circuit.json"})
    block = jupyter.page.locator(".circuitlab [data-block*=onerror]").first
    block.wait_for(state="attached")
    block.hover(position={"x": 3, "y": 3})
    jupyter.page.get_by_text("onerror=alert(1)").first.wait_for()
    assert jupyter.page.locator(".circuitlab script, .circuitlab img").count() == 0


def assert_inside(page):
    """No mark reaches out of its picture: a cut-off top has been missed before."""
    outside = page.evaluate(
        """() => [...document.querySelectorAll('.circuitlab svg')].flatMap(svg => {
          const view = svg.viewBox.baseVal;
          return [...svg.querySelectorAll('[data-role]')].filter(mark => {
            const box = mark.getBBox();
            return box.x < view.x - 1 || box.y < view.y - 1 || box.x + box.width > view.x + view.width + 1
              || box.y + box.height > view.y + view.height + 1;
          }).map(mark => mark.outerHTML.slice(0, 200)) })"""
    )
    assert outside == []
