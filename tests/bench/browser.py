"""Frame times of the live diagram in a real browser, software rendering: `python -m tests.bench.browser`."""

import json
import shutil
from pathlib import Path

import torch

import circuitlab as cl
from circuitlab.gallery.resnet import IdentityBlock

WIDGET = Path(cl.__file__).parent / "widgets" / "static" / "widget.js"

PAGE = """async ([code, scene]) => {
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const widget = (await import(url)).default;
  const traits = { scene, selection: "", search: "", found: [], depth: 1, deepest: 3, theme: "light" };
  const model = { get: (k) => traits[k], set: (k, v) => { traits[k] = v; }, on() {}, off() {}, send() {}, save_changes() {} };
  const el = document.body.appendChild(document.createElement("div"));
  widget.render({ model, el });
  const view = el.querySelector(".cl-view");
  const fire = (type, x, y) => view.dispatchEvent(
    new PointerEvent(type, { clientX: x, clientY: y, pointerId: 1, button: 0, bubbles: true }));
  view.setPointerCapture = () => {};
  const measure = async (step) => {
    const times = [];
    let last = 0;
    for (let n = 0; n < 60; n++) {
      const now = await new Promise((done) => requestAnimationFrame(done));
      if (last) times.push(now - last);
      last = now;
      step(n);
    }
    return times.reduce((a, b) => a + b) / times.length;
  };
  const zoom = await measure((n) => view.dispatchEvent(
    new WheelEvent("wheel", { deltaY: n < 30 ? -60 : 30, ctrlKey: true, clientX: 400, clientY: 100, cancelable: true })));
  fire("pointerdown", 500, 100);
  const pan = await measure((n) => fire("pointermove", 500 + 3 * n, 100 + n));
  fire("pointerup", 700, 160);
  return { pan, zoom, marks: scene.marks.length };
}"""


def frames(executable, flags):
    """Mean frame times in ms while panning and zooming a drawing of about 5,000 marks."""
    from playwright.sync_api import sync_playwright

    model = torch.nn.Sequential(*(IdentityBlock(width, width + 1) for width in range(8, 60))).eval()
    scene = cl.trace(model, torch.zeros(1, 8, 16, 16)).view(depth=2).scene
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=flags)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto("about:blank")
        found = page.evaluate(PAGE, [WIDGET.read_text(), json.loads(json.dumps(scene))])
        browser.close()
    return found


if __name__ == "__main__":
    from tests.ui.conftest import FLAGS

    print(frames(shutil.which("chromium"), FLAGS))
