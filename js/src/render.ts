// Scene -> SVG text: a dumb loop over the marks. circuitlab/diagram/svg.py is its twin, and writes the same text.

import theme from "../../circuitlab/diagram/theme.json";
import type { Mark, Scene } from "./scene.ts";

export type ThemeName = keyof typeof theme.themes;
type Attributes = [string, string][];

const FONTS: Record<string, { family: string; style: string; weight: string }> = theme.fonts;
// biome-ignore lint/suspicious/noControlCharactersInRegex: these are what XML forbids
const FORBIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|\p{Surrogate}/gu;
const ESCAPES: Record<string, string> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "\n": "&#10;",
  "\r": "&#13;",
  "\t": "&#9;",
};

/** Token name -> CSS colour. */
export function tokens(name: ThemeName): Record<string, string> {
  return theme.themes[name];
}

/** Standalone SVG. */
export function svgText(scene: Scene, name: ThemeName): string {
  const colours = tokens(name);
  const [w, h] = [number(scene.width), number(scene.height)];
  const head =
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${w} ${h}" width="${w}" height="${h}" ` +
    `role="img"><title>${text(scene.title)}</title><desc>${text(scene.description)}</desc>` +
    `<rect width="${w}" height="${h}" fill="${colours.paper}"/>`;
  return `${head}${scene.marks.map((mark) => drawn(mark, colours)).join("")}</svg>\n`;
}

function drawn(mark: Mark, colours: Record<string, string>): string {
  const names: Attributes = [["data-role", mark.role]];
  for (const key of ["wire", "op", "block"] as const) {
    const value = mark[key];
    if (value) names.push([`data-${key}`, value]);
  }
  if (mark.shape === "text") {
    return `<text${attributes([...names, ...font(mark, colours)])}>${text(mark.text ?? "")}</text>`;
  }
  const paint: Attributes = [
    ["fill", mark.fill ? (colours[mark.fill] ?? "none") : "none"],
    ["stroke", mark.stroke ? (colours[mark.stroke] ?? "none") : "none"],
  ];
  if (mark.stroke) paint.push(["stroke-width", number(mark.width)]);
  if (mark.role === "wire" && !mark.dash?.length) paint.push(["stroke-linecap", "round"]);
  if (mark.dash?.length) paint.push(["stroke-dasharray", mark.dash.map(number).join(" ")]);
  if (mark.fill && (mark.opacity ?? 1) !== 1) paint.push(["fill-opacity", number(mark.opacity)]);
  if (mark.shape === "path") return `<path${attributes([["d", mark.d ?? ""], ...names, ...paint])}/>`;
  const place: [string, number | undefined][] =
    mark.shape === "circle"
      ? [
          ["cx", mark.x],
          ["cy", mark.y],
          ["r", mark.r],
        ]
      : [
          ["x", mark.x],
          ["y", mark.y],
          ["width", mark.w],
          ["height", mark.h],
          ["rx", mark.r],
        ];
  const placed: Attributes = place.map(([key, value]) => [key, number(value)]);
  return `<${mark.shape}${attributes([...placed, ...names, ...paint])}/>`;
}

function font(mark: Mark, colours: Record<string, string>): Attributes {
  const found = FONTS[mark.font || "title"];
  return [
    ["x", number(mark.x)],
    ["y", number(mark.y)],
    ["font-family", found?.family ?? "sans-serif"],
    ["font-size", number(mark.size)],
    ["font-style", found?.style ?? "normal"],
    ["font-weight", found?.weight ?? "normal"],
    ["text-anchor", mark.anchor || "start"],
    ["fill", colours[mark.fill || "ink"] ?? "none"],
  ];
}

function number(value: number | undefined): string {
  return ((value ?? 0) + 0).toFixed(2).replace(/\.?0+$/, "");
}

function attributes(values: Attributes): string {
  return values.map(([key, value]) => ` ${key}="${text(value)}"`).join("");
}

function text(value: string): string {
  return value.replace(FORBIDDEN, "\ufffd").replace(/[&<>"\n\r\t]/g, (char) => ESCAPES[char] ?? char);
}
