import type { Tensor as OrtTensor } from "onnxruntime-web";
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
/** The provider that was asked for; of `auto` WebGPU where the browser has an adapter for it. */
export declare function chosenProvider(asked: "auto" | Provider): Promise<Provider>;
/** An open graph. One pass runs at a time; those that come meanwhile wait in line. */
export declare class Graph {
    private readonly ort;
    private session;
    readonly provider: Provider;
    private readonly outputs;
    private line;
    private constructor();
    /** Opens a graph of these bytes, with the files of its weights by name. */
    static open(provider: Provider, graph: Uint8Array, data: Map<string, Uint8Array>, outputs: Port[]): Promise<Graph>;
    /** Opens it anew with other weights. The old session ends first, since two would need twice the memory. */
    reopen(graph: Uint8Array, data: Map<string, Uint8Array>): Promise<void>;
    /** Names of the inputs that must be fed. */
    get inputs(): readonly string[];
    /** Runs one pass. */
    run(feeds: Record<string, Values | Tensor>): Promise<Record<string, Tensor>>;
    /** Ends the session. */
    close(): Promise<void>;
    private tensor;
    private alone;
}
