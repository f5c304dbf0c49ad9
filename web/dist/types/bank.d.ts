import type { Facts, Manifest } from "./manifest";
import type { Pack } from "./pack";
/** Copies of the bank's files with `pack` in slot `number`; `files` are its files now. */
export declare function filled(pack: Pack, number: number, manifest: Manifest, facts: Facts, files: Map<string, Uint8Array>): Map<string, Uint8Array>;
