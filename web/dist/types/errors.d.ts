/** Every error of this module. `name` tells the kinds apart, and `remedy` says what to do. */
export declare class AdapterpackError extends Error {
    readonly remedy: string;
    constructor(message: string, remedy?: string);
}
/** A file is damaged, or not of the form that it should have. */
export declare class FormatError extends AdapterpackError {
}
/** Bytes are not those that a manifest lists, or that the caller has pinned. */
export declare class DigestMismatch extends AdapterpackError {
}
/** A pack was made for another base than the bundle's. */
export declare class BaseMismatch extends AdapterpackError {
}
/** An adapter gives other numbers here than where its pack was made. */
export declare class ParityError extends AdapterpackError {
}
/** What was asked for cannot be done in the browser, or by this bundle. */
export declare class Unsupported extends AdapterpackError {
}
/** The bundle has no adapter of that name. */
export declare class UnknownAdapter extends AdapterpackError {
}
/** An argument has a value that cannot be. */
export declare class ConfigError extends AdapterpackError {
}
/** A file could not be fetched. */
export declare class FetchError extends AdapterpackError {
}
