// Text, token by token: one pass over the prompt, then one for each new token, on the cache that the pass before gave.

import { int64 } from "./batch";
import { ConfigError } from "./errors";
import type { Graph, Tensor, Values } from "./graph";
import type { Port } from "./manifest";
import { softmax } from "./scores";
import { TextStream } from "./text_stream";

/** How an answer is made. Without a temperature each token is the likeliest one. */
export interface Sampling {
  /** The most tokens of the answer; 256 by default. */
  maxNewTokens?: number;
  /** How freely tokens are drawn; 0, the default, takes the likeliest. */
  temperature?: number;
  /** Texts that end the answer and are cut off. */
  stop?: string | string[];
  /** Ends the answer where it is. */
  signal?: AbortSignal;
}

/** What a decoder needs besides its prompt. */
export interface Decoding {
  graph: Graph;
  ports: Port[];
  ends: number[];
  context: number | null;
  decode: (ids: number[]) => string;
  slot: () => Values | null;
}

const PAST = "past_key_values.";
const PRESENT = "present.";

/** The answer's text, piece by piece. */
export async function* generated(prompt: number[], how: Decoding, sampling: Sampling): AsyncGenerator<string, void, void> {
  const { maxNewTokens = 256, temperature = 0, stop = [], signal } = sampling;
  if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) throw new ConfigError("maxNewTokens is no whole number from 1");
  if (!(temperature >= 0)) throw new ConfigError("temperature is no number from 0");
  const room = how.context === null ? maxNewTokens : Math.min(maxNewTokens, how.context - prompt.length + 1);
  const stream = new TextStream(how.decode, typeof stop === "string" ? [stop] : stop);
  let cache: Record<string, Values | Tensor> = empty(how.ports);
  let [tokens, past] = [prompt, 0];
  try {
    for (let count = 0; count < room; count++) {
      signal?.throwIfAborted();
      const outputs = await pass(tokens, past, cache, how);
      past += tokens.length;
      dispose(cache);
      cache = grown(outputs);
      const token = chosen(await lastLogits(outputs.logits as Tensor), temperature);
      if (how.ends.includes(token)) break;
      const piece = stream.push(token);
      if (piece) yield piece;
      if (stream.stopped) return;
      tokens = [token];
    }
    const rest = stream.finish();
    if (rest) yield rest;
  } finally {
    dispose(cache);
  }
}

/** The logits behind the last token of a prompt. */
export async function prefilled(prompt: number[], how: Decoding): Promise<Float32Array> {
  const outputs = await pass(prompt, 0, empty(how.ports), how);
  dispose(outputs);
  return lastLogits(outputs.logits as Tensor);
}

function pass(tokens: number[], past: number, cache: Record<string, Values | Tensor>, how: Decoding): Promise<Record<string, Tensor>> {
  const length = tokens.length;
  const slot = how.slot();
  const feeds: Record<string, Values | Tensor | null> = {
    input_ids: int64(tokens, [1, length]),
    attention_mask: int64(Array<number>(past + length).fill(1), [1, past + length]),
    position_ids: int64(tokens.map((_, at) => past + at), [1, length]),
    adapter_ids: slot,
    ...cache,
  };
  const wanted = Object.entries(feeds).filter(([name, value]) => value !== null && how.graph.inputs.includes(name));
  return how.graph.run(Object.fromEntries(wanted) as Record<string, Values | Tensor>);
}

/** The cache before the first pass: no position. */
function empty(ports: Port[]): Record<string, Values> {
  const cache = ports.filter((port) => port.name.startsWith(PAST));
  return Object.fromEntries(cache.map((port) => [port.name, { type: "float32", data: new Float32Array(0), dims: [1, Number(port.shape[1]), 0, Number(port.shape[3])] }]));
}

function grown(outputs: Record<string, Tensor>): Record<string, Tensor> {
  return Object.fromEntries(Object.entries(outputs).filter(([name]) => name.startsWith(PRESENT)).map(([name, value]) => [PAST + name.slice(PRESENT.length), value]));
}

function dispose(cache: Record<string, Values | Tensor>): void {
  for (const value of Object.values(cache)) if ("location" in value && value.location === "gpu-buffer") value.dispose();
}

/** The logits of the last position. */
async function lastLogits(logits: Tensor): Promise<Float32Array> {
  const data = (await logits.getData()) as Float32Array;
  return data.subarray(data.length - (logits.dims[2] as number));
}

function chosen(logits: Float32Array, temperature: number): number {
  let best = 0;
  for (let at = 1; at < logits.length; at++) if ((logits[at] as number) > (logits[best] as number)) best = at;
  if (!temperature) return best;
  const chances = softmax(Array.from(logits, (logit) => logit / temperature));
  let left = (crypto.getRandomValues(new Uint32Array(1))[0] as number) / 2 ** 32;
  for (const [token, chance] of chances.entries()) {
    left -= chance;
    if (left < 0) return token;
  }
  return best;
}
