// What is seen, as a file of its own.

import type { Scene } from "./scene.ts";

/** The longest side of a picture that browsers can draw, in pixels. */
const LONGEST = 16_000;

/** A scene's SVG with what is lit up on the page; `marks` are its marks there. */
export function litText(text: string, marks: Iterable<SVGElement>): string {
  const copy = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  const copied = copy.querySelectorAll("[data-role]");
  [...marks].forEach((mark, n) => {
    if (!mark.classList.contains("cl-on")) return;
    const seen = getComputedStyle(mark);
    for (const name of ["fill", "stroke", "stroke-width"])
      copied[n]?.setAttribute(name, seen.getPropertyValue(name));
  });
  return `${new XMLSerializer().serializeToString(copy)}\n`;
}

/** Save a scene's SVG as a file. */
export function saveSvg(scene: Scene, text: string): void {
  download(svgBlob(text), fileName(scene, "svg"));
}

/** Save a scene's SVG as a PNG file of twice its size, less where that is more than a browser can draw. */
export async function savePng(scene: Scene, text: string): Promise<void> {
  const image = new Image();
  const url = URL.createObjectURL(svgBlob(text));
  image.src = url;
  await image.decode();
  URL.revokeObjectURL(url);
  const scale = Math.min(2, LONGEST / Math.max(scene.width, scene.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.ceil(scene.width * scale);
  canvas.height = Math.ceil(scene.height * scale);
  canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise<Blob | null>((done) => canvas.toBlob(done));
  if (!blob) throw new Error("the browser could not draw it");
  download(blob, fileName(scene, "png"));
}

function svgBlob(text: string): Blob {
  return new Blob([text], { type: "image/svg+xml" });
}

function fileName(scene: Scene, suffix: string): string {
  const name = [scene.title, scene.block].filter((part) => part).join("-") || "circuit";
  return `${name.replace(/[^\w.-]+/g, "_")}.${suffix}`;
}

function download(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
