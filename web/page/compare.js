// Asks two models the same at once, and shows their answers side by side.

import { at, el, say } from "./elements.js";
import { LABELS } from "./labels.js";
import { percent } from "./numbers.js";
import { Pane } from "./pane.js";
import { TAGS } from "./tags.js";
import { TEXT } from "./text.js";
import { VECTORS } from "./vectors.js";

const KINDS = [TEXT, LABELS, VECTORS, TAGS];

export class Compare {
  constructor(backend) {
    this.backend = backend;
    this.kind = KINDS.find((kind) => kind.task === backend.task);
    this.mixes = this.kind?.mixes && backend.mixes;
    this.panes = [new Pane("Left", "c1"), new Pane("Right", "c2")];
    this.stopping = null;
    this.build();
  }

  /** The models to choose from, the base first. It begins with two that can answer: of `headless` ones none can. */
  offer(models, headless) {
    const able = models.filter((model) => !headless.includes(model.id) && !model.chooses);
    this.panes.forEach((pane, place) => able.length && pane.offer(models, able[Math.min(place, able.length - 1)].id, this.mixes, headless));
    if (!this.form) return;
    this.form.hidden = !able.length;
    this.none.hidden = able.length || !models.length;
    this.panes[1].element.hidden = able.length < 2;
    this.first.textContent = able.length < 2 ? "Ask" : "Ask both";
  }

  /** Those that are asked: where there is one model alone, one. */
  get asked() {
    return this.panes.filter((pane) => !pane.element.hidden);
  }

  build() {
    if (!this.kind) {
      at("compare").replaceChildren(el("p", { class: "note" }, "This page has no form for what this server answers; /openapi.json has its routes."));
      return;
    }
    this.inputs = this.kind.inputs.map((input) => el("textarea", { id: input.id, rows: input.rows, required: !input.optional }, input.value));
    const sampling = this.kind.options.filter((option) => this.backend.sampling.includes(option.id));
    this.options = sampling.map(({ label, ...attributes }) => el("input", attributes));
    this.again = el("input", { id: "again", type: "checkbox", checked: this.kind === TEXT });
    this.anew = el("button", { type: "button", class: "plain", onclick: () => this.panes.forEach((pane) => pane.reset()) }, "New conversation");
    this.history = el("div", { class: "field check", hidden: this.kind !== TEXT }, this.again, el("label", { for: "again" }, "Continue the conversation"), this.anew);
    this.first = el("button", { class: "first" }, "Ask both");
    this.stop = el("button", { type: "button", disabled: true, onclick: () => this.stopping?.abort() }, "Stop");
    const fields = this.kind.inputs.map((input, place) => el("div", { class: "field" }, el("label", { for: input.id }, input.label), this.inputs[place]));
    const options = sampling.map((option, place) => {
      const label = el("label", { for: option.id }, option.label);
      return el("div", { class: option.type === "checkbox" ? "field check" : "field" }, ...(option.type === "checkbox" ? [this.options[place], label] : [label, this.options[place]]));
    });
    this.form = el("form", { hidden: true, onsubmit: (event) => this.submit(event), onkeydown: (event) => this.key(event) },
      el("div", { class: "inputs" }, ...fields),
      el("div", { class: "options" }, ...options, this.history, el("div", { class: "row" }, this.first, this.stop)),
      el("div", { class: "pair" }, ...this.panes.map((pane) => pane.element)));
    this.none = el("p", { class: "note", hidden: true }, "Nothing here can answer yet: the base has no trained head, and there is no adapter with one.");
    at("compare").replaceChildren(this.none, this.form);
  }

  key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    if (event.key === "Escape") this.stopping?.abort();
  }

  async submit(event) {
    event.preventDefault();
    if (this.stopping) return;
    this.stopping = new AbortController();
    this.busy(true);
    const texts = this.inputs.map((input) => input.value);
    if (this.again.checked) this.inputs[0].value = ""; // it stands above its answers
    await Promise.all(this.asked.map((pane) => this.ask(pane, texts)));
    this.stopping = null;
    this.busy(false);
    say(`Ended: ${this.asked.map((pane) => pane.name).join(" and ")}.`);
  }

  /** Asks for one pane. Where the backend lists digests, the one that answers is compared with the listed one. */
  async ask(pane, texts) {
    const { asked } = pane;
    pane.begin(this.again.checked, this.kind === TEXT ? texts[0] : "");
    try {
      const { digest, facts, chosen } = await this.kind.answer(this.backend, asked, texts, this.chosen(), pane, this.stopping.signal);
      const sure = chosen?.sure == null ? "" : `, ${percent(chosen.sure)} sure`;
      const choice = chosen ? [`chose ${chosen.model}${sure}`] : [];
      pane.tell([...choice, ...facts], digest, await this.backend.agrees?.(digest, chosen ?? asked));
    } catch (problem) {
      pane.fail(problem);
    } finally {
      pane.end();
    }
  }

  /** The options that somebody has set: the others are the server's. */
  chosen() {
    const set = this.options.map((input) => [input.id, input.type === "checkbox" ? input.checked : input.value === "" ? null : input.valueAsNumber]);
    return Object.fromEntries(set.filter(([, value]) => value != null));
  }

  busy(now) {
    const [from, to] = now ? [this.first, this.stop] : [this.stop, this.first];
    const focused = document.activeElement === from;
    to.disabled = false;
    from.disabled = true;
    this.anew.disabled = now;
    if (focused) to.focus();
  }
}
