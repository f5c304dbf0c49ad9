// SHA-256 by the browser's own WebCrypto.

import { DigestMismatch, Unsupported } from "./errors";

/** The SHA-256 of bytes, as 64 hexadecimal digits. */
export async function sha256(bytes: Uint8Array): Promise<string> {
  if (!globalThis.crypto?.subtle) {
    throw new Unsupported("this page cannot compare digests: browsers have WebCrypto on https and on localhost only", "Serve the site by https");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes as BufferSource));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Compares bytes with a digest, with or without `sha256:` in front.
 *
 * @throws DigestMismatch - they are other bytes.
 */
export async function requireDigest(bytes: Uint8Array, expected: string, what: string, remedy: string): Promise<void> {
  const found = await sha256(bytes);
  const wanted = expected.replace(/^sha256:/, "");
  if (found !== wanted) throw new DigestMismatch(`${what} has the SHA-256 ${found.slice(0, 12)}…, expected ${wanted.slice(0, 12)}…`, remedy);
}
