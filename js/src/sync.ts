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

const PATIENCE = 1000; // ms

/** Show a model in an element; gives what undoes it. */
export function connect(model: AnyModel<Traits>, root: HTMLElement): () => void {
  const tell = (message: () => void): void => {
    try {
      message();
    } catch {
      clearTimeout(waiting);
      diagram.say("The kernel that drew this is gone: run the cell again.");
    }
  };
  const set = <K extends keyof Traits>(trait: K, value: Traits[K]): void =>
    tell(() => {
      model.set(trait, value);
      model.save_changes();
    });
  let waiting: ReturnType<typeof setTimeout> | undefined;
  const diagram = new Diagram(root, {
    toggle(block) {
      waiting = setTimeout(() => diagram.say("Waiting for the kernel, which is busy or gone."), PATIENCE);
      tell(() => model.send({ toggle: block }));
    },
    select: (name) => set("selection", name),
    search: (words) => set("search", words),
  });
  const label = make("label", "", diagram.bar);
  diagram.bar.prepend(label);
  label.textContent = "Depth ";
  const slider = make("input", "", label);
  slider.type = "range";
  slider.min = "0";
  slider.addEventListener("input", () => set("depth", Number(slider.value)));
  const updates: Record<string, () => void> = {
    "change:scene"() {
      clearTimeout(waiting);
      diagram.show(readScene(model.get("scene")));
    },
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
    clearTimeout(waiting);
    for (const [event, update] of Object.entries(updates)) model.off(event, update);
    diagram.dispose();
  };
}
