/**
 * Runs adapterpack bundles in the browser: one base, any number of adapters, a different one for every row.
 *
 * @packageDocumentation
 */

export { Bundle, open, type OpenOptions, type Row } from "./bundle";
export { AdapterpackError, BaseMismatch, ConfigError, DigestMismatch, FetchError, FormatError, ParityError, UnknownAdapter, Unsupported } from "./errors";
export type { Progress } from "./fetching";
export type { Sampling } from "./generate";
export type { Provider, Tensor, Values } from "./graph";
export type { Adapter } from "./manifest";
export type { PackSource } from "./pack";
export type { Scored } from "./scores";
export type { Message } from "./texts";
