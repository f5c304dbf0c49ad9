// The canary of a pack: fixed token ids and what they must give, which tells another base, or an adapter without
// effect, before the pack answers anybody.

import { BaseMismatch, FormatError, ParityError, Unsupported } from "./errors";
import { asCounts, asList, asObject, type Json, type JsonObject } from "./json";

/** Components of one row, and the numbers there. */
interface Components {
  ids: number[];
  numbers: number[];
}

/** What was recorded when the pack was made. */
export interface Canary {
  rows: number[][];
  base: Components[];
  adapter: Components[];
  tolerance: number;
}

const MOST_IDS = 4096;
/** The share of the largest number that every arithmetic shows. */
const VISIBLE = 2 ** -7;

/** Reads a canary of token ids; null where the pack has none. */
export function readCanary(value: Json | undefined): Canary | null {
  if (value == null) return null;
  const object = asObject(value, "canary");
  for (const input of ["decoder_input_ids", "pixels", "features"]) {
    if (object[input] != null) throw new Unsupported(`the pack's canary has ${input}, which no model here takes`);
  }
  const rows = asList(object.input_ids, "canary/input_ids", 64).map((row) => asCounts(row, "canary/input_ids", MOST_IDS));
  const [base, adapter] = [components(object, "base"), components(object, "adapter")];
  if (!rows.length || rows.length !== base.length || rows.length !== adapter.length || rows.some((row) => !row.length)) {
    throw new FormatError("the canary cannot be replayed: its inputs and what they must give are not one to one", "Pack the adapter again");
  }
  return { rows, base, adapter, tolerance: asNumber(object.tolerance) };
}

function components(object: JsonObject, name: string): Components[] {
  return asList(object[name], `canary/${name}`, 64).map((item) => {
    const row = asObject(item, `canary/${name}`);
    const [ids, numbers] = [asCounts(row.ids, `canary/${name}/ids`, 64), asList(row.logits, `canary/${name}/logits`, 64).map(asNumber)];
    if (!ids.length || ids.length !== numbers.length) throw new FormatError(`canary/${name} has another number of ids than of logits`);
    return { ids, numbers };
  });
}

function asNumber(value: Json | undefined): number {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new FormatError("canary holds what is no number");
  return value;
}

/** Compares what the rows gave, without the adapter (null: it cannot be run without) and with it, with what was recorded. */
export function requireCanary(canary: Canary, base: Float32Array[] | null, adapter: Float32Array[]): void {
  if (base !== null && !(worst(canary.base, base) <= canary.tolerance)) {
    throw new BaseMismatch("the canary fails: this is not the base that the pack was made for", "Use a bundle of the base that the pack names");
  }
  const near = worst(canary.adapter, adapter) <= canary.tolerance;
  const same = base?.every((row, at) => row.every((number, place) => number === adapter[at]?.[place])) && effect(canary) > VISIBLE * size(canary);
  if (same || (!near && worst(canary.base, adapter) <= canary.tolerance)) throw new ParityError("the canary fails: the adapter has no effect");
  if (!near) throw new ParityError("the canary fails: the adapted model gives other numbers", "Fetch the pack again from where it comes");
}

/** The largest error; NaN where there is one, which is within no tolerance. */
function worst(expected: Components[], rows: Float32Array[]): number {
  const errors = expected.flatMap(({ ids, numbers }, at) => ids.map((id, place) => Math.abs((rows[at]?.[id] ?? NaN) - (numbers[place] as number))));
  return errors.some(Number.isNaN) ? NaN : Math.max(...errors);
}

/** What the adapter changed when the canary was recorded, where both have the same components; infinite where they have none. */
function effect({ base, adapter }: Canary): number {
  const changes = adapter.map(({ ids, numbers }, at) => {
    const before = new Map((base[at] as Components).ids.map((id, place) => [id, (base[at] as Components).numbers[place] as number]));
    const both = ids.flatMap((id, place) => (before.has(id) ? [Math.abs((numbers[place] as number) - (before.get(id) as number))] : []));
    return both.length ? Math.max(...both) : Infinity;
  });
  return Math.max(...changes);
}

function size({ base, adapter }: Canary): number {
  return Math.max(...[...base, ...adapter].flatMap(({ numbers }) => numbers.map(Math.abs)));
}
