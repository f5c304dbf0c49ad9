// One side of a comparison: which model, its answer, and what is known of that: the digest, times, tokens.

import { digestButton, el } from "./elements.js";
import { Mix, packsOf } from "./mix.js";

const MIXED = "+"; // which is no adapter's name

export class Pane {
  /** `side` names it, and `tone` is its colour in the palette. */
  constructor(side, tone) {
    this.side = side;
    this.mix = new Mix(side, tone);
    this.select = el("select", { id: `model-${tone}`, onchange: () => this.mix.show(this.select.value === MIXED) });
    this.output = el("div", { class: "output", "aria-live": "polite", tabindex: 0, role: "region", "aria-label": `${side} answer` });
    this.facts = el("p", { class: "facts" });
    this.element = el("article", { class: `pane ${tone}` }, el("label", { for: `model-${tone}` }, side), this.select, this.mix.element, this.output, this.facts);
    this.reset();
  }

  /** Forgets the conversation. */
  reset() {
    this.messages = [];
    this.clear("Nothing asked yet.");
    this.output.replaceChildren(this.answer);
  }

  /** What a request asks for: a model, or the base with several adapters. */
  get asked() {
    return this.select.value === MIXED ? { model: this.base, adapters: this.mix.adapters } : { model: this.select.value };
  }

  /** The same in words. */
  get name() {
    const { model, adapters } = this.asked;
    return adapters ? adapters.map(({ name, weight }) => `${weight} × ${name}`).join(" + ") : model;
  }

  /** The models to choose from; `mixes`: two adapters at once, too. One that has gone stays chosen, so that nobody asks another unawares. */
  offer(models, first, mixes, headless) {
    const chosen = this.select.value || first;
    const names = models.map((model) => model.id);
    if (this.offered === names.join("\n")) return; // a list that is open stays open
    this.offered = names.join("\n");
    this.base = models.find((model) => !model.parent && !model.chooses)?.id;
    const adapters = models.filter((model) => model.parent).map((model) => model.id);
    const mixed = mixes && this.base && adapters.length > 1 ? [el("option", { value: MIXED }, "two adapters, mixed …")] : [];
    const gone = chosen && chosen !== MIXED && !names.includes(chosen) ? [el("option", { value: chosen }, `${chosen} (no longer there)`)] : [];
    const words = ({ id, parent, chooses }) => (headless.includes(id) ? `${id} (no trained head)` : chooses ? `${id} (chosen by the text)` : parent ? id : `${id} (base)`);
    this.select.replaceChildren(...models.map((model) => el("option", { value: model.id, disabled: headless.includes(model.id) }, words(model))), ...mixed, ...gone);
    this.select.value = chosen || names[0];
    this.mix.offer(adapters);
  }

  clear(words) {
    this.answer = el("div", { class: "answer" }, el("span", { class: "note" }, words));
    this.output.classList.remove("failed");
    this.facts.replaceChildren();
  }

  /** An answer begins, below its question if there is one; `again`: to one more message of the same conversation, which stays. */
  begin(again, question) {
    const kept = again && this.messages.length ? [...this.output.children] : [];
    if (!again) this.messages = [];
    this.clear("Waiting for the first word …");
    this.output.replaceChildren(...kept, ...(question ? [el("p", { class: "question" }, question)] : []), this.answer);
    this.output.scrollTop = this.output.scrollHeight;
    this.output.setAttribute("aria-busy", "true");
  }

  end() {
    this.output.removeAttribute("aria-busy");
  }

  /** The answer, as elements or text. */
  show(...children) {
    this.answer.replaceChildren(...children);
  }

  fail(problem) {
    const words = problem.name === "AbortError" ? "Stopped." : problem.message;
    this.output.classList.toggle("failed", problem.name !== "AbortError");
    const note = el("p", { class: "note" }, words);
    if (this.answer.querySelector(".note")) this.answer.replaceChildren(note);
    else this.answer.append(note);
  }

  /** Facts below the answer, and which digest answered: what was asked and is listed, or another; `right` is undefined where nothing is compared. */
  tell(facts, answered, right) {
    const parts = facts.map((fact) => el("span", {}, fact));
    if (answered) parts.unshift(verdict(answered, right));
    this.facts.replaceChildren(...parts);
  }
}

function verdict(answered, right) {
  const packs = packsOf(answered).flatMap(({ pack, weight }) => [weight == null ? "" : ` ${weight} × `, digestButton(pack)]);
  if (right === undefined) return el("span", {}, ...packs);
  return el("span", { class: right ? "right" : "wrong" }, ...packs, right ? " ✓ as listed" : " ✗ not the pack that is listed");
}
