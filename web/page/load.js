// The form that loads a further pack into a free slot of a bundle in this browser.

import { at, say } from "./elements.js";
import { counted, seconds } from "./numbers.js";

export class LoadForm {
  /** `changed` is called when there is another adapter. */
  constructor(backend, changed) {
    this.backend = backend;
    this.changed = changed;
    this.form = at("load-form");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load([...at("pack-files").files]);
    });
    for (const kind of ["dragover", "dragleave", "drop"]) {
      this.form.addEventListener(kind, (event) => this.drag(event));
    }
    at("loading").hidden = false;
    this.show();
  }

  /** Says how many slots are free. */
  show() {
    const free = this.backend.freeSlots;
    const full = this.backend.loaded.size
      ? "unload one first"
      : "the site was exported without room for more (--slots)";
    at("loading-note").textContent = free
      ? `${counted(free, "slot is", "slots are")} free. A pack is loaded if each tensor has the digest ` +
        "that its manifest lists, and if it was made for this base."
      : `No slot is free: ${full}.`;
    this.form.hidden = !free;
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
      const { name, note } = await this.backend.load(files, at("pack-digest").value.trim() || undefined);
      this.form.reset();
      this.changed();
      const replayed = note ? ` (${note}, so nothing was replayed)` : "";
      say(`${name} is loaded${replayed}, after ${seconds((performance.now() - began) / 1000)}.`);
    } catch (problem) {
      at("trouble").textContent = `The pack is refused. ${problem.message}`;
      at("trouble").hidden = false;
      at("trouble").scrollIntoView({ block: "nearest" });
    } finally {
      button.disabled = false;
    }
  }
}
