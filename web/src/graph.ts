// Opens a bundle's graph in ONNX Runtime: WebGPU where there is one, else WebAssembly.

import type { InferenceSession, Tensor as OrtTensor } from "onnxruntime-web";

import { FormatError, Unsupported } from "./errors";
import type { Port } from "./manifest";

/** What runs the graph. */
export type Provider = "webgpu" | "wasm";

/** Numbers with a shape. */
export interface Values {
  type: "float32" | "int64" | "bool";
  data: Float32Array | BigInt64Array | Uint8Array;
  dims: number[];
}

/** A value of ONNX Runtime's, which may lie on the GPU. */
export type Tensor = OrtTensor;

type Ort = typeof import("onnxruntime-web");

const CACHE = /^present\./;

/** The provider that was asked for; of `auto` WebGPU where the browser has an adapter for it. */
export async function chosenProvider(asked: "auto" | Provider): Promise<Provider> {
  if (asked === "wasm") return "wasm";
  const gpu = (globalThis.navigator as { gpu?: { requestAdapter(): Promise<unknown> } } | undefined)?.gpu;
  const found = await gpu?.requestAdapter().catch(() => null);
  if (!found && asked === "webgpu") throw new Unsupported("this browser has no WebGPU here", "Leave the provider out: WebAssembly runs everywhere");
  return found ? "webgpu" : "wasm";
}

/** An open graph. One pass runs at a time; those that come meanwhile wait in line. */
export class Graph {
  private line: Promise<unknown> = Promise.resolve();

  private constructor(private readonly ort: Ort, private session: InferenceSession, readonly provider: Provider, private readonly outputs: Port[]) {}

  /** Opens a graph of these bytes, with the files of its weights by name. */
  static async open(provider: Provider, graph: Uint8Array, data: Map<string, Uint8Array>, outputs: Port[]): Promise<Graph> {
    const ort = (await (provider === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"))) as Ort;
    return new Graph(ort, await openSession(ort, provider, graph, data, outputs), provider, outputs);
  }

  /** Opens it anew with other weights. The old session ends first, since two would need twice the memory. */
  async reopen(graph: Uint8Array, data: Map<string, Uint8Array>): Promise<void> {
    await this.alone(async () => {
      await this.session.release();
      this.session = await openSession(this.ort, this.provider, graph, data, this.outputs);
    });
  }

  /** Names of the inputs that must be fed. */
  get inputs(): readonly string[] {
    return this.session.inputNames;
  }

  /** Runs one pass. */
  run(feeds: Record<string, Values | Tensor>): Promise<Record<string, Tensor>> {
    return this.alone(async () => {
      const tensors = Object.entries(feeds).map(([name, value]): [string, Tensor] => [name, "dims" in value && "location" in value ? value : this.tensor(value)]);
      return (await this.session.run(Object.fromEntries(tensors))) as Record<string, Tensor>;
    });
  }

  /** Ends the session. */
  async close(): Promise<void> {
    await this.alone(() => this.session.release());
  }

  private tensor({ type, data, dims }: Values): Tensor {
    return new this.ort.Tensor(type, data as never, dims);
  }

  private alone<T>(work: () => Promise<T>): Promise<T> {
    const done = this.line.then(work);
    this.line = done.catch(() => {});
    return done;
  }
}

/** Quantized weights of the graph for WebAssembly become floats once, when it is opened: products of codes take ten times as long there. */
async function openSession(ort: Ort, provider: Provider, graph: Uint8Array, data: Map<string, Uint8Array>, outputs: Port[]): Promise<InferenceSession> {
  const onGpu = outputs.map((port) => port.name).filter((name) => CACHE.test(name));
  const locations = provider === "webgpu" && onGpu.length ? { preferredOutputLocation: Object.fromEntries(onGpu.map((name) => [name, "gpu-buffer" as const])) } : {};
  const extra = provider === "wasm" ? { extra: { session: { disable_quant_qdq: "1" } } } : {};
  try {
    return await ort.InferenceSession.create(graph, {
      executionProviders: [provider],
      logSeverityLevel: 3,
      externalData: Array.from(data, ([path, bytes]) => ({ path, data: bytes })),
      ...locations,
      ...extra,
    });
  } catch (error) {
    throw new FormatError(`ONNX Runtime cannot open the bundle's graph: ${(error as Error).message}`, "Export the site again, or choose another provider");
  }
}
