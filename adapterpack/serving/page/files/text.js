// Text: a prompt, and answers that grow word by word.

import { el } from "./elements.js";
import { counted, rough, seconds } from "./numbers.js";
import { Problem, events, request } from "./server.js";

const CHAT = "v1/chat/completions";
const COMPLETION = "v1/completions";
let templated = true;

export const TEXT = {
  route: `/${CHAT}`,
  mixes: true,
  inputs: [{ id: "prompt", label: "Prompt", value: "Tell me in one sentence what you can do.", rows: 3 }],
  options: [
    { id: "temperature", label: "Temperature", type: "number", min: 0, max: 2, step: "any", placeholder: "the model's" },
    { id: "max_tokens", label: "Max tokens", type: "number", min: 1, step: 1, value: 128 },
    { id: "seed", label: "Seed", type: "number", min: 0, step: 1, placeholder: "any" },
    { id: "plain", label: "Take the prompt as it is, without the chat template", type: "checkbox" },
  ],

  async answer(model, [prompt], { plain, ...options }, pane, signal) {
    const asked = performance.now();
    const body = { model, stream: true, stream_options: { include_usage: true }, ...options };
    const response = await begun(body, prompt, plain || !templated, signal);
    const digest = response.headers.get("X-Adapterpack-Digest");
    const written = document.createTextNode("");
    const times = { first: 0, last: 0 };
    let reason = "";
    let usage = null;
    for await (const event of events(response)) {
      if (event.system_fingerprint !== digest) throw new Problem(`A part of this answer says that ${event.system_fingerprint} wrote it.`);
      const choice = event.choices[0];
      const more = choice?.delta?.content || choice?.text;
      if (more) {
        times.last = performance.now();
        if (!times.first) {
          times.first = times.last;
          pane.show(written);
        }
        append(pane.output, written, more);
      }
      reason = choice?.finish_reason ?? reason;
      usage = event.usage ?? usage;
    }
    if (!times.first) pane.show(el("span", { class: "note" }, "The answer is empty: the first token ended it."));
    return { digest, facts: facts(asked, times, usage, reason) };
  },
};

/** The response once it has begun. A base without a chat template takes the prompt as it is. */
async function begun(body, prompt, plain, signal) {
  if (plain) return request(COMPLETION, { body: { ...body, prompt }, signal });
  try {
    return await request(CHAT, { body: { ...body, messages: [{ role: "user", content: prompt }] }, signal });
  } catch (problem) {
    if (problem.code !== "no_chat_template") throw problem;
    templated = false;
    return begun(body, prompt, true, signal);
  }
}

/** Adds text, and keeps its end in sight unless somebody has scrolled up. */
function append(output, node, more) {
  const below = output.scrollHeight - output.scrollTop - output.clientHeight;
  node.appendData(more);
  if (below < 30) output.scrollTop = output.scrollHeight;
}

function facts(asked, { first, last }, usage, reason) {
  const said = [];
  if (first) said.push(`first token after ${seconds((first - asked) / 1000)}`);
  if (usage) said.push(counted(usage.completion_tokens, "token"));
  if (usage?.completion_tokens > 1 && last > first) said.push(`${rough((1000 * (usage.completion_tokens - 1)) / (last - first))} tokens/s`);
  if (reason === "length") said.push("cut off at max tokens");
  return said;
}
