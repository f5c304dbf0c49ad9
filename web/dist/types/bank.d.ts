import type { Facts, Manifest } from "./manifest";
import type { Pack } from "./pack";
/** The bytes of one slot, all fields together: no pack that fits has more numbers. */
export declare function slotBytes(facts: Facts): number;
/** Copies of the bank's files with `pack` in slot `number`; `files` are its files now. */
export declare function filled(pack: Pack, number: number, manifest: Manifest, facts: Facts, files: Map<string, Uint8Array>): Map<string, Uint8Array>;
