/** One tensor: its type, its shape, and its bytes as they lie in the file. */
export interface Tensor {
    dtype: string;
    shape: number[];
    bytes: Uint8Array;
}
/**
 * The tensors of a file, by name. Their bytes lie one after another without holes, as the format says, and end where the file ends.
 *
 * @throws FormatError - the file is damaged.
 */
export declare function parseSafetensors(file: Uint8Array, where: string): Map<string, Tensor>;
/** The numbers of a tensor as float32, row by row. */
export declare function asFloats(tensor: Tensor, where: string): Float32Array;
/** The number that sixteen bits of IEEE 754's binary16 stand for. */
export declare function half(bits: number): number;
/** How many numbers a shape holds; too many for a file are no number that is compared with one. */
export declare function countOf(shape: number[]): number;
