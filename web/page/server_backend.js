// Answers from a server: its OpenAPI document says what it does, and its routes do it.

import { agrees } from "./mix.js";
import { Problem, events, get, request, storedKey } from "./server.js";

const ROUTES = {
  "text-generation": "/v1/chat/completions",
  "text-classification": "/v1/classify",
  "feature-extraction": "/v1/embeddings",
  "token-classification": "/v2/models/{model}/infer",
};

export class ServerBackend {
  sampling = ["temperature", "top_p", "max_tokens", "seed", "plain"];
  mixes = true;
  templated = true;

  /** Reads what the server is. */
  async open() {
    this.first = await get("v1/status");
    const { paths } = await get("openapi.json");
    this.task = Object.keys(ROUTES).find((task) => ROUTES[task] in paths);
    this.key = storedKey() && this.first.key;
    this.base = this.first.base;
    const here = "This page loads nothing from elsewhere; what you type goes to this server alone.";
    this.footer = [`adapterpack ${this.first.version}. ${here}`];
  }

  /** Its figures: those that it was opened by, then new ones. */
  async status() {
    const status = this.first ?? (await get("v1/status"));
    this.first = null;
    return status;
  }

  /** The models that the key may name, the base first; what is known of each; those that cannot answer. */
  async list() {
    const [named, known] = await Promise.all([get("v1/models"), get("v1/status/models")]);
    const headless = known.models.filter((model) => model.headless).map((model) => model.name);
    this.listed = named.data;
    const [first, ...others] = named.data;
    this.auto = others.find((model) => !model.parent)?.id; // what is no adapter stands for one
    const choices = [first, ...others.map((model) => ({ ...model, chooses: model.id === this.auto }))];
    return { ...known, choices, headless };
  }

  lead(adapters) {
    const many = adapters ? `${adapters} on one base` : "The base alone, so far";
    return (
      `${many}. Every answer says which pack gave it, and this page compares that with the one that is listed.`
    );
  }

  /** Which model the server chose by the text, and how sure it is; undefined where it was named. */
  chosen({ model }, response, told) {
    if (model !== this.auto) return undefined;
    return { model: response.headers.get("X-Adapterpack-Adapter") || this.base, sure: told?.sure };
  }

  /** Whether a digest is that of what was asked; the list is read again where a pack was exchanged meanwhile. */
  async agrees(digest, asked) {
    return agrees(digest, asked, this.listed) || agrees(digest, asked, (await get("v1/models")).data);
  }

  /** The pieces of an answer to messages, or to a prompt as it is. A base without a chat template takes their text. */
  async *generate(asked, prompt, options, signal) {
    const body = { ...asked, stream: true, stream_options: { include_usage: true }, ...options };
    const response = await this.begin(body, prompt, signal);
    const digest = response.headers.get("X-Adapterpack-Digest");
    for await (const event of events(response)) {
      const writer = event.system_fingerprint;
      if (writer !== digest) throw new Problem(`A part of this answer says that ${writer} wrote it.`);
      const text = event.choices[0]?.delta?.content || event.choices[0]?.text;
      const chosen = event.adapterpack && this.chosen(asked, response, event.adapterpack);
      yield { digest, text, usage: event.usage, reason: event.choices[0]?.finish_reason, chosen };
    }
  }

  async begin(body, prompt, signal) {
    if (typeof prompt === "string") return request("v1/completions", { body: { ...body, prompt }, signal });
    const plain = prompt.map((message) => message.content).join("\n");
    if (!this.templated) return this.begin(body, plain, signal);
    try {
      return await request("v1/chat/completions", { body: { ...body, messages: prompt }, signal });
    } catch (problem) {
      if (problem.code !== "no_chat_template") throw problem;
      this.templated = false;
      return this.begin(body, plain, signal);
    }
  }

  async classify(asked, [text, second], signal) {
    const input = second ? { text, text_pair: second } : text;
    const { value, ...facts } = await this.answered("v1/classify", asked, { ...asked, input }, signal);
    return { scores: value.data[0].scores, ...facts };
  }

  async embed(asked, input, signal) {
    const body = { ...asked, input, encoding_format: "float" };
    const { value, ...facts } = await this.answered("v1/embeddings", asked, body, signal);
    return { vectors: value.data.map((one) => one.embedding), ...facts };
  }

  /** The tokens of a text as columns: start, end, label, score. */
  async tag(asked, text, signal) {
    const body = { inputs: [{ name: "text", datatype: "BYTES", shape: [1], data: [text] }] };
    const path = `v2/models/${encodeURIComponent(asked.model)}/infer`;
    const { value, ...facts } = await this.answered(path, asked, body, signal);
    return { columns: Object.fromEntries(value.outputs.map(({ name, data }) => [name, data])), ...facts };
  }

  async answered(path, asked, body, signal) {
    const response = await request(path, { body, signal });
    const value = await response.json();
    const digest = response.headers.get("X-Adapterpack-Digest");
    return { value, digest, chosen: this.chosen(asked, response, value.adapterpack ?? value.parameters) };
  }
}
