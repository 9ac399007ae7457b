// A diagram without a kernel: folded blocks open by going to their own scene, with the way back above.

import { Diagram, make } from "./interact.ts";
import { readDocument, type SceneDocument } from "./scene.ts";

/** Draw a notebook's output, or a `.circuit.json` file, in an element. Broken data becomes a message. */
export function showDocument(root: HTMLElement, data: unknown): Diagram | undefined {
  let found: SceneDocument;
  try {
    found = readDocument(data);
  } catch (error) {
    root.replaceChildren();
    root.classList.add("circuitlab");
    make("div", "cl-error", root).textContent = `This circuit cannot be shown: ${(error as Error).message}`;
    return undefined;
  }
  root.replaceChildren();
  const path = [found.root];
  const diagram = new Diagram(root, {
    toggle(block) {
      if (block in found.scenes && block !== path.at(-1)) {
        path.push(block);
        go();
      } else diagram.say("this block's inside is not in the file; run the cell to see it");
    },
  });
  const crumbs = make("span", "cl-path", diagram.bar);
  diagram.bar.prepend(crumbs);
  const go = (): void => {
    const scene = found.scenes[path.at(-1) ?? found.root];
    if (!scene) return;
    diagram.show(scene);
    crumbs.replaceChildren();
    path.forEach((name, level) => {
      if (path.length < 2) return;
      const step = make("button", "", crumbs);
      step.type = "button";
      step.textContent = `${level ? "› " : ""}${shortName(name) || found.scenes[name]?.title || name}`;
      step.title = name || (found.scenes[name]?.title ?? "");
      step.addEventListener("click", () => {
        path.length = level + 1;
        go();
      });
    });
  };
  go();
  return diagram;
}

/** A block's own name, with the list's name before a number. */
function shortName(name: string): string {
  const parts = name.split("/").at(-1)?.split(".") ?? [];
  return /^\d/.test(parts.at(-1) ?? "") ? parts.slice(-2).join(".") : (parts.at(-1) ?? "");
}
