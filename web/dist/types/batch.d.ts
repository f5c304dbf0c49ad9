import type { Values } from "./graph";
import type { Encoded } from "./texts";
/** Whole numbers as a value of the graph. */
export declare function int64(numbers: number[], dims: number[]): Values;
/** Rows `[batch, longest]` with the padding behind their tokens, as far as the graph takes them. */
export declare function batch(rows: Encoded[], padId: number, inputs: readonly string[]): Record<string, Values>;
