"""Registers the formats of quantized checkpoints that can be read, and detects the format of a checkpoint."""

from __future__ import annotations

from ...errors import Unsupported
from ...registry import Registry
from .. import Checkpoint
from ..quantization import scheme
from .base import Codec, Weight

CODECS: Registry[Codec] = Registry("quantized format", Codec, "adapterpack.codecs", "adapterpack.base.codecs")
"""Maps ``quant_method`` of ``config.json`` to its codec; every file of this folder registers one."""


def weights(base: Checkpoint) -> dict[str, Weight]:
    """Returns the weights that a checkpoint stores quantized, by their names in the unquantized checkpoint;
    empty for a plain one.

    Raises:
        Unsupported: its quantization cannot be read.
        FormatError: its tensors contradict its format.
    """
    declared = scheme(base)
    if declared is None:
        return {}
    if declared not in CODECS:
        raise Unsupported(
            "the base is quantized: its stored numbers are not its weights",
            where=base.folder,
            found=declared,
            expected=", ".join(CODECS),
            remedy="dequantize it first: merge into the original checkpoint and quantize the result, or "
            "keep the adapter unmerged",
        )
    matched = CODECS[declared].match(base)
    if not matched:
        raise Unsupported(
            "the base says that it is quantized, and no tensor of it is",
            where=base.folder,
            found=declared,
            remedy="remove quantization_config from config.json if its weights are plain numbers",
        )
    return {weight.name: weight for weight in matched}
