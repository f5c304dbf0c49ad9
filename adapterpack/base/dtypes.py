"""Parses dtype names that people use (``bf16``, ``torch.float16``, ``F32``) into those of safetensors."""

from __future__ import annotations

from ..errors import ConfigError, nearest

TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Maps safetensors names to those in ``config.json``."""
_ALIASES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16", "half": "F16", "fp8": "F8_E4M3"}
NAMES = {**{name: code for code, name in TORCH.items()}, **{code.lower(): code for code in TORCH}, **_ALIASES}


def parse(name: str) -> str:
    """Returns the safetensors name of a floating dtype.

    Raises:
        ConfigError: the dtype is unknown.

    Example:
        >>> parse("bfloat16"), parse("fp32"), parse("F16")
        ('BF16', 'F32', 'F16')
    """
    dtype = NAMES.get(name.lower().removeprefix("torch."))
    if dtype is None:
        raise ConfigError(
            "a checkpoint cannot be written in this dtype",
            where="dtype",
            found=repr(name),
            remedy=nearest(name, NAMES),
        )
    return dtype
