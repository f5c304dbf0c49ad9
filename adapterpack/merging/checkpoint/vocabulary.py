"""Merges packs whose vocabulary has words that the base lacks: the embedding of the merged checkpoint gets
more rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...adapter_methods import Tensors, complete
from ...base import Checkpoint, carried_files
from ...errors import Unsupported
from ...io import copy_file
from ...pack import Pack
from ..fold import Contribution
from .base_model import MergeBase

_NOT_OF_A_TOKENIZER = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
}


def adds_words(base: Checkpoint, name: str, value: np.ndarray) -> bool:
    """Whether a tensor that replaces ``name`` has a row for every word of the base, and more."""
    shape = base.tensors[name].shape
    words = base.config.get("vocab_size")
    return (
        value.ndim == len(shape)
        and shape[:1] == (words,)
        and value.shape[1:] == shape[1:]
        and value.shape[0] > shape[0]
    )


def extended_table(base: MergeBase, name: str, contribution: Contribution) -> np.ndarray | None:
    """Returns the embedding ``name`` with additional rows for words that an adapter trained and the base
    lacks, in float32; None if there are no such words.

    Raises:
        Unsupported: the rows of some words in between are not known.
    """
    method, adapter = contribution.method, contribution.adapter
    table = base.tensors[name]
    append_rows = method.overrides.get("append_rows")
    fold = method.overrides.get("fold")
    if append_rows is None or fold is None:
        return None
    try:
        appended = append_rows(adapter.config, adapter.params, table.shape[0])
    except ValueError as error:
        raise Unsupported(
            "the vocabulary grew by words that this adapter did not train",
            where=f"pack '{contribution.pack}', {name}",
            found=str(error),
            remedy="train all new words, or save the whole table with the adapter: modules_to_save",
        ) from error
    if appended is None:
        return None
    start = np.concatenate([base.read(name).astype(np.float32), appended.astype(np.float32)])
    site = dataclasses.replace(adapter.site, out_features=len(start), weight=start)
    extended: np.ndarray = fold(
        adapter.config,
        complete(method, adapter.config, adapter.params, site),
        site,
        start,
        None,
        slice(0, len(start)),
    )[0]
    return extended


def extended_vocab_size(base: Checkpoint, replaced: Tensors) -> int | None:
    """Returns the vocabulary size of the output if it is larger than the base's, else None.

    Raises:
        Unsupported: the packs do not agree on it, or a table or a head keeps the old size.
    """
    sizes = {name: value.shape[0] for name, value in replaced.items() if adds_words(base, name, value)}
    if not sizes:
        return None
    words = base.config["vocab_size"]
    unchanged = [
        name
        for name, info in base.tensors.items()
        if info.shape[:1] == (words,) and name not in sizes and has_row_per_word(name)
    ]
    if unchanged or len(set(sizes.values())) > 1:
        raise Unsupported(
            "the vocabulary grew, and not every tensor with a row for each word grew with it",
            where=base.where,
            found=", ".join(unchanged) or ", ".join(f"{name}: {size}" for name, size in sizes.items()),
            expected=f"{max(sizes.values())} rows",
            remedy="save the embedding and the output head whole, both: modules_to_save of the adapter",
        )
    size: int = next(iter(sizes.values()))
    return size


TABLES = frozenset(
    {
        "embed_tokens",
        "lm_head",
        "wte",
        "word_embeddings",
        "shared",
        "embed_in",
        "embed_out",
        "proj_out",
        "tok_embeddings",
        "output",
        "decoder",
        "predictions",
    }
)
"""Names of embeddings and output heads; other tensors may have as many rows as there are words by
coincidence.
"""


def has_row_per_word(name: str) -> bool:
    """Whether a tensor's name is that of an embedding or an output head."""
    module, _, param = name.rpartition(".")
    return param in ("weight", "bias") and module.rpartition(".")[2] in TABLES


def copy_tokenizers(folder: Path, packs: Sequence[Pack]) -> None:
    """Copies the tokenizer in a pack's folder over the base's: it has the added words."""
    for pack in packs:
        if pack.path is not None and pack.path.is_dir():
            for path in carried_files(pack.path):
                if path.name not in _NOT_OF_A_TOKENIZER:
                    (folder / path.name).unlink(missing_ok=True)
                    copy_file(path, folder / path.name)
