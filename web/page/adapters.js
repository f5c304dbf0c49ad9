// The table of adapters, and the form that loads a further pack into a free slot.

import { at, digestButton, el, say } from "./elements.js";
import { counted, seconds } from "./numbers.js";

export class Adapters {
  /** `changed` is told when there are others. */
  constructor(bundle, changed) {
    this.bundle = bundle;
    this.changed = changed;
    this.loaded = new Set();
    this.form = at("load-form");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load([...at("pack-files").files]);
    });
    for (const kind of ["dragover", "dragleave", "drop"]) this.form.addEventListener(kind, (event) => this.drag(event));
  }

  show() {
    const rows = this.bundle.adapters.map((adapter) => el("tr", {},
      el("td", { "data-name": "Name", class: "word" }, adapter.name),
      el("td", { "data-name": "Pack", class: "word" }, digestButton(adapter.pack)),
      el("td", { "data-name": "Labels" }, adapter.labels?.slice(0, 8).join(", ") ?? ""),
      el("td", { "data-name": "" }, this.loaded.has(adapter.name) ? el("button", { type: "button", class: "plain", "aria-label": `Unload ${adapter.name}`, onclick: () => this.unload(adapter.name) }, "Unload") : null)));
    const head = el("thead", {}, el("tr", {}, ...["Name", "Pack", "Labels", ""].map((name) => el("th", { scope: "col" }, name))));
    at("adapters").replaceChildren(rows.length ? el("div", { class: "scroll" }, el("table", {}, head, el("tbody", {}, ...rows))) : el("p", { class: "note" }, "None: the base alone answers."));
    const free = this.bundle.freeSlots;
    at("loading-note").textContent = free ? `${counted(free, "slot is", "slots are")} free. A pack is loaded if each tensor has the digest that its manifest lists, and if it was made for this base.` : `No slot is free: ${this.loaded.size ? "unload one first" : "the site was exported without room for more (--slots)"}.`;
    this.form.hidden = !free;
  }

  unload(name) {
    this.bundle.unload(name);
    this.loaded.delete(name);
    this.show();
    this.changed();
    say(`${name} is unloaded.`);
  }

  drag(event) {
    event.preventDefault();
    this.form.classList.toggle("over", event.type === "dragover");
    if (event.type === "drop") this.load([...event.dataTransfer.files]);
  }

  async load(files) {
    const [button, began] = [at("load-button"), performance.now()];
    if (button.disabled) return;
    button.disabled = true;
    at("trouble").hidden = true;
    say("The pack is being compared with its digests.");
    try {
      const digest = at("pack-digest").value.trim() || undefined;
      const adapter = await this.bundle.load(files, { digest });
      this.loaded.add(adapter.name);
      this.form.reset();
      this.show();
      this.changed();
      say(`${adapter.name} is loaded${adapter.note ? ` (${adapter.note}, so nothing was replayed)` : ""}, after ${seconds((performance.now() - began) / 1000)}.`);
    } catch (problem) {
      at("trouble").textContent = `The pack is refused. ${problem.message}`;
      at("trouble").hidden = false;
      at("trouble").scrollIntoView({ block: "nearest" });
    } finally {
      button.disabled = false;
    }
  }
}
