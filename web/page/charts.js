// Small charts of the last minutes, drawn by hand.

import { svg } from "./elements.js";

const WIDTH = 100;
const HEIGHT = 40;
const LEAST = 30;

/** Lines over time, each a list of numbers or nulls (nothing was measured); `words` say the chart to those who do not see it. */
export function chart(lines, words) {
  const most = Math.max(LEAST, lines[0].length); // the first minute is not squeezed into a corner
  const highest = Math.max(1e-9, ...lines.flat().filter((value) => value != null));
  const frame = { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": words };
  const base = svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT });
  return svg("svg", frame, base, ...lines.flatMap((values, number) => drawn(values, highest, most, `c${number + 1}`)));
}

function drawn(values, highest, most, tone) {
  const place = (index) => WIDTH - ((values.length - 1 - index) * WIDTH) / (most - 1);
  const points = values.map((value, index) => [place(index), value == null ? null : HEIGHT - (value / highest) * (HEIGHT - 3)]);
  return runs(points).flatMap((run) => {
    const line = run.map(([x, y]) => `${x.toFixed(2)},${y.toFixed(2)}`).join(" ");
    const area = `${run[0][0].toFixed(2)},${HEIGHT} ${line} ${run.at(-1)[0].toFixed(2)},${HEIGHT}`;
    return [svg("polygon", { class: `area ${tone}`, points: area }), svg("polyline", { class: `line ${tone}`, points: line })];
  });
}

/** The stretches in which something was measured. */
function runs(points) {
  const found = [];
  let run = [];
  for (const point of [...points, [0, null]]) {
    if (point[1] != null) run.push(point);
    else if (run.length) {
      found.push(run);
      run = [];
    }
  }
  return found;
}
