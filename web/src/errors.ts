// What can go wrong, by name: each error says what is wrong, where, and what to do about it.

/** Every error of this module. `name` tells the kinds apart, and `remedy` says what to do. */
export class AdapterpackError extends Error {
  readonly remedy: string;

  constructor(message: string, remedy = "") {
    super(remedy ? `${message}. ${remedy}.` : `${message}.`);
    this.name = new.target.name;
    this.remedy = remedy;
  }
}

/** A file is damaged, or not of the form that it should have. */
export class FormatError extends AdapterpackError {}

/** Bytes are not those that a manifest lists, or that the caller has pinned. */
export class DigestMismatch extends AdapterpackError {}

/** A pack was made for another base than the bundle's. */
export class BaseMismatch extends AdapterpackError {}

/** An adapter gives other numbers here than where its pack was made. */
export class ParityError extends AdapterpackError {}

/** What was asked for cannot be done in the browser, or by this bundle. */
export class Unsupported extends AdapterpackError {}

/** The bundle has no adapter of that name. */
export class UnknownAdapter extends AdapterpackError {}

/** An argument has a value that cannot be. */
export class ConfigError extends AdapterpackError {}

/** A file could not be fetched. */
export class FetchError extends AdapterpackError {}
