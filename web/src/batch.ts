// Rows as a batch: shorter ones are filled up, and a mask says where their tokens are.

import type { Values } from "./graph";
import type { Encoded } from "./texts";

/** Whole numbers as a value of the graph. */
export function int64(numbers: number[], dims: number[]): Values {
  return { type: "int64", data: BigInt64Array.from(numbers, BigInt), dims };
}

/** Rows `[batch, longest]` with the padding behind their tokens, as far as the graph takes them. */
export function batch(rows: Encoded[], padId: number, inputs: readonly string[]): Record<string, Values> {
  const width = Math.max(...rows.map((row) => row.ids.length));
  const dims = [rows.length, width];
  const wide = (numbers: number[], fill: number): number[] => [...numbers, ...Array<number>(width - numbers.length).fill(fill)];
  const made: Record<string, number[]> = {
    input_ids: rows.flatMap((row) => wide(row.ids, padId)),
    attention_mask: rows.flatMap((row) => wide(row.ids.map(() => 1), 0)),
    token_type_ids: rows.flatMap((row) => wide(row.types, 0)),
  };
  return Object.fromEntries(Object.entries(made).filter(([name]) => inputs.includes(name)).map(([name, numbers]) => [name, int64(numbers, dims)]));
}
