// Runs the checks of a client in Node: `run_checks.mjs PACKAGE FILE... [--only TEXT]`, called by `tests/clients/run.py`.
//
// A check is an exported function whose name begins with `check_`; it fails by throwing. What became of each goes as one line of JSON to the
// file named by $CHECK_RESULTS; the last line says that all checks were reached.

import { appendFileSync, readFileSync } from "node:fs";
import { basename } from "node:path";
import { parseArgs } from "node:util";

const { values, positionals } = parseArgs({ allowPositionals: true, options: { only: { type: "string", default: "" } } });
const [client, ...files] = positionals;
const tell = (line) => appendFileSync(process.env.CHECK_RESULTS, JSON.stringify(line) + "\n");

tell({ version: JSON.parse(readFileSync(new URL(`node_modules/${client}/package.json`, import.meta.url))).version });
for (const file of files) {
  const checks = await import(file).catch((error) => ({ [`check_${basename(file)}`]: () => Promise.reject(error) }));
  for (const [name, check] of Object.entries(checks)) {
    if (!name.startsWith("check_") || !name.includes(values.only)) continue;
    const started = performance.now();
    let error = null;
    try {
      await check();
    } catch (failure) {
      console.error(failure);
      const where = /\(?file:.*\/(check_[^)]*)\)?/.exec(failure.stack)?.[1] ?? "";
      error = `${failure.name}: ${failure.message.split("\n").join(" ")} (${where})`;
    }
    tell({ check: name.slice("check_".length), error, seconds: (performance.now() - started) / 1000 });
  }
}
tell({ is_done: true });
