import { type Progress } from "./fetching";
import { type Sampling } from "./generate";
import { Graph, type Provider, type Tensor, type Values } from "./graph";
import { type Adapter, type Facts, type Manifest } from "./manifest";
import { type PackSource } from "./pack";
import { type Scored } from "./scores";
import { type Message, Texts } from "./texts";
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
export declare class Bundle {
    /** The SHA-256 of the manifest, as `sha256:…`. */
    readonly digest: string;
    private readonly manifest;
    private readonly facts;
    private readonly texts;
    private readonly graph;
    private readonly model;
    private readonly weights;
    private bank;
    private known;
    /** @internal */
    constructor(
    /** The SHA-256 of the manifest, as `sha256:…`. */
    digest: string, manifest: Manifest, facts: Facts, texts: Texts, graph: Graph, model: Uint8Array, weights: Map<string, Uint8Array>, bank: Map<string, Uint8Array>, known: Adapter[]);
    /** The adapters that rows can name: name, digest of the pack, labels. */
    get adapters(): readonly Adapter[];
    /** What the bundle does: `text-classification`, `feature-extraction` or `text-generation`. */
    get task(): string;
    /** The base's name. */
    get base(): string;
    /** What runs it: `webgpu` or `wasm`. */
    get provider(): Provider;
    /** Whether the base answers by itself: a classifier without a trained head has no labels. */
    get baseAnswers(): boolean;
    /** How many further packs fit into the bank. */
    get freeSlots(): number;
    /**
     * The label of each row and the probability of each label, all rows in one batch, each with its own adapter.
     *
     * @example `await bundle.classify([{ text: "It leaks.", adapter: "tickets" }, { text: "It leaks." }])`
     */
    classify(rows: Row[]): Promise<Scored[]>;
    /** The embedding of each row, pooled as the bundle says. */
    embed(rows: Row[]): Promise<Float32Array[]>;
    /** One pass of the graph: inputs by name, the adapter of each row, outputs by name. */
    run(inputs: Record<string, Values>, adapters: (string | null)[]): Promise<Record<string, Tensor>>;
    /**
     * An answer, piece by piece, to a text (one user message, where the bundle has a chat template) or to messages.
     *
     * @example `for await (const text of bundle.generate("Where is my order?", { adapter: "orders" })) show(text);`
     */
    generate(prompt: string | Message[], options?: Sampling & {
        adapter?: string | null;
    }): AsyncGenerator<string, void, void>;
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
    load(source: PackSource, { name, digest }?: {
        name?: string;
        digest?: string;
    }): Promise<Adapter>;
    /** Forgets an adapter; its slot is free. */
    unload(name: string): void;
    /** Ends the session and gives its memory back. */
    close(): Promise<void>;
    /** Replays the canary of a pack in a slot; why not, if it is not. */
    private replayed;
    /** What a canary knows of one row of ids: its logits, or its last hidden state. */
    private last;
    private decoding;
    private loading;
    private alone;
    /** Opens the graph with another bank; where that fails it is as it was. */
    private reopen;
    private pass;
    private ids;
    private slots;
    private slot;
    private labels;
    private problem;
    private requireTask;
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
export declare function open(url: string | URL, options?: OpenOptions): Promise<Bundle>;
