// A diagram on the page: draws a scene, and lets a person pan, zoom, point, select, search, fold and save.
// It knows nothing of kernels: what a gesture means beyond the picture is told to `Hooks`.

import { svgText, type ThemeName, tokens } from "./render.ts";
import type { Scene } from "./scene.ts";
import css from "./theme.css";

export interface Hooks {
  /** A block was clicked: unfold or fold it. */
  toggle(block: string): void;
  /** A wire, op or block was selected; "" for none. */
  select?(name: string): void;
  /** Something is searched for. */
  search?(words: string): void;
}

export type ThemeChoice = "auto" | ThemeName;

interface View {
  x: number;
  y: number;
  w: number;
  h: number;
}

const NEAR = [0, -2, 2, -4, 4, -6, 6];
const MOST_ZOOM = 12;

/** One diagram in an element. */
export class Diagram {
  readonly bar: HTMLElement;
  readonly search: HTMLInputElement;
  private readonly view: HTMLElement;
  private readonly tip: HTMLElement;
  private readonly said: HTMLElement;
  private scene: Scene | undefined;
  private svg: SVGSVGElement | undefined;
  private seen: View = { x: 0, y: 0, w: 1, h: 1 };
  private selected = "";
  private at = -1;
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
    this.button("−", "Zoom out", () => this.zoom(1 / 1.3));
    this.button("Fit", "Fit the whole diagram", () => this.fit());
    this.button("+", "Zoom in", () => this.zoom(1.3));
    this.button("SVG", "Save as SVG", () => this.saveSvg());
    this.button("PNG", "Save as PNG", () => void this.savePng());
    this.view = make("div", "cl-view", root);
    this.view.tabIndex = 0;
    this.view.setAttribute("role", "group");
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
    this.resize = new ResizeObserver(() => this.frame());
    this.resize.observe(this.view);
  }

  /** Draw a scene; the view is kept if it is the same block drawn anew. */
  show(scene: Scene): void {
    this.tip.hidden = true;
    const fresh = this.scene?.block !== scene.block;
    const zoomed = this.scene !== undefined && this.seen.w < this.scene.width - 1;
    this.scene = scene;
    this.at = -1;
    this.draw();
    if (fresh || !zoomed) this.fit();
    else this.frame();
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
  }

  /** Mark what a search has found. */
  found(names: Iterable<string>): void {
    const wanted = new Set(names);
    for (const element of this.marked()) {
      const { wire, op, block, role } = element.dataset;
      const hit = [wire, op, role === "block" || role === "title" ? block : undefined].some(
        (name) => name !== undefined && wanted.has(name),
      );
      element.classList.toggle("cl-found", hit);
    }
    if (this.search.value) this.say(wanted.size ? `${wanted.size} found` : "nothing found");
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

  /** Save what is seen as a standalone SVG file. */
  saveSvg(): void {
    if (this.scene)
      download(
        new Blob([svgText(this.scene, this.themeName())], { type: "image/svg+xml" }),
        this.file("svg"),
      );
  }

  /** Save what is seen as a PNG file of twice its size. */
  async savePng(): Promise<void> {
    if (!this.scene) return;
    const image = new Image();
    const url = URL.createObjectURL(
      new Blob([svgText(this.scene, this.themeName())], { type: "image/svg+xml" }),
    );
    image.src = url;
    await image.decode();
    URL.revokeObjectURL(url);
    const canvas = document.createElement("canvas");
    canvas.width = this.scene.width * 2;
    canvas.height = this.scene.height * 2;
    canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => blob && download(blob, this.file("png")));
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
    const parsed = new DOMParser().parseFromString(
      svgText(this.scene, name),
      "image/svg+xml",
    ).documentElement;
    this.svg = document.importNode(parsed, true) as unknown as SVGSVGElement;
    this.svg.querySelector("title")?.remove();
    this.svg.setAttribute("aria-hidden", "true");
    this.view.replaceChildren(this.svg);
    this.view.setAttribute(
      "aria-label",
      `${this.scene.description} Arrow keys move, Enter unfolds or folds.`,
    );
    for (const element of this.marked()) {
      const block = element.dataset.block;
      if (element.dataset.role === "title" && block && this.scene.foldable[block])
        element.classList.add("cl-fold");
    }
    this.frame();
    this.lightUp();
    this.found(this.matches(this.search.value));
  }

  private marked(): NodeListOf<SVGElement> {
    return this.view.querySelectorAll<SVGElement>("[data-role]");
  }

  private lightUp(): void {
    for (const element of this.marked()) {
      const { wire, op, block, role } = element.dataset;
      const owns = role === "block" || role === "plate" || !(wire || op);
      const on =
        this.selected !== "" &&
        (wire === this.selected || op === this.selected || (owns && block === this.selected));
      element.classList.toggle("cl-on", on);
    }
    const note = this.scene?.notes[this.selected];
    this.say(note ? note.join(" · ") : "");
  }

  // the window on the picture ----------------------------------------------------------------------------

  /** Show all of it. */
  fit(): void {
    if (!this.scene) return;
    this.seen = { x: 0, y: 0, w: this.scene.width, h: this.scene.height };
    this.frame();
  }

  /** Zoom about a point of the picture, the middle if none is given. */
  zoom(factor: number, x?: number, y?: number): void {
    if (!this.scene) return;
    const { seen, scene } = this;
    const least = scene.width / MOST_ZOOM;
    const w = Math.min(Math.max(seen.w / factor, least), scene.width);
    const scale = w / seen.w;
    const [px, py] = [x ?? seen.x + seen.w / 2, y ?? seen.y + seen.h / 2];
    this.seen = { x: px - (px - seen.x) * scale, y: py - (py - seen.y) * scale, w, h: seen.h * scale };
    this.frame();
  }

  private pan(dx: number, dy: number): void {
    this.seen = { ...this.seen, x: this.seen.x + dx, y: this.seen.y + dy };
    this.frame();
  }

  private frame(): void {
    if (!this.scene || !this.svg) return;
    const { scene, seen } = this;
    seen.x = Math.min(Math.max(seen.x, 0), scene.width - seen.w);
    seen.y = Math.min(Math.max(seen.y, 0), scene.height - seen.h);
    const room = this.view.clientWidth || scene.width;
    const width = Math.min(scene.width, room);
    this.svg.setAttribute("width", String(width));
    this.svg.setAttribute("height", String((scene.height * width) / scene.width));
    this.svg.setAttribute("viewBox", `${seen.x} ${seen.y} ${seen.w} ${seen.h}`);
  }

  private perPixel(): number {
    return this.seen.w / (this.svg?.clientWidth || this.seen.w);
  }

  // gestures ---------------------------------------------------------------------------------------------

  private listen(): void {
    let start: { x: number; y: number; moved: boolean } | undefined;
    this.view.addEventListener("pointerdown", (event) => {
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
      this.view.classList.add("cl-moving");
      this.tip.hidden = true;
      this.pan(-dx * this.perPixel(), -dy * this.perPixel());
      start = { x: event.clientX, y: event.clientY, moved: true };
    });
    const end = (event: PointerEvent): void => {
      if (start && !start.moved) this.click(event);
      start = undefined;
      this.view.classList.remove("cl-moving");
    };
    this.view.addEventListener("pointerup", end);
    this.view.addEventListener("pointercancel", () => {
      start = undefined;
    });
    this.view.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
    });
    this.view.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
        event.preventDefault();
        const box = this.svg?.getBoundingClientRect();
        if (!box) return;
        const k = this.perPixel();
        this.zoom(
          1.0015 ** -event.deltaY,
          this.seen.x + (event.clientX - box.x) * k,
          this.seen.y + (event.clientY - box.y) * k,
        );
      },
      { passive: false },
    );
    this.view.addEventListener("dblclick", () => this.fit());
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("circuitlab:save-svg", () => this.saveSvg());
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

  private pointed(event: PointerEvent): SVGElement | undefined {
    const under = (dy: number): SVGElement | undefined => {
      const tree = this.root.getRootNode() as Document | ShadowRoot;
      const element = tree.elementFromPoint(event.clientX, event.clientY + dy);
      const marked = element?.closest<SVGElement>("[data-role]");
      return marked && this.view.contains(marked) ? marked : undefined;
    };
    const direct = under(0);
    if (direct && direct.dataset.role !== "plate") return direct;
    for (const dy of NEAR) {
      const near = under(dy);
      if (near?.dataset.wire) return near;
    }
    return direct;
  }

  private click(event: PointerEvent): void {
    const element = this.pointed(event);
    const { wire, op, block, role } = element?.dataset ?? {};
    if (!wire && block && role !== "plate" && this.scene?.foldable[block]) this.hooks.toggle(block);
    else this.choose(wire || op || block || "");
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
    this.tip.style.left = `${x}px`;
    this.tip.style.top = `${event.clientY - box.y + 16}px`;
  }

  private key(event: KeyboardEvent): void {
    if (event.target === this.search) {
      if (event.key === "Escape") {
        this.search.value = "";
        this.search.dispatchEvent(new Event("input"));
        this.view.focus();
      }
      event.stopPropagation();
      return;
    }
    if (event.target !== this.view || event.ctrlKey || event.metaKey || event.altKey) return;
    const actions: Record<string, () => void> = {
      "/": () => this.search.focus(),
      "+": () => this.zoom(1.3),
      "=": () => this.zoom(1.3),
      "-": () => this.zoom(1 / 1.3),
      "0": () => this.fit(),
      Escape: () => this.choose(""),
      Enter: () => this.enter(),
      " ": () => this.enter(),
      ArrowRight: () => (event.shiftKey ? this.pan(40, 0) : this.walk(1)),
      ArrowLeft: () => (event.shiftKey ? this.pan(-40, 0) : this.walk(-1)),
      ArrowDown: () => (event.shiftKey ? this.pan(0, 40) : this.walkWires(1)),
      ArrowUp: () => (event.shiftKey ? this.pan(0, -40) : this.walkWires(-1)),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  /** Blocks and glyphs, in the order they ran. */
  private stops(): string[] {
    const names = [...this.marked()].map(({ dataset: { role, op, block } }) =>
      role === "wire" || role === "label" ? "" : op || block || "",
    );
    return [...new Set(names)].filter((name) => name);
  }

  private walk(step: number): void {
    const stops = this.stops();
    if (!stops.length) return;
    this.at = (this.at + step + stops.length + (this.at < 0 && step < 0 ? 1 : 0)) % stops.length;
    const name = stops[this.at] ?? "";
    for (const element of this.marked()) {
      const { op, block, role } = element.dataset;
      element.classList.toggle("cl-at", role !== "wire" && role !== "title" && (op || block) === name);
    }
    this.say([`${this.at + 1} of ${stops.length}`, ...(this.scene?.notes[name] ?? [name])].join(" · "));
  }

  private walkWires(step: number): void {
    const wires = [...new Set([...this.marked()].map((element) => element.dataset.wire ?? ""))].filter(
      (name) => name,
    );
    if (!wires.length) return;
    const at = wires.indexOf(this.selected);
    this.choose(wires[(at + step + wires.length + (at < 0 && step < 0 ? 1 : 0)) % wires.length] ?? "");
  }

  private enter(): void {
    const name = this.stops()[this.at];
    if (!name) return;
    if (this.scene?.foldable[name]) this.hooks.toggle(name);
    else this.choose(name);
  }

  private button(label: string, title: string, action: () => void): void {
    const button = make("button", "", this.bar);
    button.type = "button";
    button.textContent = label;
    button.title = title;
    button.setAttribute("aria-label", title);
    button.addEventListener("click", action);
  }

  private file(suffix: string): string {
    const name = [this.scene?.title, this.scene?.block].filter((part) => part).join("-") || "circuit";
    return `${name.replace(/[^\w.-]+/g, "_")}.${suffix}`;
  }
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

function download(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
