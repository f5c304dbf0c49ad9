// How near two texts are to each other: the cosine of their vectors.

import { el } from "./elements.js";
import { count, seconds } from "./numbers.js";
import { request } from "./server.js";

export const VECTORS = {
  route: "/v1/embeddings",
  mixes: true,
  inputs: [
    { id: "one", label: "One text", value: "Where is my parcel?", rows: 2 },
    { id: "other", label: "Another text", value: "My order has not arrived.", rows: 2 },
  ],
  options: [],

  async answer(model, texts, options, pane, signal) {
    const asked = performance.now();
    const response = await request("v1/embeddings", { body: { model, ...options, input: texts, encoding_format: "float" }, signal });
    const { data } = await response.json();
    const near = cosine(data[0].embedding, data[1].embedding);
    const mark = el("span", { class: "mark" });
    mark.style.left = `${50 * (1 + near)}%`;
    pane.show(
      el("p", { class: "figure" }, near.toFixed(3)),
      el("div", { class: "scale", "aria-hidden": "true" }, mark),
      el("p", { class: "scale-words note", "aria-hidden": "true" }, el("span", {}, "−1 opposite"), el("span", {}, "0 unrelated"), el("span", {}, "1 the same")),
    );
    const facts = [`cosine of ${count(data[0].embedding.length)} numbers`, `after ${seconds((performance.now() - asked) / 1000)}`];
    return { digest: response.headers.get("X-Adapterpack-Digest"), facts };
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
