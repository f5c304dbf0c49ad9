import { type Json } from "./json";
/** Components of one row, and the numbers there. */
interface Components {
    ids: number[];
    numbers: number[];
}
/** What was recorded when the pack was made. */
export interface Canary {
    rows: number[][];
    base: Components[];
    adapter: Components[];
    tolerance: number;
}
/** Reads a canary of token ids; null where the pack has none. */
export declare function readCanary(value: Json | undefined): Canary | null;
/** Compares what the rows gave, without the adapter (null: it cannot be run without) and with it, with what was recorded. */
export declare function requireCanary(canary: Canary, base: Float32Array[] | null, adapter: Float32Array[]): void;
export {};
