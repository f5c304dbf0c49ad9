// The tokens of a text that have a label, each with its own below it.

import { el } from "./elements.js";
import { counted, percent, seconds } from "./numbers.js";

const NONE = "O";

export const TAGS = {
  task: "token-classification",
  inputs: [{ id: "text", label: "Text", value: "Ada Lovelace was born in London.", rows: 2 }],
  options: [],

  async answer(backend, asked, [text], options, pane, signal) {
    const began = performance.now();
    const { columns, digest, chosen } = await backend.tag(asked, text, signal);
    pane.show(...tagged(text, columns));
    const labelled = columns.label.filter((label) => label !== NONE).length;
    const facts = [`${counted(labelled, "token")} with a label`, `answered after ${seconds((performance.now() - began) / 1000)}`];
    return { digest, chosen, facts };
  },
};

/** The text in pieces; places are counted in characters, not in the units that JavaScript counts in. */
function tagged(text, { start, end, label, score }) {
  const characters = [...text];
  const pieces = [];
  let done = 0;
  label.forEach((name, token) => {
    if (name === NONE || start[token] < done) return;
    const word = characters.slice(start[token], end[token]).join("");
    pieces.push(characters.slice(done, start[token]).join(""), el("span", { class: "tag" }, word, el("small", {}, `${name} ${percent(score[token])}`)));
    done = end[token];
  });
  return [...pieces, characters.slice(done).join("")];
}
