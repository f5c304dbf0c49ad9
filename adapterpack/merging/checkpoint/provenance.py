"""Records what a checkpoint was merged from: in a side file, and in the metadata of every weight file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base import CONFIG, Checkpoint, copy_carried, read_json, write_json
from ...io import Json, strict_json
from ...pack import Pack
from . import config, layout, plan, vocabulary
from .report import MergedPack

FILE_NAME = "adapterpack.merge.json"


def content_if_read(base: Checkpoint) -> str | None:
    """Returns the base's ``content`` fingerprint if it was computed, else None."""
    return vars(base).get("content")


def note(base: Checkpoint, packs: Sequence[MergedPack], seed: int | None) -> str:
    """Returns the note for the metadata: the base's fingerprint, each pack's id and weight, and the seed of
    stochastic rounding.
    """
    record: Json = {
        "base": {"structure": base.structure, "probe": base.probe, "content": content_if_read(base)},
        "packs": [{"id": pack.id, "weight": pack.weight} for pack in packs],
    }
    return json.dumps(record if seed is None else {**record, "stochastic_rounding": seed}, sort_keys=True)


def key(headers: Sequence[bytes], options: dict[str, Any]) -> str:
    """Returns a digest that identifies a merge: of the headers of its files, which name base, packs, weights
    and shapes, and of the options that the headers lack.
    """
    hasher = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for header in headers:
        hasher.update(header)
    return hasher.hexdigest()


def write_side_files(
    folder: Path,
    base: Checkpoint,
    packs: Sequence[Pack],
    todo: plan.MergePlan,
    dtype: str | None,
    shards: list[layout.Shard],
    report: Mapping[str, Any],
) -> None:
    """Writes config, tokenizer, templates, index and report of the merged checkpoint; ``dtype`` is the
    safetensors name of the chosen dtype.
    """
    changed = config.merged_config(base.config, packs, todo.full_modules, dtype, bool(todo.copies))
    copy_carried(base.folder, folder)
    if todo.full_modules.vocab_size is not None:
        vocabulary.copy_tokenizers(folder, packs)
    if base.config and changed != read_json(base.folder / CONFIG):
        write_json(folder / CONFIG, changed)
    if (index := layout.index(base, shards)) is not None:
        write_json(folder / base.index_name, index)
    (folder / FILE_NAME).write_bytes(strict_json.canonical(report))
