// What is seen, as a file of its own.

import { svgText, type ThemeName } from "./render.ts";
import type { Scene } from "./scene.ts";

/** The longest side of a picture that browsers can draw, in pixels. */
const LONGEST = 16_000;

/** Save a scene as a standalone SVG file. */
export function saveSvg(scene: Scene, theme: ThemeName): void {
  download(svgBlob(scene, theme), fileName(scene, "svg"));
}

/** Save a scene as a PNG file of twice its size, less where that is more than a browser can draw. */
export async function savePng(scene: Scene, theme: ThemeName): Promise<void> {
  const image = new Image();
  const url = URL.createObjectURL(svgBlob(scene, theme));
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

function svgBlob(scene: Scene, theme: ThemeName): Blob {
  return new Blob([svgText(scene, theme)], { type: "image/svg+xml" });
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
