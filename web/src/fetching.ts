// Downloads: no more bytes than were promised, and a word about each piece that has come.

import { FetchError, FormatError } from "./errors";

const FIRST = 1 << 20;

/** Told of every piece of a download: the bytes that have come so far, and how many there will be. */
export type Progress = (done: number, total: number) => void;

/** The address of a file below a folder; with its digest behind it, so that a browser keeps no older file of that name for it. */
export function below(folder: string, path: string, sha256 = ""): string {
  const url = new URL(path, folder.endsWith("/") ? folder : `${folder}/`);
  if (sha256) url.searchParams.set("sha256", sha256.slice(0, 16));
  return url.href;
}

/**
 * The bytes of a file of exactly `size` bytes; or where that is null of at most `most`, as the server has it now.
 *
 * @throws FetchError - the server does not give it.
 * @throws FormatError - it is of another size.
 */
export async function download(url: string, size: number | null, most: number, heard: (bytes: number) => void = () => {}): Promise<Uint8Array> {
  let response: Response;
  try {
    response = await fetch(url, { cache: size === null ? "no-cache" : "default" });
  } catch (error) {
    throw new FetchError(`${url} cannot be fetched: ${(error as Error).message}`, "See that the address is right and that its server allows this page to read it");
  }
  if (!response.ok) throw new FetchError(`${url} cannot be fetched: ${response.status} ${response.statusText}`);
  return read(response, size, size ?? most, heard);
}

/** Memory is taken as bytes come, not as somebody says how many there will be. */
async function read(response: Response, size: number | null, room: number, heard: (bytes: number) => void): Promise<Uint8Array> {
  let bytes = new Uint8Array(Math.min(room, FIRST));
  let length = 0;
  const reader = response.body?.getReader();
  for (;;) {
    const { done, value } = (await reader?.read()) ?? { done: true, value: undefined };
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
  if (size !== null && length !== size) throw new FormatError(`${response.url} has ${length} bytes, where its manifest lists ${size}`);
  return length === bytes.byteLength ? bytes : bytes.slice(0, length);
}
