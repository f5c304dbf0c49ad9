// Two adapters at once: which ones, and the weight of each. And whether a digest is that of what was asked.

import { el } from "./elements.js";

const PLACES = ["first", "second"];

export class Mix {
  /** `side` and `tone` are those of its pane. */
  constructor(side, tone) {
    this.parts = PLACES.map((place) => ({
      select: el("select", { id: `mix-${tone}-${place}`, "aria-label": `${side}: the ${place} adapter` }),
      weight: el("input", { id: `weight-${tone}-${place}`, type: "number", min: -10, max: 10, step: "any", value: 0.5, required: true, "aria-label": `${side}: the weight of the ${place} adapter` }),
    }));
    const rows = this.parts.map(({ select, weight }) => el("div", { class: "row" }, select, el("span", { class: "note", "aria-hidden": "true" }, "×"), weight));
    this.element = el("div", { class: "mix" }, ...rows);
    this.show(false);
  }

  show(now) {
    this.element.hidden = !now;
    for (const { weight } of this.parts) weight.disabled = !now; // what nobody sees keeps no form from being sent
  }

  offer(names) {
    this.parts.forEach(({ select }, place) => {
      const chosen = select.value;
      select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
      select.value = names.includes(chosen) ? chosen : names[Math.min(place, names.length - 1)];
    });
  }

  /** As a request has them. */
  get adapters() {
    return this.parts.map(({ select, weight }) => ({ name: select.value, weight: weight.valueAsNumber }));
  }
}

/** The packs that a digest names, each with its weight if there are several. */
export function packsOf(digest) {
  return digest.split("+").map((part) => {
    const [pack, weight] = part.split("*");
    return { pack, weight: weight && Number(weight) };
  });
}

/** Whether a digest is that of what was asked, by the digests of listed models. The packs of a mix are in the order of their names. */
export function agrees(digest, { model, adapters = [{ name: model }] }, models) {
  const wanted = [...adapters].sort((one, other) => (one.name < other.name ? -1 : 1));
  const packs = packsOf(digest);
  const listed = (name) => models.find((one) => one.id === name)?.root;
  return packs.length === wanted.length && wanted.every(({ name, weight }, place) => packs[place].pack === listed(name) && packs[place].weight === weight);
}
