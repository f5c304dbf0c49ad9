"""The schemes by which packs are quantized, a file each: which code every direction of a matrix gets."""
