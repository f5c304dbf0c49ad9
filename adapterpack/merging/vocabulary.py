"""A vocabulary that grew: words that were added before training, for which the merged checkpoint has rows that the base has not."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..adapter_methods import complete
from ..base.checkpoint import Checkpoint, carried_files
from ..errors import Unsupported
from ..pack.pack import Pack
from .base_model import MergeBase
from .fold.fold import Contribution

_NOT_OF_A_TOKENIZER = {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}


def grows(base: Checkpoint, name: str, value: np.ndarray) -> bool:
    """Whether a tensor that shall take the place of ``name`` has a row for every word of the base, and more."""
    shape, words = base.tensors[name].shape, base.config.get("vocab_size")
    return value.ndim == len(shape) and shape[0] == words and value.shape[1:] == shape[1:] and value.shape[0] > shape[0]


def lengthened(base: MergeBase, name: str, contribution: Contribution) -> np.ndarray | None:
    """The table ``name`` with the rows of words that the base lacks and an adapter trained, in float32; None if it trained none.

    Raises:
        Unsupported: there are words between whose rows nobody knows.
    """
    method, adapter = contribution.method, contribution.adapter
    table = base.tensors[name]
    if method.beyond is None or method.fold is None:
        return None
    try:
        beyond = method.beyond(adapter.config, adapter.params, table.shape[0])
    except ValueError as error:
        raise Unsupported("the vocabulary grew by words that this adapter did not train", where=f"pack '{contribution.pack}', {name}",
                          found=str(error), remedy="train all new words, or save the whole table with the adapter: modules_to_save"
                          ) from error
    if beyond is None:
        return None
    start = np.concatenate([base.read(name).astype(np.float32), beyond.astype(np.float32)])
    site = dataclasses.replace(adapter.site, out_features=len(start), weight=start)
    found: np.ndarray = method.fold(adapter.config, complete(method, adapter.config, adapter.params, site), site, start, None,
                                    slice(0, len(start)))[0]
    return found


def grown(base: Checkpoint, replaced: Mapping[str, np.ndarray]) -> int | None:
    """The size of the vocabulary of the output, if that is larger than the base's.

    Raises:
        Unsupported: the packs do not agree on it, or a table or a head keeps the old size.
    """
    sizes = {name: value.shape[0] for name, value in replaced.items() if grows(base, name, value)}
    if not sizes:
        return None
    words = base.config["vocab_size"]
    left = [name for name, info in base.tensors.items() if info.shape[:1] == (words,) and name not in sizes and _of_words(name)]
    if left or len(set(sizes.values())) > 1:
        raise Unsupported("the vocabulary grew, and not every tensor with a row for each word grew with it", where=base.where,
                          found=", ".join(left) or ", ".join(f"{name}: {size}" for name, size in sizes.items()),
                          expected=f"{max(sizes.values())} rows", remedy="save the embedding and the output head whole, both: "
                                                                         "modules_to_save of the adapter")
    found: int = next(iter(sizes.values()))
    return found


_TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "proj_out", "tok_embeddings", "output",
           "decoder")
"""What tables of words and output heads are called, where a row for each word is no accident of sizes."""


def _of_words(name: str) -> bool:
    module, _, param = name.rpartition(".")
    return param in ("weight", "bias") and module.rpartition(".")[2] in _TABLES


def carry_tokenizers(folder: Path, packs: Sequence[Pack]) -> None:
    """The tokenizer of a pack that lies beside it takes the place of the base's: it knows the words that were added."""
    for pack in packs:
        if pack.path is not None and pack.path.is_dir():
            for path in carried_files(pack.path):
                if path.name not in _NOT_OF_A_TOKENIZER:
                    shutil.copyfile(path, folder / path.name)
