// src/errors.ts
var AdapterpackError = class extends Error {
  remedy;
  constructor(message, remedy = "") {
    super(remedy ? `${message}. ${remedy}.` : `${message}.`);
    this.name = new.target.name;
    this.remedy = remedy;
  }
};
var FormatError = class extends AdapterpackError {
};
var DigestMismatch = class extends AdapterpackError {
};
var BaseMismatch = class extends AdapterpackError {
};
var ParityError = class extends AdapterpackError {
};
var Unsupported = class extends AdapterpackError {
};
var UnknownAdapter = class extends AdapterpackError {
};
var ConfigError = class extends AdapterpackError {
};
var FetchError = class extends AdapterpackError {
};

// src/json.ts
var UTF8 = new TextDecoder("utf-8", { fatal: true });
function parseObject(bytes, where, most) {
  if (bytes.byteLength > most) throw new FormatError(`${where} is larger than ${most} bytes`);
  let value;
  try {
    value = JSON.parse(UTF8.decode(bytes));
  } catch (error) {
    throw new FormatError(`${where} is no JSON in UTF-8: ${error.message}`);
  }
  return asObject(value, where);
}
function asObject(value, where) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new FormatError(`${where} is no object`);
  return value;
}
function asList(value, where, most = 1 << 16) {
  if (!Array.isArray(value) || value.length > most) throw new FormatError(`${where} is no list of at most ${most} items`);
  return value;
}
function asText(value, where, most = 1024) {
  if (typeof value !== "string" || value.length > most) throw new FormatError(`${where} is no text of at most ${most} characters`);
  return value;
}
function asCount(value, where, most = Number.MAX_SAFE_INTEGER) {
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value > most) {
    throw new FormatError(`${where} is no whole number from 0 to ${most}`);
  }
  return value;
}
function asCounts(value, where, most = 8) {
  return asList(value, where, most).map((item) => asCount(item, where));
}
function asTexts(value, where, most = 1e4) {
  return value == null ? null : asList(value, where, most).map((item) => asText(item, where));
}

// src/safetensors.ts
var MAX_HEADER = 16 << 20;
var MAX_TENSORS = 5e4;
var WIDTHS = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1 };
function parseSafetensors(file, where) {
  if (file.byteLength < 10) throw new FormatError(`${where} is too short for a safetensors file`);
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = view.getBigUint64(0, true);
  if (length < 2n || length > BigInt(Math.min(MAX_HEADER, file.byteLength - 8))) throw new FormatError(`${where} has a header of ${length} bytes`);
  const start = 8 + Number(length);
  const header = parseObject(file.subarray(8, start), `the header of ${where}`, MAX_HEADER);
  const names = Object.keys(header).filter((name) => name !== "__metadata__");
  if (names.length > MAX_TENSORS) throw new FormatError(`${where} has more than ${MAX_TENSORS} tensors`);
  const tensors = /* @__PURE__ */ new Map();
  const spans = [];
  for (const name of names) {
    const place = `${where}, tensor ${name.slice(0, 200)}`;
    const entry = asObject(header[name], place);
    const [dtype, shape, offsets] = [asText(entry.dtype, place, 16), asCounts(entry.shape, place), asCounts(entry.data_offsets, place, 2)];
    const width = WIDTHS[dtype];
    const [from, to] = offsets;
    if (width === void 0) throw new FormatError(`${place} has the unknown type ${dtype}`);
    if (from === void 0 || to === void 0 || to < from || start + to > file.byteLength || countOf(shape) * width !== to - from) {
      throw new FormatError(`${place} does not fit its bytes`);
    }
    spans.push([from, to]);
    tensors.set(name, { dtype, shape, bytes: file.subarray(start + from, start + to) });
  }
  requireFilled(spans, file.byteLength - start, where);
  return tensors;
}
function asFloats(tensor, where) {
  const count = countOf(tensor.shape);
  const view = new DataView(tensor.bytes.buffer, tensor.bytes.byteOffset, tensor.bytes.byteLength);
  const read2 = READERS[tensor.dtype];
  if (!read2) throw new Unsupported(`${where} is of the type ${tensor.dtype}`, "Packs are loaded in the browser in F32, F16 or BF16");
  const floats = new Float32Array(count);
  for (let at = 0; at < count; at++) floats[at] = read2(view, at);
  if (!floats.every(Number.isFinite)) throw new FormatError(`${where} has a number that is not finite`);
  return floats;
}
var READERS = {
  F32: (view, at) => view.getFloat32(4 * at, true),
  F16: (view, at) => half(view.getUint16(2 * at, true)),
  BF16: (view, at) => {
    SCRATCH.setUint32(0, view.getUint16(2 * at, true) << 16);
    return SCRATCH.getFloat32(0);
  }
};
var SCRATCH = new DataView(new ArrayBuffer(4));
function half(bits) {
  const [sign, exponent, fraction] = [bits & 32768 ? -1 : 1, bits >> 10 & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
function countOf(shape) {
  return shape.reduce((product, extent) => product * extent, 1);
}
function requireFilled(spans, size2, where) {
  let end = 0;
  for (const [from, to] of spans.sort((one, other) => one[0] - other[0] || one[1] - other[1])) {
    if (from !== end) throw new FormatError(`${where} has tensors that overlap or leave holes`);
    end = to;
  }
  if (end !== size2) throw new FormatError(`${where} has ${size2 - end} bytes that belong to no tensor`);
}

// src/bank.ts
var ROOM = "Export the bundle with a larger --max-rank or with this adapter among the packs";
var ABSENT = -1e9;
function slotBytes(facts) {
  return Array.from(facts.slots.values()).reduce((total, { shape }) => total + 4 * shape.slice(1).reduce((product, extent) => product * extent, 1), 0);
}
function filled(pack, number, manifest, facts, files) {
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
function fillHead(bank, { path, tensors }) {
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
        bank.write(`${site}.head_bias`, { rows: 1, columns: tensor.shape[0], at: () => 0 }, 0, 0);
      }
    } else if (leaf === "bias" && tensor.shape.length === 1) {
      bank.clear(`${site}.head_bias`, ABSENT);
      bank.write(`${site}.head_bias`, { rows: 1, columns: floats.length, at: (_, column) => floats[column] }, 0, 0);
    } else {
      throw new Unsupported(`${path}.${param} is a trained module that is not made of linear layers`, "Export the pack with --mode folded");
    }
  }
}
function fillFactors(bank, { path, scale, tensors }, manifest) {
  const [down, up] = [tensors.get("lora_A"), tensors.get("lora_B")];
  if (!down || !up || tensors.size !== 2 || down.shape.length !== 2 || up.shape.length !== 2 || down.shape[0] !== up.shape[1]) {
    throw new Unsupported(`the change of ${path} is not of two factors`, "Export the bundle again with this adapter among the packs");
  }
  const rank = down.shape[0];
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
function transposed(tensor, floats) {
  const [rows, columns] = tensor.shape;
  return { rows: columns, columns: rows, at: (row, column) => floats[column * columns + row] };
}
var Bank = class {
  constructor(files, slots, number) {
    this.files = files;
    this.slots = slots;
    this.number = number;
  }
  files;
  slots;
  number;
  has(name) {
    return this.slots.has(name);
  }
  copyBase() {
    for (const [name, slot] of this.slots) this.numbers(name, this.number).set(this.numbers(name, 0, slot));
  }
  clear(name, value) {
    this.numbers(name, this.number).fill(value);
  }
  /** Writes a matrix with its first number at `row` and `column`; axes that are as wide as the site must be filled. */
  write(name, matrix, row, column, width) {
    const numbers = this.numbers(name, this.number);
    const shape = this.slot(name).shape.slice(1);
    const [rows, columns] = shape.length === 1 ? [1, shape[0]] : shape;
    const wide = name.endsWith(".up") ? (width ?? columns) === matrix.columns : name.endsWith("head_bias") || rows === matrix.rows;
    if (!wide) throw new ConfigError(`the pack was made for a layer of another width than ${name}`, "Use a bundle of the base that the pack names");
    if (row + matrix.rows > rows || column + matrix.columns > columns) throw new Unsupported(`the pack does not fit the slot ${name} of ${rows} \xD7 ${columns}`, ROOM);
    for (let at = 0; at < matrix.rows; at++) {
      for (let to = 0; to < matrix.columns; to++) numbers[(row + at) * columns + column + to] = matrix.at(at, to);
    }
  }
  numbers(name, number, slot = this.slot(name)) {
    const bytes = this.files.get(slot.file);
    if (!bytes) throw new FormatError(`the bank's file ${slot.file} is not among the bundle's`);
    const size2 = slot.shape.slice(1).reduce((product, extent) => product * extent, 1);
    return new Float32Array(bytes.buffer, bytes.byteOffset + slot.offset + 4 * size2 * number, size2);
  }
  slot(name) {
    const slot = this.slots.get(name);
    if (!slot) throw new Unsupported(`the graph has no slot for ${name}, which the pack changes`, "Export the bundle again with this adapter among the packs");
    return slot;
  }
};

// src/batch.ts
function int64(numbers, dims) {
  return { type: "int64", data: BigInt64Array.from(numbers, BigInt), dims };
}
function batch(rows, padId, inputs) {
  const width = Math.max(...rows.map((row) => row.ids.length));
  const dims = [rows.length, width];
  const wide = (numbers, fill) => [...numbers, ...Array(width - numbers.length).fill(fill)];
  const made = {
    input_ids: rows.flatMap((row) => wide(row.ids, padId)),
    attention_mask: rows.flatMap((row) => wide(row.ids.map(() => 1), 0)),
    token_type_ids: rows.flatMap((row) => wide(row.types, 0))
  };
  return Object.fromEntries(Object.entries(made).filter(([name]) => inputs.includes(name)).map(([name, numbers]) => [name, int64(numbers, dims)]));
}

// src/canary.ts
var MOST_IDS = 4096;
var VISIBLE = 2 ** -7;
function readCanary(value) {
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
function components(object, name) {
  return asList(object[name], `canary/${name}`, 64).map((item) => {
    const row = asObject(item, `canary/${name}`);
    const [ids, numbers] = [asCounts(row.ids, `canary/${name}/ids`, 64), asList(row.logits, `canary/${name}/logits`, 64).map(asNumber)];
    if (!ids.length || ids.length !== numbers.length) throw new FormatError(`canary/${name} has another number of ids than of logits`);
    return { ids, numbers };
  });
}
function asNumber(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new FormatError("canary holds what is no number");
  return value;
}
function requireCanary(canary, base, adapter) {
  if (base !== null && !(worst(canary.base, base) <= canary.tolerance)) {
    throw new BaseMismatch("the canary fails: this is not the base that the pack was made for", "Use a bundle of the base that the pack names");
  }
  const near = worst(canary.adapter, adapter) <= canary.tolerance;
  const same = base?.every((row, at) => row.every((number, place) => number === adapter[at]?.[place])) && effect(canary) > VISIBLE * size(canary);
  if (same || !near && worst(canary.base, adapter) <= canary.tolerance) throw new ParityError("the canary fails: the adapter has no effect");
  if (!near) throw new ParityError("the canary fails: the adapted model gives other numbers", "Fetch the pack again from where it comes");
}
function worst(expected, rows) {
  const errors = expected.flatMap(({ ids, numbers }, at) => ids.map((id, place) => Math.abs((rows[at]?.[id] ?? NaN) - numbers[place])));
  return errors.some(Number.isNaN) ? NaN : Math.max(...errors);
}
function effect({ base, adapter }) {
  const changes = adapter.map(({ ids, numbers }, at) => {
    const before = new Map(base[at].ids.map((id, place) => [id, base[at].numbers[place]]));
    const both = ids.flatMap((id, place) => before.has(id) ? [Math.abs(numbers[place] - before.get(id))] : []);
    return both.length ? Math.max(...both) : Infinity;
  });
  return Math.max(...changes);
}
function size({ base, adapter }) {
  return Math.max(...[...base, ...adapter].flatMap(({ numbers }) => numbers.map(Math.abs)));
}

// src/digest.ts
async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new Unsupported("this page cannot compare digests: browsers have WebCrypto on https and on localhost only", "Serve the site by https");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
async function requireDigest(bytes, expected, what, remedy) {
  const found = await sha256(bytes);
  const wanted = expected.replace(/^sha256:/, "");
  if (found !== wanted) throw new DigestMismatch(`${what} has the SHA-256 ${found.slice(0, 12)}\u2026, expected ${wanted.slice(0, 12)}\u2026`, remedy);
}

// src/fetching.ts
var FIRST = 1 << 20;
function below(folder, path, sha2562 = "") {
  const url = new URL(path, folder.endsWith("/") ? folder : `${folder}/`);
  if (sha2562) url.searchParams.set("sha256", sha2562.slice(0, 16));
  return url.href;
}
async function download(url, size2, most, heard = () => {
}) {
  let response;
  try {
    response = await fetch(url, { cache: size2 === null ? "no-cache" : "default" });
  } catch (error) {
    throw new FetchError(`${url} cannot be fetched: ${error.message}`, "See that the address is right and that its server allows this page to read it");
  }
  if (!response.ok) throw new FetchError(`${url} cannot be fetched: ${response.status} ${response.statusText}`);
  return read(response, size2, size2 ?? most, heard);
}
async function read(response, size2, room, heard) {
  let bytes = new Uint8Array(Math.min(room, FIRST));
  let length = 0;
  const reader = response.body?.getReader();
  for (; ; ) {
    const { done, value } = await reader?.read() ?? { done: true, value: void 0 };
    if (done || !value) break;
    if (length + value.byteLength > room) {
      await reader?.cancel();
      throw new FormatError(`${response.url} has more than ${room} bytes`);
    }
    if (length + value.byteLength > bytes.byteLength) {
      const wider = new Uint8Array(Math.min(room, 2 * (length + value.byteLength)));
      wider.set(bytes.subarray(0, length));
      bytes = wider;
    }
    bytes.set(value, length);
    length += value.byteLength;
    heard(value.byteLength);
  }
  if (size2 !== null && length !== size2) throw new FormatError(`${response.url} has ${length} bytes, where its manifest lists ${size2}`);
  return length === bytes.byteLength ? bytes : bytes.slice(0, length);
}

// src/scores.ts
var SCORES = {
  single_label_classification: (logits) => logits.length > 1 ? softmax(logits) : [logistic(logits[0])],
  multi_label_classification: (logits) => logits.map(logistic),
  regression: (logits) => logits
};
function scored(logits, labels, problem) {
  if (labels === null) return { label: null, scores: {} };
  const score = SCORES[problem];
  if (!score) throw new Unsupported(`this module does not read the logits of ${problem}`);
  const values = score(Array.from(logits.subarray(0, labels.length)), labels);
  const best = values.indexOf(Math.max(...values));
  return { label: labels[best] ?? null, scores: Object.fromEntries(labels.map((label, at) => [label, values[at]])) };
}
function softmax(logits) {
  const most = logits.reduce((one, other) => Math.max(one, other), -Infinity);
  const weights = logits.map((logit) => Math.exp(logit - most));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}
function logistic(logit) {
  return 1 / (1 + Math.exp(-logit));
}
var POOLING = {
  cls: (hidden, _, width) => hidden.slice(0, width),
  last: (hidden, length, width) => hidden.slice((length - 1) * width, length * width),
  mean: (hidden, length, width) => {
    const sums = new Float64Array(width);
    for (let at = 0; at < length * width; at++) sums[at % width] += hidden[at];
    return Float32Array.from(sums, (sum) => sum / length);
  }
};

// src/text_stream.ts
var BROKEN = "\uFFFD";
var TextStream = class {
  constructor(decode, stop) {
    this.decode = decode;
    this.stop = stop;
  }
  decode;
  stop;
  /** The text that is final. */
  text = "";
  /** Whether a stop text has come. */
  stopped = false;
  ids = [];
  /** Takes the next token; gives what became final with it. */
  push(id) {
    this.ids.push(id);
    const whole = this.decode(this.ids);
    return whole.endsWith(BROKEN) ? "" : this.add(whole, false);
  }
  /** Gives what was kept back: no token follows. */
  finish() {
    return this.stopped ? "" : this.add(this.decode(this.ids), true);
  }
  add(whole, last) {
    if (!whole.startsWith(this.text)) return "";
    const cuts = this.stop.filter(Boolean).map((stop) => whole.indexOf(stop)).filter((at) => at >= 0);
    this.stopped = cuts.length > 0;
    const kept = last ? 0 : Math.max(0, ...this.stop.map((stop) => overlap(whole, stop)));
    const end = this.stopped ? Math.min(...cuts) : whole.length - kept;
    const more = whole.slice(this.text.length, end);
    this.text += more;
    return more;
  }
};
function overlap(text, stop) {
  for (let size2 = Math.min(stop.length - 1, text.length); size2 > 0; size2--) if (text.endsWith(stop.slice(0, size2))) return size2;
  return 0;
}

// src/generate.ts
var PAST = "past_key_values.";
var PRESENT = "present.";
async function* generated(prompt, how, sampling) {
  const { maxNewTokens = 256, temperature = 0, stop = [], signal } = sampling;
  if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) throw new ConfigError("maxNewTokens is no whole number from 1");
  if (!(temperature >= 0)) throw new ConfigError("temperature is no number from 0");
  const room = how.context === null ? maxNewTokens : Math.min(maxNewTokens, how.context - prompt.length + 1);
  const stream = new TextStream(how.decode, typeof stop === "string" ? [stop] : stop);
  let cache = empty(how.ports);
  let [tokens, past] = [prompt, 0];
  try {
    for (let count = 0; count < room; count++) {
      signal?.throwIfAborted();
      const outputs = await pass(tokens, past, cache, how);
      past += tokens.length;
      dispose(cache);
      cache = grown(outputs);
      const token = chosen(await lastLogits(outputs.logits), temperature);
      if (how.ends.includes(token)) break;
      const piece = stream.push(token);
      if (piece) yield piece;
      if (stream.stopped) return;
      tokens = [token];
    }
    const rest = stream.finish();
    if (rest) yield rest;
  } finally {
    dispose(cache);
  }
}
async function prefilled(prompt, how) {
  const outputs = await pass(prompt, 0, empty(how.ports), how);
  dispose(outputs);
  return lastLogits(outputs.logits);
}
function pass(tokens, past, cache, how) {
  const length = tokens.length;
  const slot = how.slot();
  const feeds = {
    input_ids: int64(tokens, [1, length]),
    attention_mask: int64(Array(past + length).fill(1), [1, past + length]),
    position_ids: int64(tokens.map((_, at) => past + at), [1, length]),
    adapter_ids: slot,
    ...cache
  };
  const wanted = Object.entries(feeds).filter(([name, value]) => value !== null && how.graph.inputs.includes(name));
  return how.graph.run(Object.fromEntries(wanted));
}
function empty(ports) {
  const cache = ports.filter((port) => port.name.startsWith(PAST));
  return Object.fromEntries(cache.map((port) => [port.name, { type: "float32", data: new Float32Array(0), dims: [1, Number(port.shape[1]), 0, Number(port.shape[3])] }]));
}
function grown(outputs) {
  return Object.fromEntries(Object.entries(outputs).filter(([name]) => name.startsWith(PRESENT)).map(([name, value]) => [PAST + name.slice(PRESENT.length), value]));
}
function dispose(cache) {
  for (const value of Object.values(cache)) if ("location" in value && value.location === "gpu-buffer") value.dispose();
}
async function lastLogits(logits) {
  const data = await logits.getData();
  return data.subarray(data.length - logits.dims[2]);
}
function chosen(logits, temperature) {
  let best = 0;
  for (let at = 1; at < logits.length; at++) if (logits[at] > logits[best]) best = at;
  if (!temperature) return best;
  const chances = softmax(Array.from(logits, (logit) => logit / temperature));
  let left = crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32;
  for (const [token, chance] of chances.entries()) {
    left -= chance;
    if (left < 0) return token;
  }
  return best;
}

// src/graph.ts
var CACHE = /^present\./;
async function chosenProvider(asked) {
  if (asked === "wasm") return "wasm";
  const gpu = globalThis.navigator?.gpu;
  const found = await gpu?.requestAdapter().catch(() => null);
  if (!found && asked === "webgpu") throw new Unsupported("this browser has no WebGPU here", "Leave the provider out: WebAssembly runs everywhere");
  return found ? "webgpu" : "wasm";
}
var Graph = class _Graph {
  constructor(ort, session, provider, outputs) {
    this.ort = ort;
    this.session = session;
    this.provider = provider;
    this.outputs = outputs;
  }
  ort;
  session;
  provider;
  outputs;
  line = Promise.resolve();
  /** Opens a graph of these bytes, with the files of its weights by name. */
  static async open(provider, graph, data, outputs) {
    const ort = await (provider === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"));
    return new _Graph(ort, await openSession(ort, provider, graph, data, outputs), provider, outputs);
  }
  /** Opens it anew with other weights. The old session ends first, since two would need twice the memory. */
  async reopen(graph, data) {
    await this.alone(async () => {
      await this.session.release();
      this.session = await openSession(this.ort, this.provider, graph, data, this.outputs);
    });
  }
  /** Names of the inputs that must be fed. */
  get inputs() {
    return this.session.inputNames;
  }
  /** Runs one pass. */
  run(feeds) {
    return this.alone(async () => {
      const tensors = Object.entries(feeds).map(([name, value]) => [name, "dims" in value && "location" in value ? value : this.tensor(value)]);
      return await this.session.run(Object.fromEntries(tensors));
    });
  }
  /** Ends the session. */
  async close() {
    await this.alone(() => this.session.release());
  }
  tensor({ type, data, dims }) {
    return new this.ort.Tensor(type, data, dims);
  }
  alone(work) {
    const done = this.line.then(work);
    this.line = done.catch(() => {
    });
    return done;
  }
};
async function openSession(ort, provider, graph, data, outputs) {
  const onGpu = outputs.map((port) => port.name).filter((name) => CACHE.test(name));
  const locations = provider === "webgpu" && onGpu.length ? { preferredOutputLocation: Object.fromEntries(onGpu.map((name) => [name, "gpu-buffer"])) } : {};
  const extra = provider === "wasm" ? { extra: { session: { disable_quant_qdq: "1" } } } : {};
  try {
    return await ort.InferenceSession.create(graph, {
      executionProviders: [provider],
      logSeverityLevel: 3,
      externalData: Array.from(data, ([path, bytes]) => ({ path, data: bytes })),
      ...locations,
      ...extra
    });
  } catch (error) {
    throw new FormatError(`ONNX Runtime cannot open the bundle's graph: ${error.message}`, "Export the site again, or choose another provider");
  }
}

// src/manifest.ts
var MANIFEST = "adapterpack.bundle.json";
var FACTS = "web.json";
var MAX_BYTES = 2 ** 32;
function readManifest(value) {
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
    sites: readSites(value.sites)
  };
}
function readFacts(value, manifest) {
  const sizes = new Map(manifest.files.map((file) => [file.path, file.size]));
  const slots = /* @__PURE__ */ new Map();
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
    problems: texts(value.problems, "problems")
  };
}
function texts(value, where) {
  return Object.fromEntries(Object.entries(asObject(value, where)).map(([name, text]) => [name, asText(text, `${where}/${name}`)]));
}
function readFile(value) {
  const entry = asObject(value, "files");
  const path = asText(entry.path, "files/path", 255);
  const sha2562 = asText(entry.sha256, "files/sha256", 64);
  if (!/^\w[\w.-]{0,127}(\/\w[\w.-]{0,127}){0,3}$/.test(path)) throw new FormatError(`the path ${JSON.stringify(path)} may not be in a bundle`);
  if (!/^[0-9a-f]{64}$/.test(sha2562)) throw new FormatError(`the digest of ${path} is no SHA-256`);
  return { path, size: asCount(entry.size, `the size of ${path}`, MAX_BYTES), sha256: sha2562 };
}
function readBase(value) {
  const base = asObject(value, "base");
  const level = (name) => base[name] == null ? null : asText(base[name], `base/${name}`);
  return { name: level("name"), structure: level("structure"), content: level("content"), files: level("files"), probe: level("probe") };
}
function readPort(value) {
  const port = asObject(value, "io");
  const shape = asList(port.shape, "io/shape", 8).map((extent) => typeof extent === "number" ? asCount(extent, "io/shape") : extent === null ? null : asText(extent, "io/shape"));
  return { name: asText(port.name, "io/name"), dtype: asText(port.dtype, "io/dtype", 32), shape };
}
function readAdapter(value) {
  const adapter = asObject(value, "adapters");
  return {
    name: asText(adapter.name, "adapters/name", 128),
    pack: asText(adapter.pack, "adapters/pack", 71),
    slot: adapter.slot == null ? null : asCount(adapter.slot, "adapters/slot", 4095),
    labels: asTexts(adapter.labels, "adapters/labels")
  };
}
function readSites(value) {
  const sites = /* @__PURE__ */ new Map();
  for (const [path, entry] of Object.entries(asObject(value, "sites"))) {
    const site = asObject(entry, `sites/${path}`);
    const members = asTexts(site.members ?? [], "sites/members", 64) ?? [];
    sites.set(path, { dtype: asText(site.dtype ?? "float32", "sites/dtype", 16), members, outFeatures: asCount(site.out_features, "sites/out_features") });
  }
  return sites;
}

// src/seal.ts
var BEFORE = new TextEncoder().encode('\n  "integrity": "');
var DIGITS = 64;
var FIRST_MINOR = 4;
async function requireSeal(bytes, version, where) {
  if (Number(version.split(".")[1]) < FIRST_MINOR) return;
  const end = indexOf(bytes, BEFORE) + BEFORE.length;
  const said = new TextDecoder().decode(bytes.subarray(end, end + DIGITS));
  const rest = new Uint8Array(Math.max(0, bytes.length - DIGITS));
  rest.set(bytes.subarray(0, Math.min(end, rest.length)));
  rest.set(bytes.subarray(end + DIGITS), Math.min(end, rest.length));
  if (said !== await sha256(rest)) throw new DigestMismatch(`${where} is not the one that was written: a byte of it was changed`, "Fetch the pack again from where it comes, and do not use this one");
}
function indexOf(bytes, wanted) {
  for (let at = bytes.indexOf(wanted[0]); at >= 0; at = bytes.indexOf(wanted[0], at + 1)) {
    if (wanted.every((byte, place) => bytes[at + place] === byte)) return at;
  }
  return -wanted.length;
}

// src/pack.ts
var PACK = "adapterpack.json";
var TENSORS = "adapter_model.safetensors";
var MAX_MANIFEST = 16 << 20;
var FETCH_AGAIN = "Fetch the pack again from where it comes, and do not use this one";
var AMONG = "Export the bundle again with this adapter among the packs";
async function readPack(source, digest, most) {
  const file = typeof source === "string" || source instanceof URL ? fetched(new URL(String(source), globalThis.location?.href).href) : picked(source);
  const bytes = await file(PACK, MAX_MANIFEST, null);
  if (digest !== void 0) await requireDigest(bytes, digest, "the pack's manifest", FETCH_AGAIN);
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
function requireBase(pack, base) {
  const equal = (level) => {
    const [one, other] = [pack.base[level], base[level]];
    return one === null || other === null || one.split(":")[0] !== other.split(":")[0] ? null : one === other;
  };
  if (![pack.base.structure, pack.base.content, pack.base.files, pack.base.probe].some((level) => level !== null)) return;
  const content = equal("content");
  if (content || content === null && (equal("files") || equal("probe") && equal("structure") !== false)) return;
  throw new BaseMismatch(`the pack was made for the base ${pack.base.name ?? "without a name"}, and the bundle's is ${base.name ?? "another"}`, "Use a bundle of the base that the pack names");
}
function readHead(manifest) {
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
    canary: readCanary(manifest.canary)
  };
}
async function readChanges(manifest, tensors) {
  const changes = /* @__PURE__ */ new Map();
  for (const value of asList(manifest.groups, "groups", 5e4)) {
    const group = asObject(value, "groups");
    const [path, role, kind] = [asText(group.path, "groups/path", 512), asText(group.role, "groups/role", 16), asText(group.kind, "groups/kind", 32)];
    if (role !== "full" && (role !== "adapter" || kind !== "linear" || group.method != null)) throw new Unsupported(`the pack changes ${path}, which is ${kind}`, AMONG);
    const scale = group.scale ?? 1;
    if (typeof scale !== "number" || !Number.isFinite(scale)) throw new FormatError(`the scale of ${path} is no number`);
    if (changes.has(path)) throw new FormatError(`${path} stands twice in ${PACK}`);
    changes.set(path, { path, full: role === "full", scale, tensors: /* @__PURE__ */ new Map() });
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
function fetched(folder) {
  return (name, most, listed) => download(below(folder, name, listed?.sha256), listed?.size ?? null, most);
}
function picked(source) {
  const files = new Map(Array.from(source, (file) => [file.name, file]));
  return async (name, most, listed) => {
    const file = files.get(name);
    if (!file) throw new ConfigError(`the pack's file ${name} is missing`, `Choose both: ${PACK} and ${TENSORS}`);
    if (file.size > most || listed !== null && file.size !== listed.size) throw new FormatError(`${name} has ${file.size} bytes, expected ${listed?.size ?? `at most ${most}`}`, FETCH_AGAIN);
    return new Uint8Array(await file.arrayBuffer());
  };
}

// src/texts.ts
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
var Texts = class {
  constructor(tokenizer, config, facts) {
    this.facts = facts;
    try {
      this.tokenizer = new Tokenizer(tokenizer, config);
    } catch (error) {
      throw new FormatError(`the bundle's tokenizer cannot be used: ${error.message}`);
    }
  }
  facts;
  tokenizer;
  template = null;
  /** A text, or a pair of texts, as a row that fits the model. */
  encode(text, pair, special = true) {
    if (typeof text !== "string") throw new ConfigError("a row has no text");
    const encoded = this.tokenizer.encode(text, { text_pair: pair ?? null, add_special_tokens: special, return_token_type_ids: true });
    const ids = encoded.ids;
    if (!ids.length) throw new ConfigError(`the text ${JSON.stringify(text).slice(0, 80)} has no tokens`);
    if (this.facts.context !== null && ids.length > this.facts.context) {
      throw new ConfigError(`a text has ${ids.length} tokens, and the model takes ${this.facts.context}`, "Shorten it");
    }
    return { ids, types: encoded.token_type_ids ?? ids.map(() => 0) };
  }
  /** The ids of a prompt: a text becomes one user message, and the chat template renders messages, where the bundle has one. */
  prompt(prompt) {
    const messages = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
    if (this.facts.template === null) return this.encode(messages.map((message) => message.content).join("\n")).ids;
    let text;
    try {
      this.template ??= new Template(this.facts.template);
      text = this.template.render({ messages, add_generation_prompt: true, ...this.facts.special });
    } catch (error) {
      throw new FormatError(`the bundle's chat template fails on these messages: ${error.message}`);
    }
    return this.encode(text, void 0, false).ids;
  }
  /** The text of ids, without special tokens. */
  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
};

// src/bundle.ts
var MAX_MANIFEST2 = 16 << 20;
var AGAIN = "Publish the bundle again: a file of it was altered or is half copied";
var PLAIN = "single_label_classification";
var Bundle = class {
  /** @internal */
  constructor(digest, manifest, facts, texts2, graph, model, weights, bank, known) {
    this.digest = digest;
    this.manifest = manifest;
    this.facts = facts;
    this.texts = texts2;
    this.graph = graph;
    this.model = model;
    this.weights = weights;
    this.bank = bank;
    this.known = known;
  }
  digest;
  manifest;
  facts;
  texts;
  graph;
  model;
  weights;
  bank;
  known;
  /** The adapters that rows can name: name, digest of the pack, labels. */
  get adapters() {
    return this.known;
  }
  /** What the bundle does: `text-classification`, `feature-extraction` or `text-generation`. */
  get task() {
    return this.manifest.task;
  }
  /** The base's name. */
  get base() {
    return this.manifest.base.name ?? "base";
  }
  /** What runs it: `webgpu` or `wasm`. */
  get provider() {
    return this.graph.provider;
  }
  /** Whether the base answers by itself: a classifier without a trained head has no labels. */
  get baseAnswers() {
    return this.manifest.mode !== "folded" && (this.task !== "text-classification" || this.manifest.baseHeadTrained);
  }
  /** How many further packs fit into the bank. */
  get freeSlots() {
    return Math.max(0, this.manifest.slots - 1 - this.known.length);
  }
  /**
   * The label of each row and the probability of each label, all rows in one batch, each with its own adapter.
   *
   * @example `await bundle.classify([{ text: "It leaks.", adapter: "tickets" }, { text: "It leaks." }])`
   */
  async classify(rows) {
    this.requireTask("text-classification");
    if (!rows.length) return [];
    const { logits } = await this.pass(rows);
    const data = await logits?.getData();
    const width = data.length / rows.length;
    return rows.map(({ adapter }, row) => scored(data.subarray(row * width, (row + 1) * width), this.labels(adapter), this.problem(adapter)));
  }
  /** The embedding of each row, pooled as the bundle says. */
  async embed(rows) {
    this.requireTask("feature-extraction");
    if (!rows.length) return [];
    const encoded = rows.map(({ text, textPair }) => this.texts.encode(text, textPair));
    const hidden = Object.values(await this.pass(rows))[0];
    const [data, [, length, width]] = [await hidden.getData(), hidden.dims];
    const pool = POOLING[this.manifest.pooling];
    if (!pool) throw new Unsupported(`this module does not pool by ${this.manifest.pooling}`);
    return encoded.map(({ ids }, row) => pool(data.subarray(row * length * width, (row + 1) * length * width), ids.length, width));
  }
  /** One pass of the graph: inputs by name, the adapter of each row, outputs by name. */
  async run(inputs, adapters) {
    return this.graph.run({ ...inputs, ...this.ids(adapters) });
  }
  /**
   * An answer, piece by piece, to a text (one user message, where the bundle has a chat template) or to messages.
   *
   * @example `for await (const text of bundle.generate("Where is my order?", { adapter: "orders" })) show(text);`
   */
  generate(prompt, options = {}) {
    this.requireTask("text-generation");
    const { adapter = null, ...sampling } = options;
    const slot = () => this.ids([adapter]).adapter_ids ?? null;
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
  async load(source, { name, digest } = {}) {
    if (this.manifest.mode !== "bank") throw new Unsupported(`a bundle of the mode ${this.manifest.mode} takes no further packs`, "Export it with --mode bank");
    const pack = await readPack(source, digest, slotBytes(this.facts) + MAX_MANIFEST2);
    requireBase(pack, this.manifest.base);
    if (pack.task !== this.task && pack.task !== "other") throw new Unsupported(`the pack is for ${pack.task}, and the bundle for ${this.task}`);
    return this.alone(async () => {
      const called = name ?? pack.name;
      if (this.known.some((adapter2) => adapter2.name === called)) throw new ConfigError(`the bundle already has an adapter ${called}`, "Choose another name");
      const taken = new Set(this.known.map((adapter2) => adapter2.slot));
      const free = Array.from({ length: this.manifest.slots }, (_, slot) => slot).find((slot) => slot > 0 && !taken.has(slot));
      if (free === void 0) throw new Unsupported(`no slot is free: the bank has ${this.manifest.slots - 1} for adapters`, "Unload one, or export the bundle with more --slots");
      const before = this.bank;
      await this.reopen(filled(pack, free, this.manifest, this.facts, before));
      let note;
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
  unload(name) {
    this.slot(name);
    this.known = this.known.filter((adapter) => adapter.name !== name);
  }
  /** Ends the session and gives its memory back. */
  close() {
    return this.graph.close();
  }
  /** Replays the canary of a pack in a slot; why not, if it is not. */
  async replayed({ canary, changes }, slot) {
    if (canary === null) return "the pack carries no canary";
    if (this.manifest.quantized) return "the graph is quantized, and it is not known by how much that moves its outputs";
    const rows = async (number) => {
      const given = [];
      for (const ids of canary.rows) given.push(await this.last(ids, number));
      return given;
    };
    requireCanary(canary, changes.some((change) => change.full) ? null : await rows(0), await rows(slot));
    return null;
  }
  /** What a canary knows of one row of ids: its logits, or its last hidden state. */
  async last(ids, slot) {
    if (this.task === "text-generation") return prefilled(ids, this.decoding(() => this.slots([slot]).adapter_ids ?? null));
    const row = batch([{ ids, types: ids.map(() => 0) }], this.facts.padId, this.graph.inputs);
    const outputs = await this.graph.run({ ...row, ...this.slots([slot]) });
    const output = outputs.logits ?? outputs.last_hidden_state ?? Object.values(outputs)[0];
    const data = await output.getData();
    return data.subarray(data.length - output.dims.at(-1));
  }
  decoding(slot) {
    return { graph: this.graph, ports: this.manifest.inputs, ends: this.facts.ends, context: this.facts.context, decode: (ids) => this.texts.decode(ids), slot };
  }
  loading = Promise.resolve();
  alone(work) {
    const done = this.loading.then(work);
    this.loading = done.catch(() => {
    });
    return done;
  }
  /** Opens the graph with another bank; where that fails it is as it was. */
  async reopen(bank) {
    try {
      await this.graph.reopen(this.model, new Map([...this.weights, ...bank]));
      this.bank = bank;
    } catch (error) {
      await this.graph.reopen(this.model, new Map([...this.weights, ...this.bank]));
      throw error;
    }
  }
  pass(rows) {
    const encoded = rows.map(({ text, textPair }) => this.texts.encode(text, textPair));
    return this.run(batch(encoded, this.facts.padId, this.graph.inputs), rows.map(({ adapter }) => adapter ?? null));
  }
  ids(adapters) {
    return this.slots(adapters.map((adapter) => adapter === null ? 0 : this.slot(adapter)));
  }
  slots(slots) {
    return this.graph.inputs.includes("adapter_ids") ? { adapter_ids: int64(slots, [slots.length]) } : {};
  }
  slot(name) {
    const adapter = this.known.find((one) => one.name === name);
    if (!adapter) throw new UnknownAdapter(`the bundle has no adapter ${JSON.stringify(name)}`, `It has ${this.known.map((one) => one.name).join(", ") || "none"}`);
    return adapter.slot ?? 0;
  }
  labels(name) {
    const own = name == null && this.manifest.mode !== "folded" ? null : (this.known.find((one) => one.name === name) ?? this.known[0])?.labels;
    return own ?? (this.manifest.baseHeadTrained ? this.manifest.baseLabels : null);
  }
  problem(name) {
    const own = this.known.find((one) => one.name === name);
    return own?.labels ? this.facts.problems[own.name] ?? PLAIN : this.manifest.baseProblem;
  }
  requireTask(task) {
    if (this.task !== task) throw new Unsupported(`this bundle is for ${this.task}, not for ${task}`);
  }
};
async function open(url, options = {}) {
  const { verify = "full", provider = "auto", digest, progress = () => {
  } } = options;
  if (!["full", "off"].includes(verify)) throw new ConfigError(`verify is full or off, not ${String(verify)}`);
  if (!["auto", "webgpu", "wasm"].includes(provider)) throw new ConfigError(`provider is auto, webgpu or wasm, not ${String(provider)}`);
  const folder = new URL(String(url), globalThis.location?.href).href;
  const bytes = await download(below(folder, MANIFEST), null, MAX_MANIFEST2);
  if (digest !== void 0) await requireDigest(bytes, digest, MANIFEST, "The bundle is not the one that this page was made for");
  const manifest = readManifest(parseObject(bytes, MANIFEST, MAX_MANIFEST2));
  const runs = await chosenProvider(provider);
  const files = new Downloads(folder, manifest, verify === "full", progress);
  const facts = readFacts(await files.object(FACTS), manifest);
  const graph = runs === "wasm" && facts.wasmGraph !== null ? facts.wasmGraph : "model.onnx";
  const banks = new Set(Array.from(facts.slots.values(), (slot) => slot.file));
  const data = manifest.files.map((file) => file.path).filter((path) => path.endsWith(".onnx.data"));
  files.expect([graph, "tokenizer.json", "tokenizer_config.json", ...data]);
  const [tokenizer, config, model] = [await files.object("tokenizer.json"), await files.object("tokenizer_config.json", true), await files.bytes(graph)];
  const [weights, bank] = [/* @__PURE__ */ new Map(), /* @__PURE__ */ new Map()];
  for (const path of data) (banks.has(path) ? bank : weights).set(path, await files.bytes(path));
  const texts2 = new Texts(tokenizer, config, facts);
  const open2 = await Graph.open(runs, model, new Map([...weights, ...bank]), manifest.outputs);
  return new Bundle(`sha256:${await sha256(bytes)}`, manifest, facts, texts2, open2, model, weights, bank, manifest.adapters);
}
var Downloads = class {
  constructor(folder, manifest, verify, progress) {
    this.folder = folder;
    this.manifest = manifest;
    this.verify = verify;
    this.progress = progress;
  }
  folder;
  manifest;
  verify;
  progress;
  done = 0;
  total = 0;
  expect(paths) {
    this.total = this.manifest.files.filter((file) => paths.includes(file.path)).reduce((sum, file) => sum + file.size, this.done);
  }
  async bytes(path) {
    const entry = this.manifest.files.find((file) => file.path === path);
    if (!entry) throw new Unsupported(`the bundle's manifest lists no ${path}`, "Make it ready for browsers: adapterpack export BUNDLE --target web -o SITE");
    const bytes = await download(below(this.folder, path, entry.sha256), entry.size, entry.size, (more) => this.progress(this.done += more, Math.max(this.total, this.done)));
    if (this.verify) await requireDigest(bytes, entry.sha256, path, AGAIN);
    return bytes;
  }
  async object(path, optional = false) {
    if (optional && !this.manifest.files.some((file) => file.path === path)) return {};
    const bytes = await this.bytes(path);
    return parseObject(bytes, path, 1 << 27);
  }
};
export {
  AdapterpackError,
  BaseMismatch,
  Bundle,
  ConfigError,
  DigestMismatch,
  FetchError,
  FormatError,
  ParityError,
  UnknownAdapter,
  Unsupported,
  open
};
