// Numbers as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  return whole.format(value);
}

/** `1 request`, `2 requests`. */
export function counted(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** Three digits at most, as far as there is something to say. */
export function rough(value) {
  if (value >= 100 || value === 0) return count(value);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 100 ? `${value.toFixed(1)} s` : `${count(value)} s`;
}

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

export function bytes(value) {
  let unit = 0;
  while (value >= 999.5 && unit < 3) {
    value /= 1000;
    unit += 1;
  }
  return `${unit ? rough(value) : count(value)} ${["B", "kB", "MB", "GB"][unit]}`;
}
