// The live widget: traits of the kernel's DiagramWidget on one side, a Diagram on the other.

import type { AnyModel } from "@anywidget/types";
import { Diagram, make, type ThemeChoice } from "./interact.ts";
import { readScene } from "./scene.ts";

/** The synchronised traits of circuitlab.widgets.diagram.DiagramWidget. */
export interface Traits {
  scene: unknown;
  selection: string;
  search: string;
  found: string[];
  depth: number;
  deepest: number;
  theme: ThemeChoice;
}

/** Show a model in an element; gives what undoes it. */
export function connect(model: AnyModel<Traits>, root: HTMLElement): () => void {
  const diagram = new Diagram(root, {
    toggle: (block) => model.send({ toggle: block }),
    select(name) {
      model.set("selection", name);
      model.save_changes();
    },
    search(words) {
      model.set("search", words);
      model.save_changes();
    },
  });
  const label = make("label", "", diagram.bar);
  diagram.bar.prepend(label);
  label.textContent = "Depth ";
  const slider = make("input", "", label);
  slider.type = "range";
  slider.min = "0";
  slider.addEventListener("input", () => {
    model.set("depth", Number(slider.value));
    model.save_changes();
  });
  const updates: Record<string, () => void> = {
    "change:scene": () => diagram.show(readScene(model.get("scene"))),
    "change:selection": () => diagram.select(model.get("selection")),
    "change:search": () => {
      if (diagram.search.value !== model.get("search")) diagram.search.value = model.get("search");
    },
    "change:found": () => diagram.found(model.get("found")),
    "change:theme": () => diagram.theme(model.get("theme")),
    "change:depth": () => {
      slider.max = String(model.get("deepest"));
      slider.value = String(model.get("depth"));
      slider.title = `depth ${model.get("depth")} of ${model.get("deepest")}`;
    },
  };
  for (const [event, update] of Object.entries(updates)) {
    update();
    model.on(event, update);
  }
  return () => {
    for (const [event, update] of Object.entries(updates)) model.off(event, update);
    diagram.dispose();
  };
}
