// One side of a comparison: which model, its answer, and what is known of that: the digest, times, tokens.

import { digestButton, el } from "./elements.js";

export class Pane {
  /** `side` names it, and `tone` is its colour in the palette. */
  constructor(side, tone) {
    this.side = side;
    this.select = el("select", { id: `model-${tone}` });
    this.output = el("div", { class: "output", "aria-live": "polite", tabindex: 0, role: "region", "aria-label": `${side} answer` });
    this.facts = el("p", { class: "facts" });
    this.element = el("article", { class: `pane ${tone}` }, el("label", { for: `model-${tone}` }, side), this.select, this.output, this.facts);
    this.clear("Nothing asked yet.");
  }

  get model() {
    return this.select.value;
  }

  /** The models to choose from. One that has gone stays chosen, so that nobody asks another one unawares. */
  offer(models, first) {
    const chosen = this.model || first;
    const names = models.map((model) => model.id);
    if (this.offered === names.join("\n")) return; // a list that is open stays open
    this.offered = names.join("\n");
    const gone = chosen && !names.includes(chosen) ? [el("option", { value: chosen }, `${chosen} (no longer there)`)] : [];
    this.select.replaceChildren(...models.map((model) => el("option", { value: model.id }, model.parent ? model.id : `${model.id} (base)`)), ...gone);
    this.select.value = chosen || names[0];
  }

  clear(words = "") {
    this.output.replaceChildren(el("span", { class: "note" }, words));
    this.output.classList.remove("failed");
    this.facts.replaceChildren();
  }

  /** An answer begins. */
  begin() {
    this.clear("Waiting for the first word …");
    this.output.setAttribute("aria-busy", "true");
  }

  end() {
    this.output.removeAttribute("aria-busy");
  }

  /** The answer, as elements or text. */
  show(...children) {
    this.output.replaceChildren(...children);
  }

  fail(problem) {
    const words = problem.name === "AbortError" ? "Stopped." : problem.message;
    this.output.classList.toggle("failed", problem.name !== "AbortError");
    const note = el("p", { class: "note" }, words);
    if (this.output.querySelector(".note")) this.output.replaceChildren(note);
    else this.output.append(note);
  }

  /** Facts below the answer, and which digest answered: the one that is listed, or another. */
  tell(facts, answered, listed) {
    const parts = facts.map((fact) => el("span", {}, fact));
    if (answered) parts.unshift(verdict(answered, listed));
    this.facts.replaceChildren(...parts);
  }
}

function verdict(answered, listed) {
  const same = answered === listed;
  const words = same ? "✓ as listed" : "✗ not the pack that is listed";
  return el("span", { class: same ? "right" : "wrong" }, digestButton(answered), ` ${words}`);
}
