// "Save circuit as SVG" in JupyterLab's command palette, which saves the diagram that was used last, else the first
// seen; and live views that last.

import { ICommandPalette } from "@jupyterlab/apputils";
import { type Notebook, showViews } from "./view.ts";

interface App {
  commands: {
    addCommand(
      id: string,
      options: { label: string; caption: string; isEnabled: () => boolean; execute: () => void },
    ): unknown;
  };
  docRegistry: {
    addWidgetExtension(kind: string, extension: { createNew: (panel: Notebook) => void }): unknown;
  };
}

const COMMAND = "circuitlab:save-svg";

function current(): Element | null {
  const seen = [...document.querySelectorAll<HTMLElement>(".circuitlab")].filter(
    (e) => e.offsetParent !== null,
  );
  return seen.find((element) => element.classList.contains("cl-last")) ?? seen[0] ?? null;
}

export default {
  id: "circuitlab:commands",
  description: "Commands for neural circuit diagrams, and drawings in place of live views without a kernel.",
  autoStart: true,
  optional: [ICommandPalette],
  activate(app: App, palette: ICommandPalette | null): void {
    app.commands.addCommand(COMMAND, {
      label: "Save circuit as SVG",
      caption: "Save the circuit diagram that was used last as an SVG file",
      isEnabled: () => current() !== null,
      execute: () => current()?.dispatchEvent(new CustomEvent("circuitlab:save-svg")),
    });
    palette?.addItem({ command: COMMAND, category: "Circuitlab" });
    app.docRegistry.addWidgetExtension("Notebook", { createNew: showViews });
  },
};
