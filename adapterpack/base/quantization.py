"""Determines which quantization a checkpoint declares, by its config or by the names of its tensors."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import Unsupported
from ..io import Config
from .checkpoint import Checkpoint


class Scheme(NamedTuple):
    """A quantization scheme: the config keys that identify it if no method is named, and the tensor name
    endings that must all occur.
    """

    name: str
    keys: tuple[str, ...]
    endings: tuple[str, ...]


SCHEMES = (
    Scheme("bitsandbytes", ("load_in_4bit", "_load_in_4bit"), (".absmax", ".quant_map")),
    Scheme("bitsandbytes", ("load_in_8bit", "_load_in_8bit"), (".SCB",)),
    Scheme("gptq", ("desc_act", "damp_percent"), (".qweight", ".qzeros", ".g_idx")),
    Scheme("awq", (), (".qweight", ".qzeros", ".scales")),
    Scheme("torchao", ("quant_type",), ("_weight_qdata",)),
    Scheme("torchao", (), (":qdata",)),
)


def scheme(base: Checkpoint) -> str | None:
    """Returns the name of the scheme that a checkpoint declares, or None.

    Example:
        >>> scheme(Checkpoint("llama-awq"))  # doctest: +SKIP
        'awq'
    """
    return read_quantization(base.config) or next(
        (
            row.name
            for row in SCHEMES
            if all(any(name.endswith(ending) for name in base.stored) for ending in row.endings)
        ),
        None,
    )


def read_quantization(config: Config) -> str | None:
    """Returns the method in ``quantization_config`` of a model's config or of its text part, or None.

    Example:
        >>> read_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4}})
        'gptq'
        >>> read_quantization({"quantization_config": {"load_in_4bit": True}})
        'bitsandbytes'
        >>> read_quantization({"hidden_size": 4}) is None
        True
    """
    settings = _settings(config)
    if settings is None:
        return None
    method = settings.get("quant_method")
    if isinstance(method, str) and method:
        return method
    return next((row.name for row in SCHEMES if any(settings.get(key) for key in row.keys)), "unnamed")


def settings(config: Config) -> Config:
    """Returns ``quantization_config`` of a model's config or of its text part; empty if there is none.

    Example:
        >>> settings({"text_config": {"quantization_config": {"bits": 4}}})
        {'bits': 4}
    """
    return _settings(config) or {}


def _settings(config: Config) -> Config | None:
    """Returns ``quantization_config``, or None."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(settings, dict):
            return settings
    return None


def require_plain(base: Checkpoint) -> None:
    """Raises if a checkpoint is quantized.

    Raises:
        Unsupported: it is quantized.
    """
    declared_scheme = scheme(base)
    if declared_scheme is not None:
        raise Unsupported(
            "the base is quantized: its stored numbers are not its weights",
            where=base.folder,
            found=declared_scheme,
            remedy="dequantize it first: merge into the original checkpoint and quantize the result, or "
            "keep the adapter unmerged",
        )
