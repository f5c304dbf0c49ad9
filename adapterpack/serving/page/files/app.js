// The page: asks for a key where one is needed, then looks at the server again and again.

import { Compare } from "./compare.js";
import { at } from "./elements.js";
import { Live } from "./live.js";
import { Models } from "./models.js";
import { counted } from "./numbers.js";
import { get, storeKey, storedKey } from "./server.js";

const STATUS_SECONDS = 2;
const MODELS_SECONDS = 6;

let compare = null;
let live = null;
let models = null;
let looking = 0;
let listed = 0;

/** Reads what the server is, and shows it. */
async function begin() {
  try {
    const status = await get("v1/status");
    const { paths } = await get("openapi.json");
    [compare, live, models, listed] = [new Compare(paths), new Live(), new Models(), 0];
    at("sign-in").hidden = true;
    at("content").hidden = false;
    at("who").hidden = !storedKey();
    at("key-name").textContent = status.key;
    at("base").textContent = status.base;
    document.title = `${status.base} · adapterpack`;
    at("footer").textContent = `adapterpack ${status.version}. This page loads nothing from elsewhere; what you type goes to this server alone.`;
    await show(status);
    at("trouble").hidden = true;
    again(look, STATUS_SECONDS);
  } catch (problem) {
    failed(problem, begin);
  }
}

/** Does it in a while; at most one thing is to be done. */
function again(what, seconds) {
  clearTimeout(looking);
  looking = setTimeout(what, 1000 * seconds);
}

/** Looks at the server once, and again in a while; not while nobody sees the page. */
async function look() {
  try {
    if (!document.hidden) await show(await get("v1/status"));
    if (at("content").hidden) return; // signed out meanwhile
    at("trouble").hidden = true;
    again(look, STATUS_SECONDS);
  } catch (problem) {
    failed(problem, look);
  }
}

async function show(status) {
  live.add(status, compare.kind?.route === "/v1/chat/completions");
  if (performance.now() < listed) return;
  const [named, known] = await Promise.all([get("v1/models"), get("v1/status/models")]);
  compare.offer(named.data, known.models.filter((model) => model.headless).map((model) => model.name));
  models.show(known);
  const many = models.adapters > 200 ? 5 : 1; // a long list is read less often
  listed = performance.now() + 1000 * MODELS_SECONDS * many;
  at("lead").textContent = `${models.adapters ? `${counted(models.adapters, "adapter")} on one base` : "The base alone, so far"}. Every answer says which pack gave it, and this page compares that with the one that is listed.`;
}

function failed(problem, what) {
  if (problem.status === 401) {
    askForKey(storedKey() ? problem.message : "");
    return;
  }
  at("trouble").textContent = `${problem.message} Trying again …`;
  at("trouble").hidden = false;
  again(what, 2 * STATUS_SECONDS);
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
  clearTimeout(looking);
  compare.stopping?.abort();
  askForKey("");
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden || !compare || at("content").hidden) return;
  look();
});
begin();
