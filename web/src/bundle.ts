// An open bundle: rows with adapters by name, text token by token, and further packs in free slots.

import { filled, slotBytes } from "./bank";
import { batch, int64 } from "./batch";
import { requireCanary } from "./canary";
import { requireDigest, sha256 } from "./digest";
import { ConfigError, UnknownAdapter, Unsupported } from "./errors";
import { below, download, type Progress } from "./fetching";
import { type Decoding, generated, prefilled, type Sampling } from "./generate";
import { chosenProvider, Graph, type Provider, type Tensor, type Values } from "./graph";
import { parseObject, type JsonObject } from "./json";
import { type Adapter, FACTS, type Facts, MANIFEST, type Manifest, readFacts, readManifest } from "./manifest";
import { type Pack, type PackSource, readPack, requireBase } from "./pack";
import { POOLING, scored, type Scored } from "./scores";
import { type Message, Texts } from "./texts";

const MAX_MANIFEST = 16 << 20;
const AGAIN = "Publish the bundle again: a file of it was altered or is half copied";
const PLAIN = "single_label_classification";

/** How a bundle is opened. */
export interface OpenOptions {
  /** `full`, the default, compares every file with the manifest by SHA-256; `off` compares sizes alone. */
  verify?: "full" | "off";
  /** `auto`, the default, takes WebGPU where there is one. */
  provider?: "auto" | Provider;
  /** The SHA-256 of the manifest, which pins the whole bundle. */
  digest?: string;
  /** Told of every piece that has come. */
  progress?: Progress;
}

/** One row: a text, or a pair of them, and the adapter that answers it; without one the base does. */
export interface Row {
  text: string;
  textPair?: string;
  adapter?: string | null;
}

/** An open bundle; {@link open} gives one. */
export class Bundle {
  /** @internal */
  constructor(
    /** The SHA-256 of the manifest, as `sha256:…`. */
    readonly digest: string,
    private readonly manifest: Manifest,
    private readonly facts: Facts,
    private readonly texts: Texts,
    private readonly graph: Graph,
    private readonly model: Uint8Array,
    private readonly weights: Map<string, Uint8Array>,
    private bank: Map<string, Uint8Array>,
    private known: Adapter[],
  ) {}

  /** The adapters that rows can name: name, digest of the pack, labels. */
  get adapters(): readonly Adapter[] {
    return this.known;
  }

  /** What the bundle does: `text-classification`, `feature-extraction` or `text-generation`. */
  get task(): string {
    return this.manifest.task;
  }

  /** The base's name. */
  get base(): string {
    return this.manifest.base.name ?? "base";
  }

  /** What runs it: `webgpu` or `wasm`. */
  get provider(): Provider {
    return this.graph.provider;
  }

  /** Whether the base answers by itself: a classifier without a trained head has no labels. */
  get baseAnswers(): boolean {
    return this.manifest.mode !== "folded" && (this.task !== "text-classification" || this.manifest.baseHeadTrained);
  }

  /** How many further packs fit into the bank. */
  get freeSlots(): number {
    return Math.max(0, this.manifest.slots - 1 - this.known.length);
  }

  /**
   * The label of each row and the probability of each label, all rows in one batch, each with its own adapter.
   *
   * @example `await bundle.classify([{ text: "It leaks.", adapter: "tickets" }, { text: "It leaks." }])`
   */
  async classify(rows: Row[]): Promise<Scored[]> {
    this.requireTask("text-classification");
    if (!rows.length) return [];
    const { logits } = await this.pass(rows);
    const data = (await logits?.getData()) as Float32Array;
    const width = data.length / rows.length;
    return rows.map(({ adapter }, row) => scored(data.subarray(row * width, (row + 1) * width), this.labels(adapter), this.problem(adapter)));
  }

  /** The embedding of each row, pooled as the bundle says. */
  async embed(rows: Row[]): Promise<Float32Array[]> {
    this.requireTask("feature-extraction");
    if (!rows.length) return [];
    const encoded = rows.map(({ text, textPair }) => this.texts.encode(text, textPair));
    const hidden = Object.values(await this.pass(rows))[0] as Tensor;
    const [data, [, length, width]] = [(await hidden.getData()) as Float32Array, hidden.dims as [number, number, number]];
    const pool = POOLING[this.manifest.pooling];
    if (!pool) throw new Unsupported(`this module does not pool by ${this.manifest.pooling}`);
    return encoded.map(({ ids }, row) => pool(data.subarray(row * length * width, (row + 1) * length * width), ids.length, width));
  }

  /** One pass of the graph: inputs by name, the adapter of each row, outputs by name. */
  async run(inputs: Record<string, Values>, adapters: (string | null)[]): Promise<Record<string, Tensor>> {
    return this.graph.run({ ...inputs, ...this.ids(adapters) });
  }

  /**
   * An answer, piece by piece, to a text (one user message, where the bundle has a chat template) or to messages.
   *
   * @example `for await (const text of bundle.generate("Where is my order?", { adapter: "orders" })) show(text);`
   */
  generate(prompt: string | Message[], options: Sampling & { adapter?: string | null } = {}): AsyncGenerator<string, void, void> {
    this.requireTask("text-generation");
    const { adapter = null, ...sampling } = options;
    const slot = (): Values | null => this.ids([adapter]).adapter_ids ?? null;
    slot();
    return generated(this.texts.prompt(prompt), this.decoding(slot), sampling);
  }

  /**
   * Puts a further LoRA pack into a free slot of the bank: the address of its folder, or its two files. Every tensor is compared with its
   * digest, and `digest` pins the pack. `name` is what rows call it, by default its own name.
   *
   * @returns the adapter, as in {@link Bundle.adapters}.
   * @throws DigestMismatch, FormatError - the pack was altered or damaged.
   * @throws BaseMismatch - it was made for another base, by its manifest or by its canary.
   * @throws ParityError - its canary fails otherwise.
   * @throws Unsupported - it is for another task, no slot is free, or it does not fit.
   */
  async load(source: PackSource, { name, digest }: { name?: string; digest?: string } = {}): Promise<Adapter> {
    if (this.manifest.mode !== "bank") throw new Unsupported(`a bundle of the mode ${this.manifest.mode} takes no further packs`, "Export it with --mode bank");
    const pack = await readPack(source, digest, slotBytes(this.facts) + MAX_MANIFEST);
    requireBase(pack, this.manifest.base);
    if (pack.task !== this.task && pack.task !== "other") throw new Unsupported(`the pack is for ${pack.task}, and the bundle for ${this.task}`);
    return this.alone(async () => {
      const called = name ?? pack.name;
      if (this.known.some((adapter) => adapter.name === called)) throw new ConfigError(`the bundle already has an adapter ${called}`, "Choose another name");
      const taken = new Set(this.known.map((adapter) => adapter.slot));
      const free = Array.from({ length: this.manifest.slots }, (_, slot) => slot).find((slot) => slot > 0 && !taken.has(slot));
      if (free === undefined) throw new Unsupported(`no slot is free: the bank has ${this.manifest.slots - 1} for adapters`, "Unload one, or export the bundle with more --slots");
      const before = this.bank;
      await this.reopen(filled(pack, free, this.manifest, this.facts, before));
      let note: string | null;
      try {
        note = await this.replayed(pack, free);
      } catch (error) {
        await this.reopen(before);
        throw error;
      }
      const adapter = { name: called, pack: pack.id, slot: free, labels: pack.labels, note };
      this.known = [...this.known, adapter];
      return adapter;
    });
  }

  /** Forgets an adapter; its slot is free. */
  unload(name: string): void {
    this.slot(name);
    this.known = this.known.filter((adapter) => adapter.name !== name);
  }

  /** Ends the session and gives its memory back. */
  close(): Promise<void> {
    return this.graph.close();
  }

  /** Replays the canary of a pack in a slot; why not, if it is not. */
  private async replayed({ canary, changes }: Pack, slot: number): Promise<string | null> {
    if (canary === null) return "the pack carries no canary";
    if (this.manifest.quantized) return "the graph is quantized, and it is not known by how much that moves its outputs";
    const rows = async (number: number): Promise<Float32Array[]> => {
      const given: Float32Array[] = [];
      for (const ids of canary.rows) given.push(await this.last(ids, number));
      return given;
    };
    // The canary's base has the modules that the pack trained whole.
    requireCanary(canary, changes.some((change) => change.full) ? null : await rows(0), await rows(slot));
    return null;
  }

  /** What a canary knows of one row of ids: its logits, or its last hidden state. */
  private async last(ids: number[], slot: number): Promise<Float32Array> {
    if (this.task === "text-generation") return prefilled(ids, this.decoding(() => this.slots([slot]).adapter_ids ?? null));
    const row = batch([{ ids, types: ids.map(() => 0) }], this.facts.padId, this.graph.inputs);
    const outputs = await this.graph.run({ ...row, ...this.slots([slot]) });
    const output = (outputs.logits ?? outputs.last_hidden_state ?? Object.values(outputs)[0]) as Tensor;
    const data = (await output.getData()) as Float32Array;
    return data.subarray(data.length - (output.dims.at(-1) as number));
  }

  private decoding(slot: () => Values | null): Decoding {
    return { graph: this.graph, ports: this.manifest.inputs, ends: this.facts.ends, context: this.facts.context, decode: (ids) => this.texts.decode(ids), slot };
  }

  private loading: Promise<unknown> = Promise.resolve();

  private alone<T>(work: () => Promise<T>): Promise<T> {
    const done = this.loading.then(work);
    this.loading = done.catch(() => {});
    return done;
  }

  /** Opens the graph with another bank; where that fails it is as it was. */
  private async reopen(bank: Map<string, Uint8Array>): Promise<void> {
    try {
      await this.graph.reopen(this.model, new Map([...this.weights, ...bank]));
      this.bank = bank;
    } catch (error) {
      await this.graph.reopen(this.model, new Map([...this.weights, ...this.bank]));
      throw error;
    }
  }

  private pass(rows: Row[]): Promise<Record<string, Tensor>> {
    const encoded = rows.map(({ text, textPair }) => this.texts.encode(text, textPair));
    return this.run(batch(encoded, this.facts.padId, this.graph.inputs), rows.map(({ adapter }) => adapter ?? null));
  }

  private ids(adapters: (string | null)[]): Record<string, Values> {
    return this.slots(adapters.map((adapter) => (adapter === null ? 0 : this.slot(adapter))));
  }

  private slots(slots: number[]): Record<string, Values> {
    return this.graph.inputs.includes("adapter_ids") ? { adapter_ids: int64(slots, [slots.length]) } : {};
  }

  private slot(name: string): number {
    const adapter = this.known.find((one) => one.name === name);
    if (!adapter) throw new UnknownAdapter(`the bundle has no adapter ${JSON.stringify(name)}`, `It has ${this.known.map((one) => one.name).join(", ") || "none"}`);
    return adapter.slot ?? 0;
  }

  private labels(name: string | null | undefined): string[] | null {
    const own = name == null && this.manifest.mode !== "folded" ? null : (this.known.find((one) => one.name === name) ?? this.known[0])?.labels;
    return own ?? (this.manifest.baseHeadTrained ? this.manifest.baseLabels : null);
  }

  private problem(name: string | null | undefined): string {
    const own = this.known.find((one) => one.name === name);
    return own?.labels ? (this.facts.problems[own.name] ?? PLAIN) : this.manifest.baseProblem;
  }

  private requireTask(task: string): void {
    if (this.task !== task) throw new Unsupported(`this bundle is for ${this.task}, not for ${task}`);
  }
}

/**
 * Opens the bundle at `url`, the address of its folder: every file is downloaded, compared with the manifest, and the graph is opened.
 *
 * @throws DigestMismatch - a file is not the one that the manifest lists, or the manifest not the one that is pinned.
 * @throws FormatError, FetchError - a file is missing or damaged.
 * @throws Unsupported - the provider is not there.
 *
 * @example `const bundle = await open("bundle/"); bundle.adapters.map((adapter) => adapter.name)`
 */
export async function open(url: string | URL, options: OpenOptions = {}): Promise<Bundle> {
  const { verify = "full", provider = "auto", digest, progress = () => {} } = options;
  if (!["full", "off"].includes(verify)) throw new ConfigError(`verify is full or off, not ${String(verify)}`);
  if (!["auto", "webgpu", "wasm"].includes(provider)) throw new ConfigError(`provider is auto, webgpu or wasm, not ${String(provider)}`);
  const folder = new URL(String(url), globalThis.location?.href).href;
  const bytes = await download(below(folder, MANIFEST), null, MAX_MANIFEST);
  if (digest !== undefined) await requireDigest(bytes, digest, MANIFEST, "The bundle is not the one that this page was made for");
  const manifest = readManifest(parseObject(bytes, MANIFEST, MAX_MANIFEST));
  const runs = await chosenProvider(provider);
  const files = new Downloads(folder, manifest, verify === "full", progress);
  const facts = readFacts(await files.object(FACTS), manifest);
  const graph = runs === "wasm" && facts.wasmGraph !== null ? facts.wasmGraph : "model.onnx";
  const banks = new Set(Array.from(facts.slots.values(), (slot) => slot.file));
  const data = manifest.files.map((file) => file.path).filter((path) => path.endsWith(".onnx.data"));
  files.expect([graph, "tokenizer.json", "tokenizer_config.json", ...data]);
  const [tokenizer, config, model] = [await files.object("tokenizer.json"), await files.object("tokenizer_config.json", true), await files.bytes(graph)];
  // In memory: a browser with little room for Blobs takes hundreds of megabytes of them, and cannot read them any more.
  const [weights, bank] = [new Map<string, Uint8Array>(), new Map<string, Uint8Array>()];
  for (const path of data) (banks.has(path) ? bank : weights).set(path, await files.bytes(path));
  const texts = new Texts(tokenizer, config, facts);
  const open = await Graph.open(runs, model, new Map([...weights, ...bank]), manifest.outputs);
  return new Bundle(`sha256:${await sha256(bytes)}`, manifest, facts, texts, open, model, weights, bank, manifest.adapters);
}

/** The files of one bundle, each compared with the manifest. */
class Downloads {
  private done = 0;
  private total = 0;

  constructor(private readonly folder: string, private readonly manifest: Manifest, private readonly verify: boolean, private readonly progress: Progress) {}

  expect(paths: string[]): void {
    this.total = this.manifest.files.filter((file) => paths.includes(file.path)).reduce((sum, file) => sum + file.size, this.done);
  }

  async bytes(path: string): Promise<Uint8Array> {
    const entry = this.manifest.files.find((file) => file.path === path);
    if (!entry) throw new Unsupported(`the bundle's manifest lists no ${path}`, "Make it ready for browsers: adapterpack export BUNDLE --target web -o SITE");
    const bytes = await download(below(this.folder, path, entry.sha256), entry.size, entry.size, (more) => this.progress((this.done += more), Math.max(this.total, this.done)));
    if (this.verify) await requireDigest(bytes, entry.sha256, path, AGAIN);
    return bytes;
  }

  async object(path: string, optional = false): Promise<JsonObject> {
    if (optional && !this.manifest.files.some((file) => file.path === path)) return {};
    const bytes = await this.bytes(path);
    return parseObject(bytes, path, 1 << 27);
  }
}
