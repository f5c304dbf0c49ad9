// The form: a text, the adapters that answer it, and below it the answers side by side.

import { CHAT } from "./chat.js";
import { at, digestButton, el, say } from "./elements.js";
import { LABELS } from "./labels.js";
import { seconds } from "./numbers.js";
import { VECTORS } from "./vectors.js";

const KINDS = [CHAT, LABELS, VECTORS];
const TONES = ["c0", "c1", "c2", "c3"];
const BASE = ""; // which is no adapter's name

export class Ask {
  constructor(bundle) {
    this.bundle = bundle;
    this.kind = KINDS.find((kind) => kind.task === bundle.task);
    const names = bundle.adapters.map((adapter) => adapter.name);
    this.chosen = new Set(bundle.baseAnswers || !names.length ? [BASE, names[0] ?? BASE] : names.slice(0, 2)); // two that can answer
    this.stopping = null;
    this.history = [];
    this.build();
  }

  build() {
    this.inputs = this.kind.inputs.map((input) => el("textarea", { id: input.id, rows: input.rows, required: true }, input.value));
    this.options = this.kind.options.map(({ label, ...attributes }) => el("input", attributes));
    this.choices = el("div", { class: "choices" });
    this.first = el("button", { class: "first" }, "Ask");
    this.stop = el("button", { type: "button", disabled: true, onclick: () => this.stopping?.abort() }, "Stop");
    const again = this.kind.remembers ? el("button", { type: "button", onclick: () => this.forget() }, "New conversation") : null;
    this.form = el("form", { onsubmit: (event) => this.submit(event), onkeydown: (event) => this.key(event) },
      el("div", { class: "inputs" }, ...this.kind.inputs.map((input, place) => el("div", { class: "field" }, el("label", { for: input.id }, input.label), this.inputs[place]))),
      el("fieldset", {}, el("legend", {}, "Answered by"), this.choices),
      el("div", { class: "options" },
        ...this.kind.options.map((option, place) => el("div", { class: "field" }, el("label", { for: option.id }, option.label), this.options[place])),
        el("div", { class: "row" }, this.first, this.stop, again)));
    at("ask").replaceChildren(this.form);
  }

  /** The adapters to choose from, anew. */
  offer() {
    const names = [BASE, ...this.bundle.adapters.map((adapter) => adapter.name)];
    this.chosen = new Set([...this.chosen].filter((name) => names.includes(name)));
    this.choices.replaceChildren(...names.map((name, place) => {
      const box = el("input", { type: "checkbox", id: `by-${place}`, checked: this.chosen.has(name), onchange: () => (box.checked ? this.chosen.add(name) : this.chosen.delete(name)) });
      return el("div", { class: "check" }, box, el("label", { for: box.id }, name || `${this.bundle.base} (base)`));
    }));
  }

  key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    if (event.key === "Escape") this.stopping?.abort();
  }

  forget() {
    this.history = [];
    at("turns").replaceChildren();
    this.inputs[0].focus();
  }

  async submit(event) {
    event.preventDefault();
    if (this.stopping) return;
    const names = [BASE, ...this.bundle.adapters.map((adapter) => adapter.name)].filter((name) => this.chosen.has(name));
    if (!names.length) {
      say("Choose at least one to answer.");
      this.choices.querySelector("input").focus();
      return;
    }
    this.stopping = new AbortController();
    this.busy(true);
    const texts = this.inputs.map((input) => input.value);
    const panes = names.map((name, place) => this.pane(name, TONES[name ? 1 + ((place + 2) % 3) : 0]));
    at("turns").prepend(el("article", { class: "turn" }, el("p", {}, texts.join("\n")), el("div", { class: "pair" }, ...panes.map((pane) => pane.element))));
    const options = Object.fromEntries(this.options.filter((input) => input.value !== "").map((input) => [input.name, input.valueAsNumber]));
    const answers = await Promise.all(panes.map((pane) => this.answer(pane, texts, options)));
    if (this.kind.remembers) this.history.push({ role: "user", content: texts[0] }, { role: "assistant", content: answers[0] ?? "" });
    if (this.kind.remembers) this.inputs[0].value = "";
    this.stopping = null;
    this.busy(false);
    say("The answers are complete.");
  }

  pane(name, tone) {
    const output = el("div", { class: "output", "aria-live": "polite", "aria-busy": "true", tabindex: 0, role: "region", "aria-label": `Answer by ${name || "the base"}` });
    const facts = el("p", { class: "facts" });
    const adapter = this.bundle.adapters.find((one) => one.name === name);
    return { name, output, facts, adapter, element: el("section", { class: `pane ${tone}` }, el("h3", {}, name || "Base"), output, facts) };
  }

  async answer(pane, texts, options) {
    const asked = performance.now();
    try {
      const { text, said } = await this.kind.answer(this.bundle, pane.name || null, texts, options, this.history, pane.output, this.stopping.signal);
      pane.facts.replaceChildren(...(pane.adapter ? [digestButton(pane.adapter.pack)] : []), ...[...said, `${seconds((performance.now() - asked) / 1000)}`].map((fact) => el("span", {}, fact)));
      return text;
    } catch (problem) {
      const stopped = problem.name === "AbortError";
      pane.output.classList.toggle("failed", !stopped);
      pane.output.append(el("p", { class: "note" }, stopped ? "Stopped." : problem.message));
      return pane.output.firstChild?.nodeType === Node.TEXT_NODE ? pane.output.firstChild.data : "";
    } finally {
      pane.output.removeAttribute("aria-busy");
    }
  }

  busy(now) {
    const [from, to] = now ? [this.first, this.stop] : [this.stop, this.first];
    const focused = document.activeElement === from;
    to.disabled = false;
    from.disabled = true;
    if (focused) to.focus();
  }
}
