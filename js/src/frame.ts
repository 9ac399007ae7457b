// The frame that a picture is seen through: pan, zoom, fit.

interface Size {
  readonly width: number;
  readonly height: number;
}

const MOST_ZOOM = 12;
const LEAST_SCALE = 0.65; // in a narrow window a picture is scrolled rather than too small to read

/** Shows an SVG in an element, all of it or a part. */
export class Frame {
  private svg: SVGSVGElement | undefined;
  private size: Size = { width: 1, height: 1 };
  private seen = { x: 0, y: 0, w: 1 }; // the part that is seen; its height follows from the picture's shape

  private room = 0; // width of the element, measured seldom: asking for it is slow
  private scrolls = false; // whether the picture is larger than the element

  constructor(private readonly view: HTMLElement) {}

  /** Show a picture; a zoomed one keeps its scale, any other is fitted. */
  show(text: string, size: Size): void {
    const zoomed = this.svg !== undefined && this.seen.w < this.size.width - 1;
    const scale = this.perPixel();
    this.size = size;
    const parsed = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
    this.svg = document.importNode(parsed, true) as unknown as SVGSVGElement;
    this.svg.querySelector("title")?.remove();
    this.svg.setAttribute("aria-hidden", "true");
    this.view.replaceChildren(this.svg);
    this.room = this.view.clientWidth;
    this.seen.w = zoomed ? Math.min(scale * this.shownWidth(), size.width) : size.width;
    this.measure();
  }

  /** Show all of it. */
  fit(): void {
    this.seen = { x: 0, y: 0, w: this.size.width };
    this.update();
  }

  /** Zoom about a point of the screen, the middle if none is given. */
  zoom(factor: number, at?: { clientX: number; clientY: number }): void {
    const { seen, size } = this;
    const box = this.svg?.getBoundingClientRect();
    const k = this.perPixel();
    const px = seen.x + (at && box ? (at.clientX - box.x) * k : seen.w / 2);
    const py = seen.y + (at && box ? (at.clientY - box.y) * k : this.seenHeight() / 2);
    const w = Math.min(Math.max(seen.w / factor, size.width / MOST_ZOOM), size.width);
    const scale = w / seen.w;
    this.seen = { x: px - (px - seen.x) * scale, y: py - (py - seen.y) * scale, w };
    this.update();
  }

  /** Move by pixels of the screen; whether there was room to. */
  pan(dx: number, dy: number): boolean {
    const { x, y, w } = this.seen;
    if (this.scrolls) {
      const { scrollLeft, scrollTop } = this.view;
      this.view.scrollBy(dx, dy);
      if (this.view.scrollLeft !== scrollLeft || this.view.scrollTop !== scrollTop) return true;
    }
    const k = this.perPixel();
    this.seen = { x: x + dx * k, y: y + dy * k, w };
    this.update();
    return this.seen.x !== x || this.seen.y !== y;
  }

  /** Bring a mark into the frame, and the page to it. */
  reveal(mark: SVGGraphicsElement | undefined): void {
    if (!mark) return;
    const { x, y, width, height } = mark.getBBox();
    const { seen } = this;
    const h = this.seenHeight();
    if (x < seen.x || x + width > seen.x + seen.w) seen.x = x + Math.min(width, seen.w) / 2 - seen.w / 2;
    if (y < seen.y || y + height > seen.y + h) seen.y = y + Math.min(height, h) / 2 - h / 2;
    this.update();
    mark.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Fit the frame to the room that there is. */
  measure(): void {
    const { size, view } = this;
    this.room = view.clientWidth;
    const width = this.shownWidth();
    this.svg?.setAttribute("width", String(width));
    this.svg?.setAttribute("height", String((size.height * width) / size.width));
    this.update();
    this.scrolls = view.scrollWidth > view.clientWidth || view.scrollHeight > view.clientHeight;
  }

  private update(): void {
    const { seen, size } = this;
    const h = this.seenHeight();
    seen.x = Math.min(Math.max(seen.x, 0), size.width - seen.w);
    seen.y = Math.min(Math.max(seen.y, 0), size.height - h);
    this.svg?.setAttribute("viewBox", `${seen.x} ${seen.y} ${seen.w} ${h}`);
  }

  private seenHeight(): number {
    return (this.seen.w * this.size.height) / this.size.width;
  }

  private shownWidth(): number {
    const { width } = this.size;
    return Math.min(width, Math.max(this.room || width, LEAST_SCALE * width));
  }

  private perPixel(): number {
    return this.seen.w / this.shownWidth();
  }
}
