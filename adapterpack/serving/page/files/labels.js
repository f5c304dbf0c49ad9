// Labels of a text, with their probabilities as bars.

import { el } from "./elements.js";
import { counted, percent, seconds } from "./numbers.js";
import { request } from "./server.js";

const MOST = 12;

export const LABELS = {
  route: "/v1/classify",
  inputs: [
    { id: "text", label: "Text", value: "I love this kettle.", rows: 2 },
    { id: "text_pair", label: "Second text, for models of pairs", value: "", rows: 1, optional: true },
  ],
  options: [],

  async answer(model, [text, second], options, pane, signal) {
    const asked = performance.now();
    const body = { model, input: second ? { text, text_pair: second } : text };
    const response = await request("v1/classify", { body, signal });
    const { data } = await response.json();
    const scores = Object.entries(data[0].scores).sort((one, other) => other[1] - one[1]);
    const left = scores.length > MOST ? [el("p", { class: "note" }, `and ${counted(scores.length - MOST, "label")} below these`)] : [];
    pane.show(bars(scores.slice(0, MOST)), ...left);
    return { digest: response.headers.get("X-Adapterpack-Digest"), facts: [`answered after ${seconds((performance.now() - asked) / 1000)}`] };
  },
};

function bars(scores) {
  return el("ul", { class: "bars" }, ...scores.map(([label, score]) => {
    const fill = el("span", { class: "fill" });
    fill.style.width = `${100 * score}%`;
    return el("li", {}, el("span", { class: "label" }, label), el("span", { class: "track", "aria-hidden": "true" }, fill), el("span", { class: "value" }, percent(score)));
  }));
}
