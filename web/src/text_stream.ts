// Turns a row's tokens into text; what was given out is never taken back.

const BROKEN = "\uFFFD";

/** The text of one answer, token by token. A stop text ends it and is cut off; what may be the beginning of one is kept back. */
export class TextStream {
  /** The text that is final. */
  text = "";
  /** Whether a stop text has come. */
  stopped = false;
  private readonly ids: number[] = [];

  constructor(private readonly decode: (ids: number[]) => string, private readonly stop: string[]) {}

  /** Takes the next token; gives what became final with it. */
  push(id: number): string {
    this.ids.push(id);
    const whole = this.decode(this.ids);
    return whole.endsWith(BROKEN) ? "" : this.add(whole, false);
  }

  /** Gives what was kept back: no token follows. */
  finish(): string {
    return this.stopped ? "" : this.add(this.decode(this.ids), true);
  }

  private add(whole: string, last: boolean): string {
    if (!whole.startsWith(this.text)) return "";
    const cuts = this.stop.filter(Boolean).map((stop) => whole.indexOf(stop)).filter((at) => at >= 0);
    this.stopped = cuts.length > 0;
    const kept = last ? 0 : Math.max(0, ...this.stop.map((stop) => overlap(whole, stop)));
    const end = this.stopped ? Math.min(...cuts) : whole.length - kept;
    const more = whole.slice(this.text.length, end);
    this.text += more;
    return more;
  }
}

/** How many of the last characters of `text` are a beginning of `stop`, without being all of it. */
function overlap(text: string, stop: string): number {
  for (let size = Math.min(stop.length - 1, text.length); size > 0; size--) if (text.endsWith(stop.slice(0, size))) return size;
  return 0;
}
