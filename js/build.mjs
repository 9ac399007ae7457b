// One source, two outputs: the widget's bundle for anywidget, and the JupyterLab extension.
// With --test, the tests are bundled too. Nothing is downloaded.
import { spawnSync } from "node:child_process";
import { readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { build } from "esbuild";

const require = createRequire(import.meta.url);
const common = { bundle: true, target: "es2022", loader: { ".css": "text" }, logLevel: "warning" };

if (process.argv.includes("--test")) {
  const tests = readdirSync("test").filter((name) => name.endsWith(".test.ts"));
  await build({
    ...common,
    entryPoints: tests.map((name) => join("test", name)),
    outdir: "lib/test",
    platform: "node",
  });
} else {
  await build({
    ...common,
    entryPoints: ["src/widget.ts"],
    outfile: "../circuitlab/widgets/static/widget.js",
    format: "esm",
    minify: true,
  });
  await build({
    ...common,
    entryPoints: ["src/labextension.ts", "src/mime.ts"],
    outdir: "lib",
    format: "cjs",
    external: ["@jupyterlab/*", "@lumino/*"],
  });
  const builder = require.resolve("@jupyter/builder/lib/build-labextension.js");
  const core = join(dirname(require.resolve("@jupyterlab/core-meta/package.json")), "core.package.json");
  const done = spawnSync(process.execPath, [builder, "--core-package-file", core, "."], { stdio: "inherit" });
  process.exit(done.status ?? 1);
}
