// What a bundle says of itself: its manifest, and the facts that export wrote for browsers.

import { FormatError, Unsupported } from "./errors";
import { asCount, asCounts, asList, asObject, asText, asTexts, type Json, type JsonObject } from "./json";

/** The manifest's file. */
export const MANIFEST = "adapterpack.bundle.json";
/** The file of the facts for browsers. */
export const FACTS = "web.json";
/** The most bytes of a bundle: what 32-bit WebAssembly can address. */
const MAX_BYTES = 2 ** 32;

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
export function readManifest(value: JsonObject): Manifest {
  if (value.format !== "adapterpack.bundle" || !/^1\.\d{1,4}$/.test(asText(value.format_version, "format_version"))) {
    throw new FormatError(`${MANIFEST} is no bundle's manifest of version 1`);
  }
  const files = asList(value.files, "files").map(readFile);
  if (files.reduce((total, file) => total + file.size, 0) > MAX_BYTES) {
    throw new Unsupported("the bundle is larger than the 4 GB that WebAssembly can address", "Export it with --quantize int4, or a smaller model");
  }
  const io = asObject(value.io, "io");
  const adapters = asList(value.adapters, "adapters", 4096).map(readAdapter);
  const slots = asCount(value.slots, "slots", 4096);
  if (adapters.some((adapter) => (adapter.slot ?? 0) >= Math.max(slots, 1))) throw new FormatError("an adapter has a slot that the bank has not");
  return {
    task: asText(value.task, "task"),
    mode: asText(value.mode, "mode"),
    quantized: value.quantization != null,
    pooling: asText(value.pooling, "pooling"),
    slots,
    maxRank: asCount(value.max_rank, "max_rank", 4096),
    base: readBase(value.base),
    baseLabels: asTexts(value.base_labels, "base_labels"),
    baseProblem: asText(value.base_problem, "base_problem"),
    baseHeadTrained: value.base_head_trained !== false,
    files,
    inputs: asList(io.inputs, "io/inputs").map(readPort),
    outputs: asList(io.outputs, "io/outputs").map(readPort),
    adapters,
    sites: readSites(value.sites),
  };
}

/** Reads the facts for browsers. */
export function readFacts(value: JsonObject, manifest: Manifest): Facts {
  const sizes = new Map(manifest.files.map((file) => [file.path, file.size]));
  const slots = new Map<string, Slot>();
  for (const [name, entry] of Object.entries(asObject(value.slots, "slots"))) {
    const slot = asObject(entry, `slots/${name}`);
    const [file, offset, shape] = [asText(slot.file, "file"), asCount(slot.offset, "offset"), asCounts(slot.shape, "shape")];
    const bytes = 4 * shape.reduce((product, extent) => product * extent, 1);
    if (shape[0] !== manifest.slots || offset % 4 || offset + bytes > (sizes.get(file) ?? 0)) throw new FormatError(`${FACTS}: the slot ${name} does not fit its file`);
    slots.set(name, { file, offset, shape });
  }
  return {
    wasmGraph: value.wasm_graph == null ? null : asText(value.wasm_graph, "wasm_graph"),
    slots,
    context: value.context == null ? null : asCount(value.context, "context"),
    ends: asCounts(value.ends, "ends", 1024),
    padId: asCount(value.pad, "pad"),
    special: texts(value.special, "special"),
    template: value.template == null ? null : asText(value.template, "template", 1 << 18),
    problems: texts(value.problems, "problems"),
  };
}

function texts(value: Json | undefined, where: string): Record<string, string> {
  return Object.fromEntries(Object.entries(asObject(value, where)).map(([name, text]) => [name, asText(text, `${where}/${name}`)]));
}

/** Reads an entry of a closed list of files. */
export function readFile(value: Json): FileEntry {
  const entry = asObject(value, "files");
  const path = asText(entry.path, "files/path", 255);
  const sha256 = asText(entry.sha256, "files/sha256", 64);
  if (!/^\w[\w.-]{0,127}(\/\w[\w.-]{0,127}){0,3}$/.test(path)) throw new FormatError(`the path ${JSON.stringify(path)} may not be in a bundle`);
  if (!/^[0-9a-f]{64}$/.test(sha256)) throw new FormatError(`the digest of ${path} is no SHA-256`);
  return { path, size: asCount(entry.size, `the size of ${path}`, MAX_BYTES), sha256 };
}

/** Reads the fingerprints of a base. */
export function readBase(value: Json | undefined): Base {
  const base = asObject(value, "base");
  const level = (name: string): string | null => (base[name] == null ? null : asText(base[name], `base/${name}`));
  return { name: level("name"), structure: level("structure"), content: level("content"), files: level("files"), probe: level("probe") };
}

function readPort(value: Json): Port {
  const port = asObject(value, "io");
  const shape = asList(port.shape, "io/shape", 8).map((extent) => (typeof extent === "number" ? asCount(extent, "io/shape") : extent === null ? null : asText(extent, "io/shape")));
  return { name: asText(port.name, "io/name"), dtype: asText(port.dtype, "io/dtype", 32), shape };
}

function readAdapter(value: Json): Adapter {
  const adapter = asObject(value, "adapters");
  return {
    name: asText(adapter.name, "adapters/name", 128),
    pack: asText(adapter.pack, "adapters/pack", 71),
    slot: adapter.slot == null ? null : asCount(adapter.slot, "adapters/slot", 4095),
    labels: asTexts(adapter.labels, "adapters/labels"),
  };
}

function readSites(value: Json | undefined): Map<string, Site> {
  const sites = new Map<string, Site>();
  for (const [path, entry] of Object.entries(asObject(value, "sites"))) {
    const site = asObject(entry, `sites/${path}`);
    const members = asTexts(site.members ?? [], "sites/members", 64) ?? [];
    sites.set(path, { dtype: asText(site.dtype ?? "float32", "sites/dtype", 16), members, outFeatures: asCount(site.out_features, "sites/out_features") });
  }
  return sites;
}
