import { type Canary } from "./canary";
import { type Base } from "./manifest";
import { type Tensor } from "./safetensors";
/** One module that a pack changes, with its tensors by parameter: `lora_A`, `lora_B` of an adapter, `weight` and `bias` of a head. */
export interface Change {
    path: string;
    full: boolean;
    scale: number;
    tensors: Map<string, Tensor>;
}
/** A pack whose bytes are those that its manifest lists. `id` is the digest of the manifest. */
export interface Pack {
    id: string;
    name: string;
    task: string;
    base: Base;
    labels: string[] | null;
    canary: Canary | null;
    changes: Change[];
}
/** Where a pack is: the address of its folder, or its two files, as a file picker or a drop gives them. */
export type PackSource = string | URL | Iterable<File>;
/** Reads and checks a pack of at most `most` bytes of tensors; `digest` pins its id. */
export declare function readPack(source: PackSource, digest: string | undefined, most: number): Promise<Pack>;
/** Checks that a pack belongs to a base, as far as the fingerprints of both say it: by all bytes, by files, or by samples of each tensor. */
export declare function requireBase(pack: Pack, base: Base): void;
