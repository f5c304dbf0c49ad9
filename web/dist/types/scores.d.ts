/** The likeliest label of a row and the probability of each; of a head that gives a number, that number. */
export interface Scored {
    label: string | null;
    scores: Record<string, number>;
}
/** What a head says of one row of logits: those beyond its own labels are other adapters'. */
export declare function scored(logits: Float32Array, labels: string[] | null, problem: string): Scored;
/** The softmax of a vector. */
export declare function softmax(logits: number[]): number[];
/** How the hidden states `[length, width]` of a row become one vector. Padding follows a row's tokens. */
export declare const POOLING: Record<string, (hidden: Float32Array, length: number, width: number) => Float32Array>;
