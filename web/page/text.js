// Text: a prompt, and answers that grow piece by piece.

import { el } from "./elements.js";
import { counted, rough, seconds } from "./numbers.js";

export const TEXT = {
  task: "text-generation",
  mixes: true,
  inputs: [
    { id: "prompt", label: "Message", value: "Tell me in one sentence what you can do.", rows: 3 },
    { id: "system", label: "System message, before all others", value: "", rows: 3, optional: true },
  ],
  options: [
    { id: "temperature", label: "Temperature", type: "number", min: 0, max: 2, step: "any", placeholder: "the model's" },
    { id: "top_p", label: "Top p", type: "number", min: 0, max: 1, step: "any", placeholder: "the model's" },
    { id: "max_tokens", label: "Max tokens", type: "number", min: 1, step: 1, value: 128 },
    { id: "seed", label: "Seed", type: "number", min: 0, step: 1, placeholder: "any" },
    { id: "plain", label: "Take the message as it is, without the chat template", type: "checkbox" },
  ],

  /** Asks after the messages that the pane keeps of an earlier answer, and keeps these, too. */
  async answer(backend, asked, [prompt, system], { plain, ...options }, pane, signal) {
    const times = { asked: performance.now(), first: 0, last: 0 };
    const messages = [...pane.messages, { role: "user", content: prompt }];
    const before = system.trim() ? [{ role: "system", content: system }] : [];
    const written = document.createTextNode("");
    let [digest, reason, usage, pieces, chosen] = [null, "", null, 0];
    try {
      for await (const piece of backend.generate(asked, plain ? prompt : [...before, ...messages], options, signal)) {
        digest = piece.digest;
        chosen = piece.chosen ?? chosen;
        reason = piece.reason ?? reason;
        usage = piece.usage ?? usage;
        if (!piece.text) continue;
        pieces += 1;
        times.last = performance.now();
        if (!times.first) {
          times.first = times.last;
          pane.show(written);
        }
        append(pane.output, written, piece.text);
      }
    } finally {
      // one that was stopped is kept as far as it came
      if (pieces || !signal.aborted) pane.messages = [...messages, { role: "assistant", content: written.data }];
    }
    if (!pieces) pane.show(el("span", { class: "note" }, "The answer is empty: the first token ended it."));
    return { digest, chosen, facts: facts(times, usage?.completion_tokens, pieces, reason) };
  },
};

/** Adds text, and keeps its end in sight unless somebody has scrolled up. */
function append(output, node, more) {
  const below = output.scrollHeight - output.scrollTop - output.clientHeight;
  node.appendData(more);
  if (below < 30) output.scrollTop = output.scrollHeight;
}

/** Where the backend does not count tokens the pieces are counted. */
function facts({ asked, first, last }, tokens, pieces, reason) {
  const [count, unit] = tokens == null ? [pieces, "piece"] : [tokens, "token"];
  const said = [];
  if (first) said.push(`first ${unit} after ${seconds((first - asked) / 1000)}`);
  said.push(counted(count, unit));
  if (count > 1 && last > first) said.push(`${rough((1000 * (count - 1)) / (last - first))} ${unit}s/s`);
  if (reason === "length") said.push("cut off at max tokens");
  return said;
}
