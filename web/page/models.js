// The base and its adapters: what each is, and what it has done; for an operator also the packs that were refused.

import { at, digestButton, el } from "./elements.js";
import { bytes, count } from "./numbers.js";

const ROWS = 20;
const FEW = 8;

/** Each column: its heading, the cell of a model, whether it is a number or a word (which is never broken), and what a model has where it is shown. */
const COLUMNS = [
  { name: "Name", cell: (model) => el("strong", {}, model.name) },
  { name: "Digest", word: true, cell: (model) => digestButton(model.digest) },
  { name: "Kind", word: true, of: "counts", cell: ({ adapter }) => (adapter ? adapter.method : "base") },
  { name: "Rank", of: "counts", number: true, cell: ({ adapter }) => (adapter?.ranks ? [...new Set(adapter.ranks)].join("–") : "") },
  { name: "Acts in", of: "counts", cell: ({ adapter }) => (adapter ? `${adapter.modules.join(", ")} (${count(adapter.sites)})` : "") },
  { name: "Size", of: "counts", number: true, cell: ({ adapter }) => (adapter ? bytes(adapter.bytes) : "") },
  { name: "Where", of: "resident", word: true, cell: ({ adapter, resident }) => (adapter ? (resident ? "in memory" : "on disk") : "") },
  { name: "Generation", of: "counts", number: true, cell: ({ generation }) => generation ?? "" },
  { name: "Requests", of: "counts", number: true, cell: ({ counts }) => count(counts.requests) },
  { name: "Tokens", of: "counts", number: true, cell: ({ counts }) => count(counts.prompt_tokens + counts.completion_tokens) },
  { name: "Labels", of: "labels", cell: ({ labels }) => labels.slice(0, 8).join(", ") },
  { name: "", of: "removable", cell: ({ name, removable }, unload) => removable && el("button", { type: "button", class: "plain", "aria-label": `Unload ${name}`, onclick: () => unload(name) }, "Unload") },
];

const REFUSED = [
  { name: "Pack", cell: (pack) => el("strong", {}, pack.source) },
  { name: "Reason", cell: (pack) => pack.message },
  { name: "Code", word: true, cell: (pack) => pack.reason },
  { name: "When", word: true, cell: (pack) => new Date(pack.time).toLocaleString() },
];

export class Models {
  /** `unload` forgets the adapter of a name. */
  constructor(unload) {
    this.unload = unload;
    this.listed = { models: [] };
    this.find = el("input", { id: "find", type: "search", oninput: () => this.fill() });
    this.finder = el("div", { class: "field find" }, el("label", { for: "find" }, "Find"), this.find);
    this.table = el("div");
    at("models").replaceChildren(this.finder, this.table);
  }

  /** What the backend lists now. */
  show(listed) {
    this.listed = listed;
    this.finder.hidden = listed.models.length <= FEW;
    this.fill();
    const refused = listed.refused ?? [];
    at("refused").hidden = !refused.length;
    at("refused-list").replaceChildren(table("Refused packs", REFUSED, refused));
  }

  get adapters() {
    return this.listed.models.filter((model) => model.adapter).length;
  }

  fill() {
    const { models } = this.listed;
    const wanted = this.find.value.trim().toLowerCase();
    const found = models.filter((model) => `${model.name} ${model.digest}`.toLowerCase().includes(wanted));
    const columns = COLUMNS.filter(({ of }) => !of || models.some((model) => of in model));
    const left = found.length > ROWS ? [el("p", { class: "note" }, `The first ${ROWS} of ${count(found.length)}: type a part of a name or a digest above.`)] : [];
    const none = found.length || !wanted ? [] : [el("p", { class: "note" }, "No name or digest has that in it.")];
    const rows = found.length ? [table("Adapters", columns, found.slice(0, ROWS), this.unload)] : [];
    const focused = this.table.contains(document.activeElement) && document.activeElement.title;
    this.table.replaceChildren(...(this.adapters ? [] : [empty(this.listed)]), ...rows, ...left, ...none);
    if (focused) [...this.table.querySelectorAll("button")].find((button) => button.title === focused)?.focus({ preventScroll: true });
  }
}

function empty({ empty: words, refused }) {
  if (words) return el("p", { class: "note" }, words);
  if (!refused) return el("p", {}, "This key may name no adapter. Ask whoever runs the server, or wait until one is loaded.");
  return el("div", {}, el("p", {}, "There is no adapter yet. Start the server with one, or with a folder that it watches, into which you copy packs:"),
    el("pre", {}, el("code", {}, "adapterpack serve BUNDLE --adapters PACK\nadapterpack serve BUNDLE --adapters FOLDER --watch 2")));
}

/** A table that becomes a list of cards on a narrow screen; the roles keep it a table for those who do not see it. */
function table(caption, columns, rows, unload) {
  const style = (column) => ({ class: column.number ? "number" : column.word ? "word" : null });
  const head = el("tr", { role: "row" }, ...columns.map((column) => el("th", { scope: "col", role: "columnheader", ...style(column) }, column.name)));
  const body = rows.map((row) => el("tr", { role: "row" }, ...columns.map((column) => el("td", { role: "cell", "data-name": column.name, ...style(column) }, column.cell(row, unload) || null))));
  const whole = el("table", { role: "table", "aria-label": caption }, el("thead", { role: "rowgroup" }, head), el("tbody", { role: "rowgroup" }, ...body));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, whole);
}
