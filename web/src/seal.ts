// The digest that a pack's manifest holds of itself, from version 1.4 on: no byte of it was changed by accident.

import { sha256 } from "./digest";
import { DigestMismatch } from "./errors";

const BEFORE = new TextEncoder().encode('\n  "integrity": "');
const DIGITS = 64;
const FIRST_MINOR = 4;

/**
 * Compares the manifest's bytes, without the digest that stands in them, with that digest.
 *
 * @throws DigestMismatch - a byte was changed.
 */
export async function requireSeal(bytes: Uint8Array, version: string, where: string): Promise<void> {
  if (Number(version.split(".")[1]) < FIRST_MINOR) return;
  const end = indexOf(bytes, BEFORE) + BEFORE.length;
  const said = new TextDecoder().decode(bytes.subarray(end, end + DIGITS));
  const rest = new Uint8Array(Math.max(0, bytes.length - DIGITS));
  rest.set(bytes.subarray(0, Math.min(end, rest.length)));
  rest.set(bytes.subarray(end + DIGITS), Math.min(end, rest.length));
  if (said !== (await sha256(rest))) throw new DigestMismatch(`${where} is not the one that was written: a byte of it was changed`, "Fetch the pack again from where it comes, and do not use this one");
}

function indexOf(bytes: Uint8Array, wanted: Uint8Array): number {
  for (let at = bytes.indexOf(wanted[0] as number); at >= 0; at = bytes.indexOf(wanted[0] as number, at + 1)) {
    if (wanted.every((byte, place) => bytes[at + place] === byte)) return at;
  }
  return -wanted.length;
}
