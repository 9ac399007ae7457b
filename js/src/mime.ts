// Renderer of the scene types and of `.circuit.json` files: no kernel needed.

import { Widget } from "@lumino/widgets";
import type { Diagram } from "./interact.ts";
import { showDocument } from "./lasting.ts";

const MIME = "application/vnd.circuitlab.v1+json";
const VIEW_MIME = "application/vnd.circuitlab.view.v1+json"; // of a live view, where that has no kernel

interface MimeModel {
  readonly data: Record<string, unknown>;
}

class CircuitWidget extends Widget {
  private diagram: Diagram | undefined;

  async renderModel(model: MimeModel): Promise<void> {
    this.diagram?.dispose();
    this.diagram = showDocument(this.node, model.data[MIME] ?? model.data[VIEW_MIME]);
  }

  override dispose(): void {
    this.diagram?.dispose();
    super.dispose();
  }
}

export default {
  id: "circuitlab:mime",
  description: "Shows neural circuit diagrams.",
  rendererFactory: {
    safe: true,
    mimeTypes: [MIME, VIEW_MIME],
    createRenderer: () => new CircuitWidget(),
  },
  rank: 0,
  dataType: "json",
  fileTypes: [
    {
      name: "circuit",
      displayName: "Circuit diagram",
      mimeTypes: [MIME],
      extensions: [".circuit.json"],
      fileFormat: "text",
    },
  ],
  documentWidgetFactoryOptions: {
    name: "Circuit diagram",
    primaryFileType: "circuit",
    fileTypes: ["circuit"],
    defaultFor: ["circuit"],
  },
};
