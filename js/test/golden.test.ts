// The browser's renderer writes the same text as Python's, on the same golden scenes.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { svgText } from "../src/render.ts";
import { readScene } from "../src/scene.ts";

const FOLDER = "../tests/golden";
const names = readdirSync(FOLDER)
  .filter((name) => name.endsWith(".json"))
  .map((name) => name.slice(0, -5));

test("there are golden scenes", () => assert.ok(names.length >= 7));

for (const name of names) {
  for (const theme of ["light", "dark"] as const) {
    test(`${name}, ${theme}`, () => {
      const scene = readScene(JSON.parse(readFileSync(`${FOLDER}/${name}.json`, "utf8")));
      assert.equal(svgText(scene, theme), readFileSync(`${FOLDER}/${name}.${theme}.svg`, "utf8"));
    });
  }
}
