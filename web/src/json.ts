// Reads JSON of strangers: bounded before it is parsed, and every field of the type that is expected.

import { FormatError } from "./errors";

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
export type JsonObject = { [key: string]: Json };

const UTF8 = new TextDecoder("utf-8", { fatal: true });

/** The one object that UTF-8 bytes hold; at most `most` bytes. */
export function parseObject(bytes: Uint8Array, where: string, most: number): JsonObject {
  if (bytes.byteLength > most) throw new FormatError(`${where} is larger than ${most} bytes`);
  let value: Json;
  try {
    value = JSON.parse(UTF8.decode(bytes)) as Json;
  } catch (error) {
    throw new FormatError(`${where} is no JSON in UTF-8: ${(error as Error).message}`);
  }
  return asObject(value, where);
}

/** A value that must be an object. */
export function asObject(value: Json | undefined, where: string): JsonObject {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new FormatError(`${where} is no object`);
  return value;
}

/** A value that must be a list of at most `most` items. */
export function asList(value: Json | undefined, where: string, most = 1 << 16): Json[] {
  if (!Array.isArray(value) || value.length > most) throw new FormatError(`${where} is no list of at most ${most} items`);
  return value;
}

/** A value that must be a text of at most `most` characters. */
export function asText(value: Json | undefined, where: string, most = 1024): string {
  if (typeof value !== "string" || value.length > most) throw new FormatError(`${where} is no text of at most ${most} characters`);
  return value;
}

/** A value that must be a whole number from 0 to `most`. */
export function asCount(value: Json | undefined, where: string, most = Number.MAX_SAFE_INTEGER): number {
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value > most) {
    throw new FormatError(`${where} is no whole number from 0 to ${most}`);
  }
  return value;
}

/** A list of whole numbers. */
export function asCounts(value: Json | undefined, where: string, most = 8): number[] {
  return asList(value, where, most).map((item) => asCount(item, where));
}

/** A list of texts, or null. */
export function asTexts(value: Json | undefined, where: string, most = 10_000): string[] | null {
  return value == null ? null : asList(value, where, most).map((item) => asText(item, where));
}
