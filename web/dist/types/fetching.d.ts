/** Told of every piece of a download: the bytes that have come so far, and how many there will be. */
export type Progress = (done: number, total: number) => void;
/** The address of a file below a folder; with its digest behind it, so that a browser keeps no older file of that name for it. */
export declare function below(folder: string, path: string, sha256?: string): string;
/**
 * The bytes of a file of exactly `size` bytes; or where that is null of at most `most`, as the server has it now.
 *
 * @throws FetchError - the server does not give it.
 * @throws FormatError - it is of another size.
 */
export declare function download(url: string, size: number | null, most: number, heard?: (bytes: number) => void): Promise<Uint8Array>;
