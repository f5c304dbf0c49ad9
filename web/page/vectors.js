// How near two texts are, by the cosine of their embeddings.

import { el } from "./elements.js";

export const VECTORS = {
  task: "feature-extraction",
  inputs: [
    { id: "prompt", label: "Text", value: "The kettle leaks.", rows: 2 },
    { id: "other", label: "Another text", value: "Water comes out of it.", rows: 2 },
  ],
  options: [],

  async answer(bundle, adapter, texts, options, history, output) {
    const [one, other] = await bundle.embed(texts.map((text) => ({ text, adapter })));
    const cosine = dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
    output.replaceChildren(el("p", { class: "figure" }, cosine.toFixed(3)), el("p", { class: "note" }, "cosine of the two: 1 is the same direction"));
    return { text: String(cosine), said: [`${one.length} numbers each`] };
  },
};

function dot(one, other) {
  return one.reduce((sum, value, place) => sum + value * other[place], 0);
}
