import type { Graph, Values } from "./graph";
import type { Port } from "./manifest";
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
/** The answer's text, piece by piece. */
export declare function generated(prompt: number[], how: Decoding, sampling: Sampling): AsyncGenerator<string, void, void>;
/** The logits behind the last token of a prompt. */
export declare function prefilled(prompt: number[], how: Decoding): Promise<Float32Array>;
