"""Describes how a model's base is quantized, and how that differs from the quantization in a pack's
training.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..io import strict_json
from ..manifest.structs import BaseQuantization
from ..pack import canary
from ..pack.pack import Pack
from .layers.weights import format_of
from .layers.wrapper import base_modules


def quantization_of(model: nn.Module) -> BaseQuantization | None:
    """Returns the quantization that most of the model's quantized layers use, else the one that its config
    names; None if the weights are plain floats.
    """
    forms: Counter[bytes] = Counter()
    by_key = {}
    for _, module in base_modules(model):
        if (form := format_of(module)) is not None:
            found = BaseQuantization(
                form.name(module.weight), {"library": form.library, **form.settings(module.weight)}
            )
            key = strict_json.canonical(found)
            forms[key] += 1
            by_key[key] = found
    if forms:
        return by_key[forms.most_common(1)[0][0]]
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    method = (
        settings.get("quant_method")
        if isinstance(settings, dict)
        else getattr(settings, "quant_method", None)
    )
    return None if method is None else BaseQuantization(str(getattr(method, "value", method)).lower(), {})


def difference(model: nn.Module, pack: Pack, error: float | None) -> str | None:
    """Returns a warning if ``model`` holds its base in another format than in the pack's training, else None.

    ``error`` is the largest difference between the model's logits and those in the pack's canary, or None if
    the canary was not replayed.
    """
    trained, here = pack.manifest.base_quantization, quantization_of(model)
    if _same(trained, here):
        return None
    recorded = pack.manifest.canary
    off = (
        ""
        if error is None or recorded is None
        else f": logits are up to {error:.3g} off, of at most {canary.size(recorded):.3g}"
    )
    return (
        f"pack '{pack.name}' was trained on its base {_describe(trained)}, and here the base is held "
        f"{_describe(here)}{off}; "
        "load the base as in training, or measure what the adapter gives on this one"
    )


def _same(one: BaseQuantization | None, other: BaseQuantization | None) -> bool:
    """Whether two quantizations agree in their scheme and in every setting that both record."""
    if one is None or other is None:
        return one is other
    return one.scheme == other.scheme and all(
        one.params[key] == other.params[key] for key in one.params.keys() & other.params.keys()
    )


def _describe(form: BaseQuantization | None) -> str:
    """Describes a quantization in words, for the warning."""
    if form is None:
        return "as plain floats"
    library: Any = form.params.get("library")
    return f"as {form.scheme}" + (f" of {library}" if library else "")
