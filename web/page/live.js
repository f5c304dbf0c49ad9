// What the server does now: a few figures with charts of the last minutes, as long as the page has been open.

import { at, el } from "./elements.js";
import { chart } from "./charts.js";
import { bytes, count, counted, percent, rough, seconds } from "./numbers.js";

const MOST = 150;
const NOTHING = "–";

/** Each card: its label, the value of a sample (with the one before), what stands below, and the values of its chart's lines. */
const CARDS = [
  {
    label: ({ text }) => (text ? "Tokens written a second" : "Tokens read a second"),
    lines: (now, before) => [rate(now, before, now.text ? "completion_tokens" : "prompt_tokens")],
    value: ([speed]) => (speed == null ? NOTHING : rough(speed)),
    note: ({ counts }) => [`${counted(counts.completion_tokens + counts.prompt_tokens, "token")} so far`],
  },
  {
    label: () => "Running answers",
    lines: (now) => [now.running, now.waiting],
    value: ([running]) => count(running),
    note: ({ waiting, counts }) => [dash(), `${count(waiting)} waiting; ${counted(counts.requests, "request")} so far`],
  },
  {
    label: ({ text }) => (text ? "First token, median" : "Answer, median"),
    lines: (now) => [now.wait?.p50, now.wait?.p95],
    value: ([middle]) => (middle == null ? NOTHING : seconds(middle)),
    note: ({ wait }) => (wait ? [dash(), `95 % within ${seconds(wait.p95)}; last 5 minutes`] : ["no request in the last 5 minutes"]),
  },
  {
    label: () => "Prompts known already",
    shown: ({ engine }) => engine && "prompt_tokens_reused" in engine,
    lines: (now, before) => [reuse(now, before)],
    value: (lines, { engine }) => {
      const all = engine.prompt_tokens_read + engine.prompt_tokens_reused;
      return all ? percent(engine.prompt_tokens_reused / all) : NOTHING;
    },
    note: ({ engine }) => [`${counted(engine.prompt_tokens_reused, "token")} not read again`],
  },
  {
    label: () => "Rows a pass",
    shown: ({ engine }) => engine && "passes" in engine,
    lines: (now, before) => [quotient(now, before, "passed_rows", "passes")],
    value: (lines, { engine }) => (engine.passes ? rough(engine.passed_rows / engine.passes) : NOTHING),
    note: ({ engine }) => [`${counted(engine.passes, "pass", "passes")} so far`],
  },
  {
    label: () => "Adapters in memory",
    shown: ({ engine }) => engine,
    lines: (now) => [now.engine.resident_bytes],
    value: (lines, { engine }) => count(engine.resident_adapters),
    note: ({ engine }) => [bytes(engine.resident_bytes)],
  },
];

export class Live {
  constructor() {
    this.samples = [];
  }

  /** One more status of the server; `text` says whether it writes text. */
  add(status, text) {
    this.samples.push({ ...status, text });
    if (this.samples.length > MOST) this.samples.shift();
    at("live-note").textContent = status.of === "all" ? "All keys together; the charts begin when this page was opened." : "Your key alone; the charts begin when this page was opened.";
    at("live").replaceChildren(...CARDS.filter((card) => !card.shown || card.shown(status)).map((card) => this.card(card)));
  }

  card(card) {
    const now = this.samples.at(-1);
    const points = this.samples.map((sample, place) => card.lines(sample, this.samples[place - 1]));
    const label = card.label(now);
    const value = card.value(points.at(-1), now);
    const note = el("span", { class: "note" }, ...card.note(now));
    const lines = points[0].map((_, line) => points.map((point) => point[line] ?? null));
    return el("li", {}, el("span", { class: "label" }, label), el("strong", {}, value), note, chart(lines, `${label} over time, now ${value}; ${note.textContent}`));
  }
}

/** What the dashed line of a chart is. */
function dash() {
  return el("span", { class: "dash", "aria-hidden": "true" }, "╌ ");
}

function rate(now, before, name) {
  const more = before && now.counts[name] - before.counts[name];
  return before && more >= 0 && now.time > before.time ? more / (now.time - before.time) : null; // a server may start anew
}

function reuse(now, before) {
  if (!before) return null;
  const reused = now.engine.prompt_tokens_reused - before.engine.prompt_tokens_reused;
  const read = now.engine.prompt_tokens_read - before.engine.prompt_tokens_read;
  return reused + read > 0 ? reused / (reused + read) : null;
}

function quotient(now, before, name, by) {
  if (!before) return null;
  const more = now.engine[by] - before.engine[by];
  return more > 0 ? (now.engine[name] - before.engine[name]) / more : null;
}
