// Reading scenes: broken and newer ones are clear errors.

import assert from "node:assert/strict";
import { test } from "node:test";
import { readDocument, readScene } from "../src/scene.ts";

const scene = { version: 1, block: "", title: "", description: "", width: 1, height: 1, marks: [] };

test("a newer scene is refused by its version", () => {
  assert.throws(() => readScene({ ...scene, version: 2 }), /version 2/);
});

test("a document needs a scene for its root", () => {
  assert.throws(() => readDocument({ version: 1, root: "a", scenes: {} }), /no scene for its root "a"/);
  assert.equal(readDocument({ version: 1, root: "", scenes: { "": scene } }).scenes[""]?.width, 1);
});

test("a saved circuit carries its diagram", () => {
  assert.equal(readDocument({ diagram: { version: 1, root: "", scenes: { "": scene } } }).root, "");
});

test("anything else is refused", () => {
  for (const data of [null, 3, [], "x", {}, { version: 1, scenes: 4 }])
    assert.throws(() => readDocument(data));
});
