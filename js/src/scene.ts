// The scene: what circuitlab/diagram/scene.py writes, as types, and a reader that says what is wrong with a broken one.

export interface Mark {
  shape: "path" | "rect" | "circle" | "text";
  role: string;
  id?: string;
  wire?: string;
  op?: string;
  block?: string;
  d?: string;
  x?: number;
  y?: number;
  w?: number;
  h?: number;
  r?: number;
  text?: string;
  font?: string;
  size?: number;
  anchor?: string;
  stroke?: string;
  fill?: string;
  width?: number;
  dash?: number[];
  opacity?: number;
}

export interface Scene {
  version: number;
  block: string;
  title: string;
  description: string;
  width: number;
  height: number;
  marks: Mark[];
  foldable: Record<string, "open" | "closed">;
  notes: Record<string, string[]>;
}

/** A drawing with one scene for each block that can be drilled into. */
export interface SceneDocument {
  version: number;
  root: string;
  scenes: Record<string, Scene>;
}

const SHAPES = new Set(["path", "rect", "circle", "text"]);

/** A scene from data, or an error that says what is wrong. */
export function readScene(data: unknown): Scene {
  const scene = record(data, "the scene");
  if (scene.version !== 1) {
    throw new Error(`this scene has version ${scene.version}, and this circuitlab reads version 1`);
  }
  for (const key of ["width", "height"]) {
    if (typeof scene[key] !== "number") throw new Error(`this scene has no ${key}`);
  }
  if (!Array.isArray(scene.marks) || !scene.marks.every((mark) => SHAPES.has(mark?.shape))) {
    throw new Error("this scene has broken marks");
  }
  return { block: "", title: "", description: "", foldable: {}, notes: {}, ...scene } as unknown as Scene;
}

/** A drawing from the data of a notebook's output or of a `.circuit.json` file, or an error that says what is wrong. */
export function readDocument(data: unknown): SceneDocument {
  const outer = record(data, "this file");
  const found = record("diagram" in outer ? outer.diagram : outer, "the diagram");
  if (found.version !== 1) {
    throw new Error(`this diagram has version ${found.version}, and this circuitlab reads version 1`);
  }
  const scenes: Record<string, Scene> = {};
  for (const [name, scene] of Object.entries(record(found.scenes, "scenes"))) scenes[name] = readScene(scene);
  const root = String(found.root ?? "");
  if (!(root in scenes)) throw new Error(`this diagram has no scene for its root ${JSON.stringify(root)}`);
  return { version: 1, root, scenes };
}

function record(data: unknown, what: string): Record<string, unknown> {
  if (typeof data !== "object" || data === null || Array.isArray(data)) {
    throw new Error(`${what} is not a circuit diagram`);
  }
  return data as Record<string, unknown>;
}
