// Texts to token ids and back, by the bundle's own tokenizer and chat template.

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";

import { ConfigError, FormatError } from "./errors";
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
export class Texts {
  private readonly tokenizer: Tokenizer;
  private template: Template | null = null;

  constructor(tokenizer: JsonObject, config: JsonObject, private readonly facts: Facts) {
    try {
      this.tokenizer = new Tokenizer(tokenizer, config);
    } catch (error) {
      throw new FormatError(`the bundle's tokenizer cannot be used: ${(error as Error).message}`);
    }
  }

  /** A text, or a pair of texts, as a row that fits the model. */
  encode(text: string, pair?: string, special = true): Encoded {
    if (typeof text !== "string") throw new ConfigError("a row has no text");
    const encoded = this.tokenizer.encode(text, { text_pair: pair ?? null, add_special_tokens: special, return_token_type_ids: true });
    const ids = encoded.ids;
    if (!ids.length) throw new ConfigError(`the text ${JSON.stringify(text).slice(0, 80)} has no tokens`);
    if (this.facts.context !== null && ids.length > this.facts.context) {
      throw new ConfigError(`a text has ${ids.length} tokens, and the model takes ${this.facts.context}`, "Shorten it");
    }
    return { ids, types: encoded.token_type_ids ?? ids.map(() => 0) };
  }

  /** The ids of a prompt: a text becomes one user message, and the chat template renders messages, where the bundle has one. */
  prompt(prompt: string | Message[]): number[] {
    const messages = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
    if (this.facts.template === null) return this.encode(messages.map((message) => message.content).join("\n")).ids;
    let text: string;
    try {
      this.template ??= new Template(this.facts.template);
      text = this.template.render({ messages, add_generation_prompt: true, ...this.facts.special });
    } catch (error) {
      throw new FormatError(`the bundle's chat template fails on these messages: ${(error as Error).message}`);
    }
    return this.encode(text, undefined, false).ids;
  }

  /** The text of ids, without special tokens. */
  decode(ids: number[]): string {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}
