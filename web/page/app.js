// The page: opens its backend - a server, or a bundle in this browser - and shows what that can do.

import { BundleBackend } from "./bundle_backend.js";
import { Compare } from "./compare.js";
import { at, say } from "./elements.js";
import { Live } from "./live.js";
import { LoadForm } from "./load.js";
import { Models } from "./models.js";
import { counted } from "./numbers.js";
import { storeKey, storedKey } from "./server.js";
import { ServerBackend } from "./server_backend.js";

const STATUS_SECONDS = 2;
const MODELS_SECONDS = 6;

const backend = document.querySelector("meta[name=bundle]") ? new BundleBackend() : new ServerBackend();
let compare, live, models, form, timer;
let listed = 0;

/** Opens the backend, and shows it. */
async function begin() {
  try {
    at("opening").hidden = backend instanceof ServerBackend;
    await backend.open();
    [compare, models, listed] = [new Compare(backend), new Models(unload), 0];
    for (const id of ["opening", "sign-in"]) at(id).hidden = true;
    at("content").hidden = false;
    at("who").hidden = !backend.key;
    at("key-name").textContent = backend.key || "";
    at("base").textContent = backend.base;
    document.title = `${backend.base} · adapterpack`;
    at("footer").replaceChildren(...backend.footer);
    if (backend.load) form ??= new LoadForm(backend, list);
    if (!backend.status) return await list();
    live = new Live();
    at("now").hidden = false;
    await show();
    again(look, STATUS_SECONDS);
  } catch (problem) {
    fail(problem, begin);
  }
}

/** Offers the models, and lists them. */
async function list() {
  const { choices, headless, ...known } = await backend.list();
  compare.offer(choices, headless);
  models.show(known);
  form?.show();
  at("lead").textContent = backend.lead(models.adapters && counted(models.adapters, "adapter"));
}

function unload(name) {
  backend.unload(name);
  list();
  say(`${name} is unloaded.`);
}

/** Calls a function in a while; at most one call is waiting. */
function again(call, delay) {
  clearTimeout(timer);
  timer = setTimeout(call, 1000 * delay);
}

/** Looks at the server once, and again in a while; not while nobody sees the page. */
async function look() {
  try {
    if (!document.hidden) await show();
    if (at("content").hidden) return; // signed out meanwhile
    again(look, STATUS_SECONDS);
  } catch (problem) {
    fail(problem, look);
  }
}

async function show() {
  live.add(await backend.status(), backend.task === "text-generation");
  if (performance.now() >= listed) {
    await list();
    const many = models.adapters > 200 ? 5 : 1; // a long list is read less often
    listed = performance.now() + 1000 * MODELS_SECONDS * many;
  }
  at("trouble").hidden = true;
}

/** Says what went wrong; of a server a key is asked for, or it is tried again. */
function fail(problem, call) {
  if (problem.status === 401) return askForKey(storedKey() ? problem.message : "");
  at("opening").hidden = true;
  at("trouble").textContent = `${problem.message}${backend.status ? " Trying again …" : ""}`;
  at("trouble").hidden = false;
  if (backend.status) again(call, 2 * STATUS_SECONDS);
}

function askForKey(why) {
  storeKey("");
  at("trouble").textContent = why;
  at("trouble").hidden = !why;
  at("content").hidden = true;
  at("who").hidden = true;
  at("sign-in").hidden = false;
  at("key").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  storeKey(at("key").value.trim());
  at("key").value = "";
  begin();
});
at("sign-out").addEventListener("click", () => {
  clearTimeout(timer);
  compare.stopping?.abort();
  askForKey("");
});
document.addEventListener("visibilitychange", () => {
  if (live && !document.hidden && !at("content").hidden) look();
});
begin();
