"""The formats of quantized checkpoints that a merge reads and writes."""

from __future__ import annotations

from ...errors import Unsupported
from ..checkpoint import Checkpoint
from ..quantization import scheme
from .base import Codec, Weight

CODECS = {
    codec.name: codec
    for codec in (
        Codec("bitsandbytes", "NF4 and FP4, with and without double quantization, and int8", ("bnb4", "bnb8")),
        Codec("gptq", "2, 3, 4 and 8 bits, with and without act-order", ("gptq",)),
        Codec("awq", "4 bits, GEMM packing", ("awq",)),
        Codec("torchao", "int8, intx unpacked to int8, float8", ("torchao",)),
        Codec("compressed-tensors", "packed and plain integers, float8", ("compressed",)),
        Codec("fp8", "float8 in tiles", ("fp8",)),
    )
}
"""``quant_method`` of a config -> codec."""


def weights(base: Checkpoint) -> dict[str, Weight]:
    """The weights that a checkpoint stores quantized, by the name of the tensor that each would be; empty for a plain checkpoint.

    Raises:
        Unsupported: it is quantized in a way that is not read.
        FormatError: its tensors are not what its format says.
    """
    declared = scheme(base)
    if declared is None:
        return {}
    if declared not in CODECS:
        raise Unsupported("the base is quantized: its stored numbers are not its weights", where=base.folder, found=declared,
                          expected=", ".join(CODECS),
                          remedy="dequantize it first: merge into the original checkpoint and quantize the result, or keep the adapter "
                                 "beside the base")
    found = CODECS[declared].find(base)
    if not found:
        raise Unsupported("the base says that it is quantized, and no tensor of it is", where=base.folder, found=declared,
                          remedy="remove quantization_config from config.json if its weights are plain numbers")
    return {weight.name: weight for weight in found}
