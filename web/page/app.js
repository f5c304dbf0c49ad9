// The page: opens the bundle next to it, and shows what it can do.

import { Adapters } from "./adapters.js";
import { Ask } from "./ask.js";
import { at, digestButton, el, say } from "./elements.js";
import { bytes, counted, seconds } from "./numbers.js";

// Scripts of workers come from this site alone; nothing else may become script or markup.
globalThis.trustedTypes?.createPolicy("default", {
  createScriptURL: (url) => {
    const address = new URL(url, location.href);
    if (address.origin !== location.origin && address.protocol !== "blob:") throw new TypeError("a script of another site");
    return url;
  },
});

/** The module that runs bundles; without the packages that it imports the browser cannot load it. */
async function module() {
  try {
    return await import("../adapterpack.js");
  } catch (error) {
    throw new Error(`The packages that run models are not on this site. Who publishes it fetches them once: npm install --ignore-scripts (${error.message})`);
  }
}

async function begin() {
  const began = performance.now();
  try {
    const { open } = await module();
    const asked = new URLSearchParams(location.search).get("provider") ?? "auto";
    const bundle = await open("bundle/", { provider: asked, progress });
    show(bundle, performance.now() - began);
  } catch (problem) {
    at("opening").hidden = true;
    at("trouble").textContent = problem.message;
    at("trouble").hidden = false;
  }
}

function progress(done, total) {
  at("progress").max = total;
  at("progress").value = done;
  at("progress-words").textContent = done < total ? `${bytes(done)} of ${bytes(total)}, each file compared with its digest` : "All is here; the graph is being opened …";
}

function show(bundle, took) {
  document.title = `${bundle.base} · adapterpack`;
  at("base").textContent = bundle.base;
  const ask = new Ask(bundle);
  const offer = () => {
    ask.offer();
    at("lead").textContent = `${counted(bundle.adapters.length, "adapter")} on one base, in this browser: what you type does not leave it.`;
  };
  const adapters = new Adapters(bundle, offer);
  offer();
  adapters.show();
  const runner = bundle.provider === "webgpu" ? "WebGPU" : "WebAssembly";
  at("footer").replaceChildren(el("p", {}, `Runs by ${runner}; open after ${seconds(took / 1000)}. The bundle is `, digestButton(bundle.digest), ". This page loads nothing from elsewhere."));
  at("opening").hidden = true;
  at("content").hidden = false;
  globalThis.adapterpack = { bundle, opened: took };
  say(`${bundle.base} is open.`);
}

begin();
