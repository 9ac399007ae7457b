// Entry of the bundle that anywidget loads.

import type { RenderProps } from "@anywidget/types";
import { connect, type Traits } from "./sync.ts";

export default {
  render({ model, el }: RenderProps<Traits>): () => void {
    return connect(model, el);
  },
};
