// Labels of a text, with their probabilities as bars.

import { el } from "./elements.js";
import { counted, percent } from "./numbers.js";

const MOST = 12;

export const LABELS = {
  task: "text-classification",
  inputs: [{ id: "prompt", label: "Text", value: "I love this kettle.", rows: 2 }],
  options: [],

  async answer(bundle, adapter, [text], options, history, output) {
    const [{ label, scores }] = await bundle.classify([{ text, adapter }]);
    if (label === null) {
      output.replaceChildren(el("p", { class: "note" }, "The base has no trained head: only adapters give labels here."));
      return { text: "", said: [] };
    }
    const sorted = Object.entries(scores).sort((one, other) => other[1] - one[1]);
    const left = sorted.length > MOST ? [el("p", { class: "note" }, `and ${counted(sorted.length - MOST, "label")} below these`)] : [];
    output.replaceChildren(el("ul", { class: "bars" }, ...sorted.slice(0, MOST).map(bar)), ...left);
    return { text: label, said: [] };
  },
};

function bar([label, score]) {
  const fill = el("span", { class: "fill" });
  fill.style.width = `${Math.max(0, Math.min(100, 100 * score))}%`;
  return el("li", {}, el("span", { class: "label" }, label), el("span", { class: "track", "aria-hidden": "true" }, fill), el("span", { class: "value" }, percent(score)));
}
