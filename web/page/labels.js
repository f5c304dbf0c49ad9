// Labels of a text, with their probabilities as bars.

import { el } from "./elements.js";
import { counted, percent, seconds } from "./numbers.js";

const MOST = 12;

export const LABELS = {
  task: "text-classification",
  inputs: [
    { id: "text", label: "Text", value: "I love this kettle.", rows: 2 },
    { id: "text_pair", label: "Second text, for models of pairs", value: "", rows: 1, optional: true },
  ],
  options: [],

  async answer(backend, asked, texts, options, pane, signal) {
    const began = performance.now();
    const answer = await backend.classify(asked, texts, signal);
    const scores = Object.entries(answer.scores).sort((one, other) => other[1] - one[1]);
    const left = scores.length > MOST ? [el("p", { class: "note" }, `and ${counted(scores.length - MOST, "label")} below these`)] : [];
    pane.show(bars(scores.slice(0, MOST)), ...left);
    return { digest: answer.digest, chosen: answer.chosen, facts: [`answered after ${seconds((performance.now() - began) / 1000)}`] };
  },
};

function bars(scores) {
  return el("ul", { class: "bars" }, ...scores.map(([label, score]) => {
    const fill = el("span", { class: "fill" });
    fill.style.width = `${100 * score}%`;
    return el("li", {}, el("span", { class: "label" }, label), el("span", { class: "track", "aria-hidden": "true" }, fill), el("span", { class: "value" }, percent(score)));
  }));
}
