"""Describes the base that a model holds (its checkpoint, fingerprint and quantization), and compares it with
the base that a pack was made for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from ..base import Checkpoint, Verdict, compatibility
from ..base import fingerprint as fp
from ..hub import folder_of
from ..io import DTYPES, strict_json
from ..manifest import BaseQuantization
from ..manifest import manifest as m
from ..manifest.structs import Dims
from ..pack import Pack, canary
from ..paths import StrPath
from .layers import base_modules, tensor_of
from .layers.weights import format_of

DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
"""Maps numpy's and torch's names of dtypes to those of safetensors."""

_MAX_NAME = 128


def quantization_of(model: nn.Module) -> BaseQuantization | None:
    """Returns the quantization that most of the model's quantized layers use, else the one that its config
    names; None if the weights are plain floats.
    """
    forms = [
        BaseQuantization(form.name(module.weight), {"library": form.library, **form.settings(module.weight)})
        for _, module in base_modules(model)
        if (form := format_of(module)) is not None
    ]
    if forms:
        keys = [strict_json.canonical(form) for form in forms]
        return forms[keys.index(Counter(keys).most_common(1)[0][0])]
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
    trained = pack.manifest.base_quantization
    here = quantization_of(model)
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


def require_model_base(model: nn.Module, pack: Pack) -> Verdict | None:
    """Raises if ``model`` does not hold the base that ``pack`` was made for.

    Compares the checkpoint that the model was loaded from, or the model's own tensors if it has none. Returns
    how they compare, or None if the pack records nothing about its base.

    Raises:
        BaseMismatch: it does not.
    """
    checkpoint = checkpoint_of(model)
    if checkpoint is not None:
        return pack.require_base(checkpoint)
    if any(compatibility.recorded_fingerprint(pack.manifest.base)):
        return pack.require_levels(_model_fingerprint(model), name=None, where=type(model).__name__)
    return None


def checkpoint_of(model: nn.Module, base: StrPath | None = None) -> Checkpoint | None:
    """Returns the checkpoint in ``base``, by default the one that the model was loaded from; None if there is
    none.
    """
    source = base or getattr(getattr(model, "config", None), "_name_or_path", None)
    return Checkpoint(folder_of(source)) if source else None


def base_of(model: nn.Module, checkpoint: Checkpoint | None) -> m.Base:
    """Describes the base for the manifest: its name, commit, fingerprint, architecture and sizes."""
    config = getattr(model, "config", None)
    # A checkpoint on disk is the better evidence: it also identifies the files as a hub lists them.
    fingerprint = checkpoint.fingerprint(files=True) if checkpoint else _model_fingerprint(model)
    name, commit = (checkpoint.name, checkpoint.commit) if checkpoint else (None, None)
    return m.Base(
        name,
        commit,
        getattr(config, "model_type", None),
        fingerprint.structure,
        fingerprint.content,
        _architecture(checkpoint) if checkpoint else type(model).__name__,
        _dims(config),
        fingerprint.files,
        fingerprint.probe,
    )


def _architecture(checkpoint: Checkpoint) -> str | None:
    """Returns the class that the base was saved from, as its config names it; None for a name that a manifest
    may not hold.
    """
    name = checkpoint.architecture
    return name if name is not None and name.isascii() and len(name) <= _MAX_NAME else None


def _dims(config: Any) -> Dims | None:
    """Returns the sizes in the model's config, under the names that transformers gives every architecture."""
    names = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "vocab": "vocab_size",
    }
    sizes = {ours: _field(config, theirs) for ours, theirs in names.items()}
    dims = Dims(**{name: size for name, size in sizes.items() if type(size) is int and size > 0})
    return None if dims == Dims() else dims


def _field(config: Any, name: str) -> Any:
    """Returns a field of a config; None if there is no such field, or if each layer has its own value."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to read what layers differ in
        return None


def _model_fingerprint(model: nn.Module) -> fp.Fingerprint:
    """Computes the fingerprint of a model without a checkpoint as that of the checkpoint that saving it would
    write; tied weights count once.
    """
    tensors = []
    taken = set()
    for path, module in base_modules(model):
        passing = module._non_persistent_buffers_set
        values_by_leaf = [
            *module._parameters.items(),
            *((leaf, value) for leaf, value in module._buffers.items() if leaf not in passing),
        ]
        for leaf, value in values_by_leaf:
            if value is None or id(value) in taken:
                continue
            taken.add(id(value))
            value = tensor_of(module, leaf, f"{path}.{leaf}")  # noqa: PLW2901 - the same one, in memory
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            name = str(value.dtype).removeprefix("torch.")
            tensors.append(
                (
                    f"{path}.{leaf}".lstrip("."),
                    DTYPE_NAMES.get(name, name),
                    tuple(value.shape),
                    memoryview(raw),
                )
            )
    return fp.in_memory(tensors)
