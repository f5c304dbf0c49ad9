// Answers from the bundle that lies next to this page, in this browser.

import { at, digestButton } from "./elements.js";
import { bytes, seconds } from "./numbers.js";

export class BundleBackend {
  sampling = ["temperature", "max_tokens"];
  loaded = new Set();

  /** Fetches the bundle and opens its graph. */
  async open() {
    const began = performance.now();
    allowWorkers();
    const { open } = await importModule();
    const provider = new URLSearchParams(location.search).get("provider") ?? "auto";
    this.bundle = await open("bundle/", { provider, progress });
    this.task = this.bundle.task;
    this.base = this.bundle.base;
    const opened = performance.now() - began;
    const runner = this.bundle.provider === "webgpu" ? "WebGPU" : "WebAssembly";
    const start = `Runs by ${runner}; open after ${seconds(opened / 1000)}. The bundle is `;
    this.footer = [start, digestButton(this.bundle.digest), ". This page loads nothing from elsewhere."];
    globalThis.adapterpack = { bundle: this.bundle, opened };
  }

  list() {
    const models = this.bundle.adapters.map(({ name, pack, labels }) => {
      return { name, digest: pack, adapter: {}, labels: labels ?? [], removable: this.loaded.has(name) };
    });
    const base = this.find(this.base) ? `${this.base} (base)` : this.base; // no adapter has its name
    this.baseName = base;
    const choices = [{ id: base }, ...models.map(({ name }) => ({ id: name, parent: base }))];
    const headless = this.bundle.baseAnswers ? [] : [base];
    return { models, choices, headless, empty: "None: the base alone answers." };
  }

  lead(adapters) {
    return `${adapters || "No adapters"} on one base, in this browser: what you type does not leave it.`;
  }

  get freeSlots() {
    return this.bundle.freeSlots;
  }

  async load(files, digest) {
    const adapter = await this.bundle.load(files, { digest });
    this.loaded.add(adapter.name);
    return adapter;
  }

  unload(name) {
    this.bundle.unload(name);
    this.loaded.delete(name);
  }

  async *generate({ model }, messages, { temperature, max_tokens: maxNewTokens }, signal) {
    const adapter = this.adapter(model);
    const options = { adapter: adapter?.name, temperature, maxNewTokens, signal };
    for await (const text of this.bundle.generate(messages, options)) yield { text, digest: adapter?.pack };
  }

  async classify({ model }, [text, textPair]) {
    const adapter = this.adapter(model);
    const row = { text, textPair: textPair || undefined, adapter: adapter?.name };
    const [{ label, scores }] = await this.bundle.classify([row]);
    if (label === null) throw new Error("The base has no trained head: only adapters give labels here.");
    return { scores, digest: adapter?.pack };
  }

  async embed({ model }, texts) {
    const adapter = this.adapter(model);
    const vectors = await this.bundle.embed(texts.map((text) => ({ text, adapter: adapter?.name })));
    return { vectors, digest: adapter?.pack };
  }

  /** The adapter of that name; none for the base. */
  adapter(name) {
    const adapter = this.find(name);
    if (!adapter && name !== this.baseName) throw new Error(`${name} is no longer loaded.`);
    return adapter;
  }

  find(name) {
    return this.bundle.adapters.find((adapter) => adapter.name === name);
  }
}

/** Shows how many bytes of how many are here. */
function progress(done, total) {
  Object.assign(at("progress"), { max: total, value: done });
  const left = `${bytes(done)} of ${bytes(total)}, each file compared with its digest`;
  at("progress-words").textContent = done < total ? left : "All is here; the graph is being opened …";
}

/** Scripts of workers come from this site alone; nothing else may become script or markup. */
function allowWorkers() {
  globalThis.trustedTypes?.createPolicy("default", {
    createScriptURL: (url) => {
      const address = new URL(url, location.href);
      const ours = address.origin === location.origin || address.protocol === "blob:";
      if (!ours) throw new TypeError("a script of another site");
      return url;
    },
  });
}

/** The module that runs bundles; without the packages that it imports the browser cannot load it. */
async function importModule() {
  try {
    return await import("../adapterpack.js");
  } catch (error) {
    const remedy = "Who publishes it fetches them once: npm install --ignore-scripts";
    throw new Error(`The packages that run models are not on this site. ${remedy} (${error.message})`);
  }
}
