// A live view in a notebook: the widget where its kernel has it, the drawing that was saved with it elsewhere.

import type { Panel } from "@lumino/widgets";

const VIEW_MIME = "application/vnd.circuitlab.view.v1+json";
const WIDGET_MIME = "application/vnd.jupyter.widget-view+json";
const BEFORE_WIDGETS = -20; // a rank: ipywidgets takes -10

interface Renderer extends Panel {
  renderModel(model: { readonly trusted: boolean }): Promise<void>;
}

interface Factory {
  readonly safe: boolean;
  readonly mimeTypes: string[];
  createRenderer(options: unknown): Renderer;
}

interface RenderMime {
  getFactory(mimeType: string): Factory | undefined;
  createRenderer(mimeType: string): Renderer;
  addFactory(factory: Factory, rank: number): void;
}

/** A notebook, as far as it matters here. */
export interface Notebook {
  readonly content: { readonly rendermime: RenderMime };
}

/** Let a notebook show views so. */
export function showViews({ content: { rendermime } }: Notebook): void {
  const saved = rendermime.getFactory(VIEW_MIME);
  if (!saved || !rendermime.getFactory(WIDGET_MIME)) return;
  rendermime.addFactory(
    {
      safe: true,
      mimeTypes: [VIEW_MIME],
      createRenderer: (options) =>
        withDrawing(rendermime.createRenderer(WIDGET_MIME), () => saved.createRenderer(options)),
    },
    BEFORE_WIDGETS,
  );
}

/** The renderer of widgets, which shows the saved drawing for as long as it has no widget to show. */
function withDrawing(renderer: Renderer, saved: () => Renderer): Renderer {
  const live = renderer.renderModel.bind(renderer);
  let drawing: Renderer | undefined;
  const drop = (): void => {
    drawing?.dispose();
    drawing = undefined;
  };
  const draw = async (model: { readonly trusted: boolean }): Promise<void> => {
    drop();
    drawing = saved();
    renderer.node.replaceChildren(drawing.node);
    await drawing.renderModel(model);
  };
  renderer.renderModel = async (model) => {
    const done = model.trusted ? live(model) : undefined;
    await draw(model);
    if (!done) return;
    await done;
    if (renderer.widgets.length) drop();
    else await draw(model);
  };
  renderer.disposed.connect(drop);
  return renderer;
}
