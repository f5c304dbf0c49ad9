/**
 * Compares the manifest's bytes, without the digest that stands in them, with that digest.
 *
 * @throws DigestMismatch - a byte was changed.
 */
export declare function requireSeal(bytes: Uint8Array, version: string, where: string): Promise<void>;
