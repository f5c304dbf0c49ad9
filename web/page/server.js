// Asks the server. The key stays in this tab, and goes out in a header and nowhere else.

const STORED = "adapterpack-key";

/** Something that went wrong, in words for people. */
export class Problem extends Error {
  constructor(words, status = 0, code = "") {
    super(words);
    this.status = status;
    this.code = code;
  }
}

export function storedKey() {
  return sessionStorage.getItem(STORED);
}

export function storeKey(key) {
  if (key) sessionStorage.setItem(STORED, key);
  else sessionStorage.removeItem(STORED);
}

/** The response to a request: GET, or POST of a body. */
export async function request(path, { body, signal } = {}) {
  const key = storedKey();
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body), cache: "no-store", credentials: "omit" };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

/** The JSON that a request is answered with. */
export async function get(path, options) {
  return (await request(path, options)).json();
}

async function problemOf(response) {
  let said = {};
  try {
    const { error } = await response.json();
    said = typeof error === "string" ? { message: error } : (error ?? {});
  } catch {
    // What stands between may answer in a form of its own.
  }
  const words = said.message ? `${said.message[0].toUpperCase()}${said.message.slice(1)}.` : `The server answered with the status ${response.status}.`;
  const after = response.headers.get("Retry-After");
  return new Problem(after ? `${words} Try again in ${after} s.` : words, response.status, said.code);
}

/** The events of a stream, each the JSON of its data. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem("The answer broke off before its end.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Problem(`${event.error.message}.`, 0, event.error.code);
      yield event;
    }
  }
}
