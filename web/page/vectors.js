// How near two texts are to each other: the cosine of their vectors.

import { el } from "./elements.js";
import { count, seconds } from "./numbers.js";

export const VECTORS = {
  task: "feature-extraction",
  mixes: true,
  inputs: [
    { id: "one", label: "One text", value: "Where is my parcel?", rows: 2 },
    { id: "other", label: "Another text", value: "My order has not arrived.", rows: 2 },
  ],
  options: [],

  async answer(backend, asked, texts, options, pane, signal) {
    const began = performance.now();
    const { vectors, digest, chosen } = await backend.embed(asked, texts, signal);
    const near = cosine(...vectors);
    const mark = el("span", { class: "mark" });
    mark.style.left = `${50 * (1 + near)}%`;
    pane.show(
      el("p", { class: "figure" }, near.toFixed(3)),
      el("div", { class: "scale", "aria-hidden": "true" }, mark),
      el("p", { class: "scale-words note", "aria-hidden": "true" }, el("span", {}, "−1 opposite"), el("span", {}, "0 unrelated"), el("span", {}, "1 the same")),
    );
    const facts = [`cosine of ${count(vectors[0].length)} numbers`, `after ${seconds((performance.now() - began) / 1000)}`];
    return { digest, chosen, facts };
  },
};

function cosine(one, other) {
  let product = 0;
  let lengths = [0, 0];
  one.forEach((value, place) => {
    product += value * other[place];
    lengths = [lengths[0] + value * value, lengths[1] + other[place] * other[place]];
  });
  return product / Math.sqrt(lengths[0] * lengths[1]) || 0;
}
