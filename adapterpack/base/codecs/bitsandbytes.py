"""bitsandbytes: one name for its 4-bit and its 8-bit weights, which a checkpoint may mix."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from . import bnb4, bnb8
from .base import Codec, Weight
from .registry import CODECS


def find(base: Checkpoint) -> list[Weight]:
    """The weights in 4 bits, then those in 8."""
    return [*bnb4.find(base), *bnb8.find(base)]


CODECS.register(Codec("bitsandbytes", "NF4 and FP4, with and without double quantization, and int8", find))
