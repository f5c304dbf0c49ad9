// Reads a pack of a stranger: its manifest, its tensors, and whether their digests are those that the manifest lists.

import { type Canary, readCanary } from "./canary";
import { requireDigest, sha256 } from "./digest";
import { BaseMismatch, ConfigError, FormatError, Unsupported } from "./errors";
import { below, download } from "./fetching";
import { asCount, asList, asObject, asText, asTexts, parseObject, type JsonObject } from "./json";
import { readBase, readFile, type Base, type FileEntry } from "./manifest";
import { parseSafetensors, type Tensor } from "./safetensors";
import { requireSeal } from "./seal";

const PACK = "adapterpack.json";
const TENSORS = "adapter_model.safetensors";
const MAX_MANIFEST = 16 << 20;
const FETCH_AGAIN = "Fetch the pack again from where it comes, and do not use this one";
const AMONG = "Export the bundle again with this adapter among the packs";

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
export async function readPack(source: PackSource, digest: string | undefined, most: number): Promise<Pack> {
  const file = typeof source === "string" || source instanceof URL ? fetched(new URL(String(source), globalThis.location?.href).href) : picked(source);
  const bytes = await file(PACK, MAX_MANIFEST, null);
  if (digest !== undefined) await requireDigest(bytes, digest, "the pack's manifest", FETCH_AGAIN);
  const manifest = parseObject(bytes, PACK, MAX_MANIFEST);
  const head = readHead(manifest);
  await requireSeal(bytes, asText(manifest.format_version, "format_version"), PACK);
  const listed = asList(manifest.files, "files", 64).map(readFile).find((entry) => entry.path === TENSORS);
  if (!listed) throw new FormatError(`${PACK} lists no ${TENSORS}`);
  if (listed.size > most) throw new Unsupported(`the pack has ${listed.size} bytes, and a slot of the bank ${most}`, "Export the bundle with a larger --max-rank or with this adapter among the packs");
  const data = await file(TENSORS, listed.size, listed);
  await requireDigest(data, listed.sha256, TENSORS, FETCH_AGAIN);
  const tensors = parseSafetensors(data, TENSORS);
  return { ...head, id: `sha256:${await sha256(bytes)}`, changes: await readChanges(manifest, tensors) };
}

/** Checks that a pack belongs to a base, as far as the fingerprints of both say it: by all bytes, by files, or by samples of each tensor. */
export function requireBase(pack: Pack, base: Base): void {
  const equal = (level: "structure" | "content" | "files" | "probe"): boolean | null => {
    const [one, other] = [pack.base[level], base[level]];
    return one === null || other === null || one.split(":")[0] !== other.split(":")[0] ? null : one === other;
  };
  if (![pack.base.structure, pack.base.content, pack.base.files, pack.base.probe].some((level) => level !== null)) return;
  const content = equal("content");
  if (content || (content === null && (equal("files") || (equal("probe") && equal("structure") !== false)))) return;
  throw new BaseMismatch(`the pack was made for the base ${pack.base.name ?? "without a name"}, and the bundle's is ${base.name ?? "another"}`, "Use a bundle of the base that the pack names");
}

function readHead(manifest: JsonObject): Omit<Pack, "id" | "changes"> {
  if (manifest.format !== "adapterpack" || !/^1\.\d{1,4}$/.test(asText(manifest.format_version, "format_version"))) {
    throw new FormatError(`${PACK} is no pack's manifest of version 1`);
  }
  const method = asText(asObject(manifest.method, "method").type, "method/type", 64);
  const needs = asTexts(manifest.must_understand ?? [], "must_understand", 64) ?? [];
  if (method !== "lora" || manifest.composition != null || needs.length) {
    throw new Unsupported(`a browser loads LoRA packs by themselves, and this one is ${[method, ...needs].join(" with ")}`, AMONG);
  }
  if (manifest.quantization != null) throw new Unsupported("the pack is quantized", AMONG);
  const task = asObject(manifest.task, "task");
  return {
    name: asText(asObject(manifest.pack, "pack").name, "pack/name", 128),
    task: asText(task.type, "task/type", 64),
    base: readBase(manifest.base),
    labels: asTexts(task.labels, "task/labels"),
    canary: readCanary(manifest.canary),
  };
}

/** Every module of the pack with its tensors, each of them compared with its digest; no tensor is left over. */
async function readChanges(manifest: JsonObject, tensors: Map<string, Tensor>): Promise<Change[]> {
  const changes = new Map<string, Change>();
  for (const value of asList(manifest.groups, "groups", 50_000)) {
    const group = asObject(value, "groups");
    const [path, role, kind] = [asText(group.path, "groups/path", 512), asText(group.role, "groups/role", 16), asText(group.kind, "groups/kind", 32)];
    if (role !== "full" && (role !== "adapter" || kind !== "linear" || group.method != null)) throw new Unsupported(`the pack changes ${path}, which is ${kind}`, AMONG);
    const scale = group.scale ?? 1;
    if (typeof scale !== "number" || !Number.isFinite(scale)) throw new FormatError(`the scale of ${path} is no number`);
    if (changes.has(path)) throw new FormatError(`${path} stands twice in ${PACK}`);
    changes.set(path, { path, full: role === "full", scale, tensors: new Map() });
  }
  const entries = Object.entries(asObject(manifest.tensors, "tensors"));
  if (entries.length !== tensors.size) throw new FormatError(`${TENSORS} has ${tensors.size} tensors, where its manifest lists ${entries.length}`, FETCH_AGAIN);
  for (const [name, value] of entries) {
    const entry = asObject(value, `tensors/${name}`);
    const tensor = tensors.get(name);
    const shape = asList(entry.shape, "tensors/shape", 8).map((extent) => asCount(extent, "tensors/shape"));
    const change = changes.get(asText(entry.group, "tensors/group", 512));
    if (!tensor || !change || tensor.dtype !== entry.dtype || String(tensor.shape) !== String(shape)) throw new FormatError(`the tensor ${name} is not what ${PACK} says`, FETCH_AGAIN);
    await requireDigest(tensor.bytes, asText(entry.sha256, "tensors/sha256", 64), `the tensor ${name}`, FETCH_AGAIN);
    change.tensors.set(asText(entry.param, "tensors/param", 512), tensor);
  }
  return [...changes.values()];
}

type ReadFile = (name: string, most: number, listed: FileEntry | null) => Promise<Uint8Array>;

function fetched(folder: string): ReadFile {
  return (name, most, listed) => download(below(folder, name, listed?.sha256), listed?.size ?? null, most);
}

function picked(source: Iterable<File>): ReadFile {
  const files = new Map(Array.from(source, (file) => [file.name, file]));
  return async (name, most, listed) => {
    const file = files.get(name);
    if (!file) throw new ConfigError(`the pack's file ${name} is missing`, `Choose both: ${PACK} and ${TENSORS}`);
    if (file.size > most || (listed !== null && file.size !== listed.size)) throw new FormatError(`${name} has ${file.size} bytes, expected ${listed?.size ?? `at most ${most}`}`, FETCH_AGAIN);
    return new Uint8Array(await file.arrayBuffer());
  };
}
