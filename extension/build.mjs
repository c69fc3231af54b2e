// Builds the one bundle that ships in the package. `node build.mjs [folder]`; the default folder is nbray/widgets/static.
//
// The first line carries a digest of the sources, so that a test without esbuild still sees when the bundle is stale.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const target = process.argv[2] ?? join(here, "..", "nbray", "widgets", "static");
const digest = createHash("sha256");
for (const name of readdirSync(join(here, "src")).sort()) digest.update(name).update(readFileSync(join(here, "src", name)));
const { outputFiles } = await build({
    entryPoints: [join(here, "src", "index.ts")],
    bundle: true,
    minify: true,
    format: "esm",
    target: "es2022",
    legalComments: "none",
    write: false,
});
writeFileSync(join(target, "graph.js"), `// sources ${digest.digest("hex")}\n${outputFiles[0].text}`);
writeFileSync(join(target, "graph.css"), readFileSync(join(here, "style", "graph.css")));
