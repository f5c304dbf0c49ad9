import type { JsonObject } from "./json";
import type { Facts } from "./manifest";
/** One message of a conversation. */
export interface Message {
    role: string;
    content: string;
}
/** A row of token ids, and which of two texts each token is from. */
export interface Encoded {
    ids: number[];
    types: number[];
}
/** The tokenizer of a bundle. */
export declare class Texts {
    private readonly facts;
    private readonly tokenizer;
    private template;
    constructor(tokenizer: JsonObject, config: JsonObject, facts: Facts);
    /** A text, or a pair of texts, as a row that fits the model. */
    encode(text: string, pair?: string, special?: boolean): Encoded;
    /** The ids of a prompt: a text becomes one user message, and the chat template renders messages, where the bundle has one. */
    prompt(prompt: string | Message[]): number[];
    /** The text of ids, without special tokens. */
    decode(ids: number[]): string;
}
