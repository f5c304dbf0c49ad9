"""Shared code of kohya's and diffusers' files: safetensors whose keys begin with the name of the model that
they belong to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..base import publish_path, renamings_of
from ..errors import AdapterpackError, Unsupported, require_among
from ..io import open_regular
from ..io.safetensors import parse_header
from ..pack import Pack
from ..readable import things
from .base import BaseModel
from .format import ConversionSource, Notes, first_bytes, list_first

_TEXT_MODELS = ("clip", "t5", "umt5", "gemma", "llama", "qwen")
"""Prefixes of ``model_type`` of the text encoders in image pipelines."""


def keys_of(path: Path) -> list[str]:
    """Returns the tensor names of a safetensors file; nothing for any other or a malformed file."""
    if first_bytes(path, 9)[8:] != b"{":
        return []
    try:
        with open_regular(path) as file:
            return list(parse_header(file, os.fstat(file.fileno()).st_size, path)[0])
    except AdapterpackError:
        return []


def is_text_model(base: BaseModel | None, model_type: str | None) -> bool:
    """Whether a base is a text encoder, by its own model type or else by the type that the pack records."""
    stated = (base.model_type if base is not None else None) or model_type or ""
    return stated.lower().startswith(_TEXT_MODELS)


def published_in(pack: Pack, base: BaseModel | None) -> Callable[[str], str]:
    """Returns a function that maps a module path to its path in published checkpoints of the pack's base,
    which these files use.
    """
    known = pack.manifest.base
    steps = (
        renamings_of({"model_type": known.model_type}, known.architecture)
        if base is None
        else base.checkpoint.renamings
    )
    return lambda path: publish_path(path, steps)


def choose_models(parts: Mapping[str, Iterable[str]], source: ConversionSource) -> tuple[list[str], Notes]:
    """Returns the models of a file that are read, all of them for inspection, and a note about several;
    ``parts`` maps each model to its modules.

    Raises:
        Unsupported: the file has several models and the caller chose none: a pack belongs to one base.
        UnknownName: the file has no such part.
    """
    sizes = {part: len(set(modules)) for part, modules in parts.items()}
    counts = ", ".join(f"{part} ({things(count, 'module')})" for part, count in sorted(sizes.items()))
    if source.inspected:
        note = f"adapters of several models: {counts}; each becomes a pack of its own (--part)"
        return list(sizes), (note,) if len(sizes) > 1 else ()
    if source.part is None:
        if len(sizes) > 1:
            raise Unsupported(
                "the file holds adapters of several models, and a pack belongs to one",
                where=source.path,
                found=counts,
                remedy="choose one with --part, and convert each",
            )
        return list(sizes), ()
    require_among("the file has no such part", source.part, sizes, where=source.path)
    left_out = sorted(set(sizes) - {source.part})
    note = f"only {source.part} was read, as asked; left out: {list_first(left_out)}"
    return [source.part], (note,) if left_out else ()


def missing_alpha_note(modules: list[str]) -> Notes:
    """Returns the note about modules without a stated alpha."""
    return (
        ()
        if not modules
        else (
            f"the file states no alpha for {things(len(modules), 'module')} "
            f"({list_first(sorted(modules), 2)}): "
            "alpha = r, the scale is one, as is the custom",
        )
    )
