// Makes elements. Text only ever becomes text: nothing here, or anywhere else, reads markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** An element with attributes; `onclick` and the like are listeners, and children are elements or text. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** The element of the page with an id. */
export function at(id) {
  return document.getElementById(id);
}

/** Tells those who do not see the page, once. */
export function say(text) {
  at("said").textContent = text;
}

/** A button with the first digits of a digest, which copies all of it. */
export function digestButton(digest) {
  const short = shortDigest(digest);
  const button = el("button", { type: "button", class: "digest", title: digest, "aria-label": `Copy the digest ${digest}` }, short);
  button.addEventListener("click", async () => {
    const copied = await copy(digest);
    button.textContent = copied ? "copied" : digest;
    say(copied ? "The digest is copied." : "The browser does not let this page copy: the whole digest is shown instead.");
    if (copied) setTimeout(() => (button.textContent = short), 1500);
  });
  return button;
}

/** As people see a digest: its first twelve digits. */
export function shortDigest(digest) {
  return digest.replace(/^sha256:/, "").slice(0, 12);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers have a clipboard only on https and on this machine.
    const field = el("textarea", { class: "unseen", readonly: true, "aria-hidden": "true" });
    field.value = text;
    const focused = document.activeElement;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return copied;
  }
}
