// Conversations: answers that grow piece by piece. The next message goes on after the first of the answers.

import { counted, rough, seconds } from "./numbers.js";

export const CHAT = {
  task: "text-generation",
  remembers: true,
  inputs: [{ id: "prompt", label: "Message", value: "Tell me in one sentence what you can do.", rows: 3 }],
  options: [
    { id: "temperature", name: "temperature", label: "Temperature", type: "number", min: 0, max: 2, step: "any", value: 0 },
    { id: "most", name: "maxNewTokens", label: "Max tokens", type: "number", min: 1, step: 1, value: 128 },
  ],

  async answer(bundle, adapter, [text], options, history, output, signal) {
    const asked = performance.now();
    const written = document.createTextNode("");
    output.append(written);
    let [first, pieces] = [0, 0];
    for await (const piece of bundle.generate([...history, { role: "user", content: text }], { ...options, adapter, signal })) {
      first ||= performance.now();
      pieces += 1;
      const below = output.scrollHeight - output.scrollTop - output.clientHeight;
      written.appendData(piece);
      if (below < 30) output.scrollTop = output.scrollHeight;
    }
    if (!pieces) return { text: "", said: ["empty: the first token ended it"] };
    const speed = pieces > 1 ? [`${rough((1000 * (pieces - 1)) / (performance.now() - first))} pieces/s`] : [];
    return { text: written.data, said: [`first after ${seconds((first - asked) / 1000)}`, counted(pieces, "piece"), ...speed] };
  },
};
