// Reads the tensors of a safetensors file of strangers: every bound is checked before anything is allocated for it.

import { FormatError, Unsupported } from "./errors";
import { asCounts, asObject, asText, parseObject } from "./json";

const MAX_HEADER = 16 << 20;
const MAX_TENSORS = 50_000;
const WIDTHS: Record<string, number> = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1 };

/** One tensor: its type, its shape, and its bytes as they lie in the file. */
export interface Tensor {
  dtype: string;
  shape: number[];
  bytes: Uint8Array;
}

/**
 * The tensors of a file, by name. Their bytes lie one after another without holes, as the format says, and end where the file ends.
 *
 * @throws FormatError - the file is damaged.
 */
export function parseSafetensors(file: Uint8Array, where: string): Map<string, Tensor> {
  if (file.byteLength < 10) throw new FormatError(`${where} is too short for a safetensors file`);
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = view.getBigUint64(0, true);
  if (length < 2n || length > BigInt(Math.min(MAX_HEADER, file.byteLength - 8))) throw new FormatError(`${where} has a header of ${length} bytes`);
  const start = 8 + Number(length);
  const header = parseObject(file.subarray(8, start), `the header of ${where}`, MAX_HEADER);
  const names = Object.keys(header).filter((name) => name !== "__metadata__");
  if (names.length > MAX_TENSORS) throw new FormatError(`${where} has more than ${MAX_TENSORS} tensors`);
  const tensors = new Map<string, Tensor>();
  const spans: [number, number][] = [];
  for (const name of names) {
    const place = `${where}, tensor ${name.slice(0, 200)}`;
    const entry = asObject(header[name], place);
    const [dtype, shape, offsets] = [asText(entry.dtype, place, 16), asCounts(entry.shape, place), asCounts(entry.data_offsets, place, 2)];
    const width = WIDTHS[dtype];
    const [from, to] = offsets;
    if (width === undefined) throw new FormatError(`${place} has the unknown type ${dtype}`);
    if (from === undefined || to === undefined || to < from || start + to > file.byteLength || countOf(shape) * width !== to - from) {
      throw new FormatError(`${place} does not fit its bytes`);
    }
    spans.push([from, to]);
    tensors.set(name, { dtype, shape, bytes: file.subarray(start + from, start + to) });
  }
  requireFilled(spans, file.byteLength - start, where);
  return tensors;
}

/** The numbers of a tensor as float32, row by row. */
export function asFloats(tensor: Tensor, where: string): Float32Array {
  const count = countOf(tensor.shape);
  const view = new DataView(tensor.bytes.buffer, tensor.bytes.byteOffset, tensor.bytes.byteLength);
  const read = READERS[tensor.dtype];
  if (!read) throw new Unsupported(`${where} is of the type ${tensor.dtype}`, "Packs are loaded in the browser in F32, F16 or BF16");
  const floats = new Float32Array(count);
  for (let at = 0; at < count; at++) floats[at] = read(view, at);
  if (!floats.every(Number.isFinite)) throw new FormatError(`${where} has a number that is not finite`);
  return floats;
}

const READERS: Record<string, (view: DataView, at: number) => number> = {
  F32: (view, at) => view.getFloat32(4 * at, true),
  F16: (view, at) => half(view.getUint16(2 * at, true)),
  BF16: (view, at) => {
    SCRATCH.setUint32(0, view.getUint16(2 * at, true) << 16);
    return SCRATCH.getFloat32(0);
  },
};
const SCRATCH = new DataView(new ArrayBuffer(4));

/** The number that sixteen bits of IEEE 754's binary16 stand for. */
export function half(bits: number): number {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** How many numbers a shape holds; too many for a file are no number that is compared with one. */
export function countOf(shape: number[]): number {
  return shape.reduce((product, extent) => product * extent, 1);
}

function requireFilled(spans: [number, number][], size: number, where: string): void {
  let end = 0;
  for (const [from, to] of spans.sort((one, other) => one[0] - other[0] || one[1] - other[1])) {
    if (from !== end) throw new FormatError(`${where} has tensors that overlap or leave holes`);
    end = to;
  }
  if (end !== size) throw new FormatError(`${where} has ${size - end} bytes that belong to no tensor`);
}
