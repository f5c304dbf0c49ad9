// The bank's bytes: a free slot is filled by copying the base's slot and writing the pack's factors over it.

import { ConfigError, FormatError, Unsupported } from "./errors";
import type { Facts, Manifest, Slot } from "./manifest";
import type { Change, Pack } from "./pack";
import { asFloats, type Tensor } from "./safetensors";

const ROOM = "Export the bundle with a larger --max-rank or with this adapter among the packs";
const ABSENT = -1e9;

interface Matrix {
  rows: number;
  columns: number;
  at: (row: number, column: number) => number;
}

/** The bytes of one slot, all fields together: no pack that fits has more numbers. */
export function slotBytes(facts: Facts): number {
  return Array.from(facts.slots.values()).reduce((total, { shape }) => total + 4 * shape.slice(1).reduce((product, extent) => product * extent, 1), 0);
}

/** Copies of the bank's files with `pack` in slot `number`; `files` are its files now. */
export function filled(pack: Pack, number: number, manifest: Manifest, facts: Facts, files: Map<string, Uint8Array>): Map<string, Uint8Array> {
  if ([...manifest.sites.values()].some((site) => site.dtype !== "float32")) throw new Unsupported("the bank is not of float32", "Export the bundle with --dtype float32");
  const copies = new Map(Array.from(files, ([name, bytes]) => [name, bytes.slice()]));
  const bank = new Bank(copies, facts.slots, number);
  bank.copyBase();
  for (const change of pack.changes) {
    if (change.full) fillHead(bank, change);
    else fillFactors(bank, change, manifest);
  }
  return copies;
}

function fillHead(bank: Bank, { path, tensors }: Change): void {
  for (const [param, tensor] of tensors) {
    const split = param.lastIndexOf(".");
    const site = split < 0 ? path : `${path}.${param.slice(0, split)}`;
    const leaf = param.slice(split + 1);
    const name = `${site}.${leaf === "weight" ? "head" : "head_bias"}`;
    const floats = asFloats(tensor, name);
    if (leaf === "weight" && tensor.shape.length === 2) {
      bank.clear(`${site}.head`, 0);
      bank.write(`${site}.head`, transposed(tensor, floats), 0, 0);
      if (!tensors.has(`${param.slice(0, split + 1)}bias`)) {
        bank.clear(`${site}.head_bias`, ABSENT);
        bank.write(`${site}.head_bias`, { rows: 1, columns: tensor.shape[0] as number, at: () => 0 }, 0, 0);
      }
    } else if (leaf === "bias" && tensor.shape.length === 1) {
      bank.clear(`${site}.head_bias`, ABSENT);
      bank.write(`${site}.head_bias`, { rows: 1, columns: floats.length, at: (_, column) => floats[column] as number }, 0, 0);
    } else {
      throw new Unsupported(`${path}.${param} is a trained module that is not made of linear layers`, "Export the pack with --mode folded");
    }
  }
}

/** Where sites share a slot their factors lie side by side, each as wide as the largest rank. */
function fillFactors(bank: Bank, { path, scale, tensors }: Change, manifest: Manifest): void {
  const [down, up] = [tensors.get("lora_A"), tensors.get("lora_B")];
  if (!down || !up || tensors.size !== 2 || down.shape.length !== 2 || up.shape.length !== 2 || down.shape[0] !== up.shape[1]) {
    throw new Unsupported(`the change of ${path} is not of two factors`, "Export the bundle again with this adapter among the packs");
  }
  const rank = down.shape[0] as number;
  if (rank > manifest.maxRank) {
    throw new Unsupported(`the pack has rank ${rank} at ${path}, and the bank has room for ${manifest.maxRank}`, ROOM);
  }
  const group = [...manifest.sites].find(([, site]) => site.members.includes(path));
  const place = group ? group[1].members.indexOf(path) : 0;
  const shift = place * manifest.maxRank;
  const downs = asFloats(down, `${path}.lora_A`);
  const ups = asFloats(up, `${path}.lora_B`).map((value) => value * scale);
  const own = bank.has(`${path}.down`);
  bank.write(own || !group ? `${path}.down` : `${group[0]}.down`, transposed(down, downs), 0, own ? 0 : shift);
  if (bank.has(`${path}.up`) || !group) {
    bank.write(`${path}.up`, transposed(up, ups), 0, 0);
    return;
  }
  const before = group[1].members.slice(0, place).reduce((total, member) => total + (manifest.sites.get(member)?.outFeatures ?? 0), 0);
  bank.write(`${group[0]}.up`, transposed(up, ups), shift, before, manifest.sites.get(path)?.outFeatures);
}

function transposed(tensor: Tensor, floats: Float32Array): Matrix {
  const [rows, columns] = tensor.shape as [number, number];
  return { rows: columns, columns: rows, at: (row, column) => floats[column * columns + row] as number };
}

/** The slot `number` of every field, in the bytes of the bank's files. */
class Bank {
  constructor(private readonly files: Map<string, Uint8Array>, private readonly slots: Map<string, Slot>, private readonly number: number) {}

  has(name: string): boolean {
    return this.slots.has(name);
  }

  copyBase(): void {
    for (const [name, slot] of this.slots) this.numbers(name, this.number).set(this.numbers(name, 0, slot));
  }

  clear(name: string, value: number): void {
    this.numbers(name, this.number).fill(value);
  }

  /** Writes a matrix with its first number at `row` and `column`; axes that are as wide as the site must be filled. */
  write(name: string, matrix: Matrix, row: number, column: number, width?: number): void {
    const numbers = this.numbers(name, this.number);
    const shape = this.slot(name).shape.slice(1);
    const [rows, columns] = shape.length === 1 ? [1, shape[0] as number] : (shape as [number, number]);
    const wide = name.endsWith(".up") ? (width ?? columns) === matrix.columns : name.endsWith("head_bias") || rows === matrix.rows;
    if (!wide) throw new ConfigError(`the pack was made for a layer of another width than ${name}`, "Use a bundle of the base that the pack names");
    if (row + matrix.rows > rows || column + matrix.columns > columns) throw new Unsupported(`the pack does not fit the slot ${name} of ${rows} × ${columns}`, ROOM);
    for (let at = 0; at < matrix.rows; at++) {
      for (let to = 0; to < matrix.columns; to++) numbers[(row + at) * columns + column + to] = matrix.at(at, to);
    }
  }

  private numbers(name: string, number: number, slot = this.slot(name)): Float32Array {
    const bytes = this.files.get(slot.file);
    if (!bytes) throw new FormatError(`the bank's file ${slot.file} is not among the bundle's`);
    const size = slot.shape.slice(1).reduce((product, extent) => product * extent, 1);
    return new Float32Array(bytes.buffer, bytes.byteOffset + slot.offset + 4 * size * number, size);
  }

  private slot(name: string): Slot {
    const slot = this.slots.get(name);
    if (!slot) throw new Unsupported(`the graph has no slot for ${name}, which the pack changes`, "Export the bundle again with this adapter among the packs");
    return slot;
  }
}
