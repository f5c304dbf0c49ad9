// Logits and hidden states of one row as what a caller wants of them: labels, scores, vectors.

import { Unsupported } from "./errors";

/** The likeliest label of a row and the probability of each; of a head that gives a number, that number. */
export interface Scored {
  label: string | null;
  scores: Record<string, number>;
}

type Score = (logits: number[], labels: string[]) => number[];

const SCORES: Record<string, Score> = {
  single_label_classification: (logits) => (logits.length > 1 ? softmax(logits) : [logistic(logits[0] as number)]),
  multi_label_classification: (logits) => logits.map(logistic),
  regression: (logits) => logits,
};

/** What a head says of one row of logits: those beyond its own labels are other adapters'. */
export function scored(logits: Float32Array, labels: string[] | null, problem: string): Scored {
  if (labels === null) return { label: null, scores: {} };
  const score = SCORES[problem];
  if (!score) throw new Unsupported(`this module does not read the logits of ${problem}`);
  const values = score(Array.from(logits.subarray(0, labels.length)), labels);
  const best = values.indexOf(Math.max(...values));
  return { label: labels[best] ?? null, scores: Object.fromEntries(labels.map((label, at) => [label, values[at] as number])) };
}

/** The softmax of a vector. */
export function softmax(logits: number[]): number[] {
  const most = logits.reduce((one, other) => Math.max(one, other), -Infinity);
  const weights = logits.map((logit) => Math.exp(logit - most));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

function logistic(logit: number): number {
  return 1 / (1 + Math.exp(-logit));
}

/** How the hidden states `[length, width]` of a row become one vector. Padding follows a row's tokens. */
export const POOLING: Record<string, (hidden: Float32Array, length: number, width: number) => Float32Array> = {
  cls: (hidden, _, width) => hidden.slice(0, width),
  last: (hidden, length, width) => hidden.slice((length - 1) * width, length * width),
  mean: (hidden, length, width) => {
    const sums = new Float64Array(width);
    for (let at = 0; at < length * width; at++) sums[at % width]! += hidden[at]!;
    return Float32Array.from(sums, (sum) => sum / length);
  },
};
