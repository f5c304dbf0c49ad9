export type Json = null | boolean | number | string | Json[] | {
    [key: string]: Json;
};
export type JsonObject = {
    [key: string]: Json;
};
/** The one object that UTF-8 bytes hold; at most `most` bytes. */
export declare function parseObject(bytes: Uint8Array, where: string, most: number): JsonObject;
/** A value that must be an object. */
export declare function asObject(value: Json | undefined, where: string): JsonObject;
/** A value that must be a list of at most `most` items. */
export declare function asList(value: Json | undefined, where: string, most?: number): Json[];
/** A value that must be a text of at most `most` characters. */
export declare function asText(value: Json | undefined, where: string, most?: number): string;
/** A value that must be a whole number from 0 to `most`. */
export declare function asCount(value: Json | undefined, where: string, most?: number): number;
/** A list of whole numbers. */
export declare function asCounts(value: Json | undefined, where: string, most?: number): number[];
/** A list of texts, or null. */
export declare function asTexts(value: Json | undefined, where: string, most?: number): string[] | null;
