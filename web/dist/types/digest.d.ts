/** The SHA-256 of bytes, as 64 hexadecimal digits. */
export declare function sha256(bytes: Uint8Array): Promise<string>;
/**
 * Compares bytes with a digest, with or without `sha256:` in front.
 *
 * @throws DigestMismatch - they are other bytes.
 */
export declare function requireDigest(bytes: Uint8Array, expected: string, what: string, remedy: string): Promise<void>;
