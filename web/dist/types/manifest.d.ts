import { type Json, type JsonObject } from "./json";
/** The manifest's file. */
export declare const MANIFEST = "adapterpack.bundle.json";
/** The file of the facts for browsers. */
export declare const FACTS = "web.json";
/** One file: its path, size and SHA-256. */
export interface FileEntry {
    path: string;
    size: number;
    sha256: string;
}
/** One input or output of the graph; an extent that is not fixed has a name. */
export interface Port {
    name: string;
    dtype: string;
    shape: (number | string | null)[];
}
/** The fingerprints of a base model; null where one is not known. */
export interface Base {
    name: string | null;
    structure: string | null;
    content: string | null;
    files: string | null;
    probe: string | null;
}
/** One module of the graph that adapters change, and the sites whose factors lie side by side in its slot. */
export interface Site {
    dtype: string;
    members: string[];
    outFeatures: number;
}
/**
 * An adapter of the bundle: its name, its pack's digest, its slot in the bank, and the labels of its head. Of one that was loaded `note`
 * says why its canary was not replayed, if it was not.
 */
export interface Adapter {
    name: string;
    pack: string;
    slot: number | null;
    labels: string[] | null;
    note?: string | null;
}
/** A slot of the bank: where the numbers of all adapters lie, `[slots, ...]`. */
export interface Slot {
    file: string;
    offset: number;
    shape: number[];
}
/** The parts of a manifest that a browser reads. */
export interface Manifest {
    task: string;
    mode: string;
    quantized: boolean;
    pooling: string;
    slots: number;
    maxRank: number;
    base: Base;
    baseLabels: string[] | null;
    baseProblem: string;
    baseHeadTrained: boolean;
    files: FileEntry[];
    inputs: Port[];
    outputs: Port[];
    adapters: Adapter[];
    sites: Map<string, Site>;
}
/** What export found out for browsers. */
export interface Facts {
    wasmGraph: string | null;
    slots: Map<string, Slot>;
    context: number | null;
    ends: number[];
    padId: number;
    special: Record<string, string>;
    template: string | null;
    problems: Record<string, string>;
}
/** Reads a manifest. */
export declare function readManifest(value: JsonObject): Manifest;
/** Reads the facts for browsers. */
export declare function readFacts(value: JsonObject, manifest: Manifest): Facts;
/** Reads an entry of a closed list of files. */
export declare function readFile(value: Json): FileEntry;
/** Reads the fingerprints of a base. */
export declare function readBase(value: Json | undefined): Base;
