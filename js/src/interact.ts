// A diagram on the page: draws a scene, and lets a person pan, zoom, point, select, search, fold and save.
// It knows nothing of kernels: what a gesture means beyond the picture is told to `Hooks`.

import { Frame } from "./frame.ts";
import { svgText, type ThemeName, tokens } from "./render.ts";
import { litText, savePng, saveSvg } from "./save.ts";
import type { Scene } from "./scene.ts";
import { stopsOf } from "./stops.ts";
import css from "./theme.css";

export interface Hooks {
  /** A block was clicked: unfold or fold it. */
  toggle(block: string): void;
  /** A wire, op or block was selected; "" for none. */
  select?(name: string): void;
  /** Something is searched for, by whoever knows of more than is drawn: it will tell `found`. */
  search?(words: string): void;
}

export type ThemeChoice = "auto" | ThemeName;

const NEAR = [2, 4, 6].flatMap((d) => [
  [0, -d],
  [0, d],
  [-d, 0],
  [d, 0],
]); // pixels from a thin wire that still hit it
const MOST_TURN = 30; // a mouse wheel's notch is 100 and more, a pinch a few at a time

/** One diagram in an element. */
export class Diagram {
  readonly bar: HTMLElement;
  readonly search: HTMLInputElement;
  private readonly view: HTMLElement;
  private readonly tip: HTMLElement;
  private readonly said: HTMLElement;
  private scene: Scene | undefined;
  private readonly frame: Frame;
  private selected = "";
  private at = ""; // where the arrow keys stand
  private toggled = ""; // what a person has just unfolded or folded
  private wanted: ReadonlySet<string> = new Set(); // what a search has found
  private choice: ThemeChoice = "auto";
  private readonly watch: MutationObserver;
  private readonly resize: ResizeObserver;
  private readonly media = window.matchMedia("(prefers-color-scheme: dark)");

  constructor(
    private readonly root: HTMLElement,
    private readonly hooks: Hooks,
  ) {
    style(root);
    root.classList.add("circuitlab");
    this.bar = make("div", "cl-bar", root);
    this.search = make("input", "", this.bar);
    this.search.type = "search";
    this.search.placeholder = "Search ( / )";
    this.search.setAttribute("aria-label", "Search wires, operations and blocks");
    make("span", "cl-room", this.bar);
    this.button("−", "Zoom out", () => this.frame.zoom(1 / 1.3));
    this.button("Fit", "Fit the whole diagram", () => this.frame.fit());
    this.button("+", "Zoom in", () => this.frame.zoom(1.3));
    this.button("SVG", "Save as SVG", () => this.save("svg"));
    this.button("PNG", "Save as PNG", () => this.save("png"));
    this.view = make("div", "cl-view", root);
    this.view.tabIndex = 0;
    this.view.setAttribute("role", "application"); // the arrow keys are its own
    this.view.setAttribute("aria-roledescription", "circuit diagram");
    this.frame = new Frame(this.view);
    this.tip = make("div", "cl-tip", root);
    this.tip.hidden = true;
    this.said = make("div", "cl-said", root);
    this.said.setAttribute("role", "status");
    this.listen();
    this.watch = new MutationObserver(() => this.theme(this.choice));
    this.watch.observe(document.body, {
      attributes: true,
      attributeFilter: ["data-jp-theme-light", "class"],
    });
    this.media.addEventListener("change", this.followSystem);
    this.resize = new ResizeObserver(() => this.frame.measure());
    this.resize.observe(this.view);
  }

  /** Draw a scene; the zoom is kept if it is the same block drawn anew. */
  show(scene: Scene): void {
    this.tip.hidden = true;
    const anew = this.scene?.block === scene.block;
    this.scene = scene;
    this.draw();
    if (!anew) this.frame.fit();
    const state = scene.foldable[this.toggled];
    if (state) {
      this.frame.reveal(this.named(this.toggled)[0]);
      this.say(`${this.toggled} ${state === "open" ? "unfolded" : "folded"}`);
    }
    this.toggled = "";
  }

  /** Choose "auto" (follow the page), "light", "dark" or "print". */
  theme(choice: ThemeChoice): void {
    this.choice = choice;
    if (this.themeName() !== this.root.dataset.theme) this.draw();
  }

  /** Light up every place of a wire, an op or a block. */
  select(name: string): void {
    this.selected = name;
    this.lightUp();
    this.saySelected();
  }

  /** Mark what a search has found. */
  found(names: Iterable<string>): void {
    const wanted = new Set(names);
    this.wanted = wanted;
    const here = new Set<string>();
    for (const element of this.marked()) {
      const hits = namesOf(element).filter((name) => wanted.has(name));
      element.classList.toggle("cl-found", hits.length > 0);
      if (hits[0]) here.add(hits[0]);
    }
    if (this.search.value) this.say(here.size ? `${here.size} found here` : "nothing found");
    else this.saySelected();
  }

  /** Names in this scene whose notes hold the words. */
  matches(words: string): string[] {
    const low = words.trim().toLowerCase();
    if (!low || !this.scene) return [];
    return Object.entries(this.scene.notes)
      .filter(([name, lines]) =>
        [name, ...lines.slice(0, 2)].some((line) => line.toLowerCase().includes(low)),
      )
      .map(([name]) => name);
  }

  /** Tell a person, screen readers included. */
  say(words: string): void {
    this.said.textContent = words;
  }

  /** Save the whole drawing as a file, with what is selected. */
  save(kind: "svg" | "png"): void {
    if (!this.scene) return;
    const text = litText(svgText(this.scene, this.themeName()), this.marked());
    if (kind === "svg") saveSvg(this.scene, text);
    else {
      savePng(this.scene, text).catch((error: Error) =>
        this.say(`no PNG was saved: ${error.message}; save it as SVG`),
      );
    }
  }

  /** Let go of the page. */
  dispose(): void {
    this.watch.disconnect();
    this.resize.disconnect();
    this.media.removeEventListener("change", this.followSystem);
    this.root.replaceChildren();
  }

  // drawing ----------------------------------------------------------------------------------------------

  private readonly followSystem = (): void => this.theme(this.choice);

  private themeName(): ThemeName {
    if (this.choice !== "auto") return this.choice;
    const light = document.body.dataset.jpThemeLight;
    if (light !== undefined) return light === "false" ? "dark" : "light";
    if (document.body.classList.contains("vscode-dark")) return "dark";
    return this.media.matches ? "dark" : "light";
  }

  private draw(): void {
    if (!this.scene) return;
    const name = this.themeName();
    const colours = tokens(name);
    this.root.dataset.theme = name;
    for (const key of ["ink", "paper", "quiet", "accent"]) {
      this.root.style.setProperty(`--cl-${key}`, colours[key] ?? "");
    }
    this.frame.show(svgText(this.scene, name), this.scene);
    this.view.setAttribute(
      "aria-label",
      `${this.scene.description} Arrow keys move, Enter unfolds or folds.`,
    );
    for (const element of this.marked()) {
      const block = element.dataset.block;
      if (element.dataset.role === "title" && block && this.scene.foldable[block])
        element.classList.add("cl-fold");
    }
    this.lightUp();
    this.mark(this.at);
    this.found(this.hooks.search ? this.wanted : this.matches(this.search.value));
  }

  private marked(): NodeListOf<SVGGraphicsElement> {
    return this.view.querySelectorAll<SVGGraphicsElement>("[data-role]");
  }

  private named(name: string): SVGGraphicsElement[] {
    return [...this.marked()].filter((element) => namesOf(element).includes(name));
  }

  private lightUp(): void {
    const on = new Set(this.selected ? this.named(this.selected) : []);
    for (const element of this.marked()) element.classList.toggle("cl-on", on.has(element));
  }

  private saySelected(): void {
    const note = this.scene?.notes[this.selected];
    const missing = this.selected ? [`${this.selected} is not in this drawing: folded, or a repeat`] : [];
    this.say((note ?? missing).join(" · "));
  }

  // gestures ---------------------------------------------------------------------------------------------

  private listen(): void {
    let start: { x: number; y: number; moved: boolean } | undefined;
    let dragged = false;
    this.view.addEventListener("pointerdown", (event) => {
      dragged = false;
      if (event.button === 0) start = { x: event.clientX, y: event.clientY, moved: false };
    });
    this.view.addEventListener("pointermove", (event) => {
      if (!start) {
        this.hover(event);
        return;
      }
      const [dx, dy] = [event.clientX - start.x, event.clientY - start.y];
      if (!start.moved && Math.hypot(dx, dy) < 4) return;
      if (!start.moved) this.view.setPointerCapture(event.pointerId);
      dragged = true;
      this.view.classList.add("cl-moving");
      this.tip.hidden = true;
      this.frame.pan(-dx, -dy);
      start = { x: event.clientX, y: event.clientY, moved: true };
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      this.view.addEventListener(kind, () => {
        start = undefined;
        this.view.classList.remove("cl-moving");
      });
    }
    this.view.addEventListener("click", (event) => {
      if (!dragged && event.detail < 2) this.click(event); // the second click of a double click is no click of its own
    });
    this.view.addEventListener("dblclick", (event) => {
      if (!this.pointed(event)) this.frame.fit();
    });
    this.view.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
    });
    this.view.addEventListener(
      "wheel",
      (event) => {
        const turned = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : 16);
        if (event.ctrlKey || event.metaKey)
          this.frame.zoom(1.01 ** -Math.min(Math.max(turned, -MOST_TURN), MOST_TURN), event);
        else if (Math.abs(event.deltaX) <= Math.abs(event.deltaY) || !this.frame.pan(event.deltaX, 0)) return; // the page scrolls
        event.preventDefault();
      },
      { passive: false },
    );
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("circuitlab:save-svg", () => this.save("svg"));
    for (const kind of ["pointerdown", "focusin"]) {
      this.root.addEventListener(kind, () => {
        for (const other of document.querySelectorAll(".circuitlab.cl-last"))
          other.classList.remove("cl-last");
        this.root.classList.add("cl-last");
      });
    }
    this.search.addEventListener("input", () => {
      this.found(this.matches(this.search.value));
      this.hooks.search?.(this.search.value);
    });
  }

  private pointed(event: MouseEvent): SVGElement | undefined {
    const under = (dx: number, dy: number): SVGElement | undefined => {
      const tree = this.root.getRootNode() as Document | ShadowRoot;
      const element = tree.elementFromPoint(event.clientX + dx, event.clientY + dy);
      const marked = element?.closest<SVGElement>("[data-role]");
      return marked && this.view.contains(marked) ? marked : undefined;
    };
    const direct = under(0, 0);
    if (direct && direct.dataset.role !== "plate") return direct;
    for (const [dx = 0, dy = 0] of NEAR) {
      const near = under(dx, dy);
      if (near?.dataset.wire) return near;
    }
    return direct;
  }

  private click(event: MouseEvent): void {
    const element = this.pointed(event);
    const { wire, op, block, role } = element?.dataset ?? {};
    if (!wire && block && role !== "plate" && this.scene?.foldable[block]) this.toggle(block);
    else this.choose(wire || op || block || "");
  }

  private toggle(block: string): void {
    this.toggled = block;
    this.hooks.toggle(block);
  }

  private choose(name: string): void {
    this.select(name === this.selected ? "" : name);
    this.hooks.select?.(this.selected);
  }

  private hover(event: PointerEvent): void {
    const element = this.pointed(event);
    const { wire, op, block, role } = element?.dataset ?? {};
    const lines = role === "plate" ? undefined : this.scene?.notes[wire || op || block || ""];
    this.tip.hidden = !lines;
    if (!lines) return;
    this.tip.replaceChildren(
      ...lines
        .filter((line) => line)
        .map((line) => {
          const row = document.createElement("div");
          row.textContent = line;
          return row;
        }),
    );
    const box = this.root.getBoundingClientRect();
    const x = Math.min(event.clientX - box.x + 14, Math.max(0, box.width - this.tip.offsetWidth - 4));
    const [above, below] = [event.clientY - this.tip.offsetHeight - 10, event.clientY + 16];
    const fits = below + this.tip.offsetHeight < Math.min(box.bottom, window.innerHeight);
    this.tip.style.left = `${x}px`;
    this.tip.style.top = `${Math.max(0, (fits ? below : above) - box.y)}px`;
  }

  private key(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (this.bar.contains(event.target as Node)) {
      if (event.key === "Enter" && event.shiftKey) return; // runs the cell
      if (event.target === this.search) this.searchKey(event.key);
      event.stopPropagation(); // else the notebook takes arrows and letters
      return;
    }
    if (event.target !== this.view) return;
    const actions: Record<string, () => void> = {
      "/": () => this.search.focus(),
      "+": () => this.frame.zoom(1.3),
      "=": () => this.frame.zoom(1.3),
      "-": () => this.frame.zoom(1 / 1.3),
      "0": () => this.frame.fit(),
      Escape: () => this.choose(""),
      Enter: () => this.enter(),
      " ": () => this.enter(),
      ArrowRight: () => (event.shiftKey ? this.frame.pan(40, 0) : this.walk(1)),
      ArrowLeft: () => (event.shiftKey ? this.frame.pan(-40, 0) : this.walk(-1)),
      ArrowDown: () => (event.shiftKey ? this.frame.pan(0, 40) : this.walkWires(1)),
      ArrowUp: () => (event.shiftKey ? this.frame.pan(0, -40) : this.walkWires(-1)),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  private searchKey(key: string): void {
    if (key === "Enter") this.nextFound();
    if (key !== "Escape") return;
    this.search.value = "";
    this.search.dispatchEvent(new Event("input"));
    this.view.focus();
  }

  private nextFound(): void {
    const found = [...this.marked()].filter((element) => element.classList.contains("cl-found"));
    const names = [...new Set(found.map((element) => namesOf(element)[0] ?? ""))];
    const at = (names.indexOf(this.at) + 1) % names.length;
    const name = names[at];
    if (!name) return;
    this.mark(name);
    this.frame.reveal(this.named(name)[0]);
    this.say([`${at + 1} of ${names.length}`, ...(this.scene?.notes[name] ?? [name])].join(" · "));
  }

  private walk(step: number): void {
    const stops = stopsOf(this.marked());
    if (!stops.length) return;
    const at = next(stops.indexOf(this.at), step, stops.length);
    const name = stops[at] ?? "";
    this.mark(name);
    this.frame.reveal(this.named(name)[0]);
    this.say([`${at + 1} of ${stops.length}`, ...(this.scene?.notes[name] ?? [name])].join(" · "));
  }

  /** Mark where the arrow keys stand. */
  private mark(name: string): void {
    this.at = name;
    const here = new Set(name ? this.named(name) : []);
    for (const element of this.marked())
      element.classList.toggle("cl-at", here.has(element) && element.dataset.role !== "title");
  }

  private walkWires(step: number): void {
    const wires = [...new Set([...this.marked()].map((element) => element.dataset.wire ?? ""))].filter(
      (name) => name,
    );
    if (wires.length) this.choose(wires[next(wires.indexOf(this.selected), step, wires.length)] ?? "");
  }

  private enter(): void {
    if (this.scene?.foldable[this.at]) this.toggle(this.at);
    else if (this.at) this.choose(this.at);
  }

  private button(label: string, title: string, action: () => void): void {
    const button = make("button", "", this.bar);
    button.type = "button";
    button.textContent = label;
    button.title = title;
    button.setAttribute("aria-label", title);
    button.addEventListener("click", action);
  }
}

/** The names that a mark stands for: its wire, or its op and the block that is only that op. */
function namesOf({ dataset: { wire, op, block } }: SVGElement): string[] {
  return [wire, op, block].filter((name): name is string => Boolean(name));
}

/** A step from one place to the next, round and round; -1 is before the first and after the last. */
function next(at: number, step: number, count: number): number {
  return at < 0 ? (step > 0 ? 0 : count - 1) : (at + step + count) % count;
}

/** A new child of an element. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  className: string,
  parent: HTMLElement,
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  if (className) element.className = className;
  parent.append(element);
  return element;
}

function style(element: HTMLElement): void {
  const tree = element.getRootNode();
  const home = tree instanceof ShadowRoot ? tree : document.head;
  if (home.querySelector("style[data-circuitlab]")) return;
  const sheet = document.createElement("style");
  sheet.dataset.circuitlab = "";
  sheet.textContent = css;
  home.append(sheet);
}
