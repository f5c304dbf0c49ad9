"""Adds tokens to a base: writes a new base beside the packs, with the extended tokenizer and a row for each
new token in the embedding and the output head.

A new row is the mean of the others, as ``resize_token_embeddings`` of transformers makes it, without its
noise of 1e-9 of their covariance (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from transformers import AddedToken

from ...base import CONFIG, Checkpoint, read_json, write_json
from ...base.base_folder import objects
from ...errors import ConfigError, Unsupported
from ...hub import folder_of
from ...io import FLOATS, output_folder, safetensors, strict_json
from ...io.blobs import link
from ...merging.checkpoint.vocabulary import TABLES, has_row_per_word
from ...runtime.text import text_part
from ...torch_adapters import load_for_task, load_tokenizer
from ..config.fields import TrainConfig

log = logging.getLogger(__name__)

_OF_TOKENIZER = frozenset({"added_tokens.json", "special_tokens_map.json"})
"""Older files of a tokenizer that would contradict the new one."""


class ExtendedBase(NamedTuple):
    """A base with more tokens: the ``base`` that it is made from, the ``tokenizer`` with the new ``tokens``,
    how many ``words`` the base's tables have rows for, how many ``rows`` these get in addition, and the
    ``folder`` where it belongs.
    """

    base: Checkpoint
    tokenizer: Any
    tokens: tuple[str, ...]
    words: int
    rows: int
    folder: Path

    @property
    def tables(self) -> frozenset[str]:
        """The base's tensors with a row for each token."""
        stored = self.base.stored.values()
        return frozenset(
            info.name for info in stored if info.shape[:1] == (self.words,) and has_row_per_word(info.name)
        )

    @property
    def new_bytes(self) -> int:
        """The bytes of the weight files that are written again, without the new rows; others are linked."""
        shards = {self.base.shard_of[name] for name in self.tables if self.rows}
        return sum((self.base.folder / shard).stat().st_size for shard in shards)

    def load(self, *args: Any, **options: Any) -> tuple[Any, list[str]]:
        """Loads a task's model as it would be loaded from the folder, before that is written."""
        model, new = load_for_task(*args, **options)
        if self.rows:
            model.resize_token_embeddings(self.words + self.rows, mean_resizing=False)
        return model, new


def extended_base(config: TrainConfig) -> ExtendedBase | None:
    """Returns the base with the tokens, or the tokenizer, that a configuration adds to its own; None if it
    adds none.

    Raises:
        ConfigError: the tokenizer has ids for which the base has no rows.
        Unsupported: the base's tables cannot get more rows.
    """
    if not (config.names_tokens or config.tokenizer):
        return None
    folder = folder_of(config.model_name_or_path)
    tokenizer = load_tokenizer(source := tokenizer_folder(config, folder))
    before = tokenizer.get_vocab()
    after = add_tokens(tokenizer, config).get_vocab()
    new = sorted(after.keys() - before.keys(), key=after.__getitem__)
    if not new and source.resolve() == folder.resolve():
        return None
    base = Checkpoint(folder)
    words = text_part(base.config, "vocab_size").get("vocab_size")
    if not isinstance(words, int) or (largest := max(before.values())) >= words:
        raise ConfigError(
            "the tokenizer has tokens for which the base has no rows",
            where="tokenizer" if config.tokenizer else folder,
            expected=f"ids below {words}",
            found=largest if isinstance(words, int) else "no vocab_size in config.json",
            remedy="name a tokenizer that was made for this base; new tokens belong under add_tokens",
        )
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = core.to_str() if core else after
    digest = strict_json.digest([base.probe, rules, tokenizer.chat_template])
    place = Path(config.output_dir).parent / f"{base.name.rpartition('/')[2]}-{digest[:8]}"
    found = ExtendedBase(base, tokenizer, tuple(new), words, max(0, max(after.values()) + 1 - words), place)
    tables = found.tables
    if found.rows and not (tables and all(base.stored[name].dtype in FLOATS for name in tables)):
        raise Unsupported(
            "the base has no table of plain numbers that could get rows for the new tokens",
            where=folder,
            found=", ".join(f"{name} ({base.stored[name].dtype})" for name in tables) or "no known embedding",
            remedy="extend a copy of the base with transformers (resize_token_embeddings), and name that",
        )
    return found


def tokenizer_folder(config: TrainConfig, folder: Path) -> Path:
    """Returns where the tokenizer of a training is: the folder of its base, or the one that it names."""
    return folder if config.tokenizer is None else folder_of(config.tokenizer)


def add_tokens(tokenizer: Any, config: TrainConfig) -> Any:
    """Adds the tokens of a configuration that a tokenizer lacks to it; returns it.

    As in axolotl, a special token is new only where its row is learned, or is padding, which nothing learns.

    Raises:
        ConfigError: the tokenizer lacks a special token.
    """
    if not config.names_tokens:
        return tokenizer
    known = tokenizer.get_vocab()
    named = [
        token
        for key, token in config.special_tokens.items()
        if key == "pad_token" or _whole_modules(config) & TABLES
    ]
    for tokens, special in ((config.add_tokens, False), ((*config.add_special_tokens, *named), True)):
        added = [
            AddedToken(token, special=special, normalized=False) for token in tokens if token not in known
        ]
        tokenizer.add_tokens(added, special_tokens=special)
    known = tokenizer.get_vocab()
    if missing := [f"{key}: {token}" for key, token in config.special_tokens.items() if token not in known]:
        raise ConfigError(
            "the base's tokenizer has no such token",
            where="special_tokens",
            found=", ".join(missing),
            remedy="name one that it has; a new one is added if the embedding and the output head are "
            "trained whole (modules_to_save), or as one of add_special_tokens",
        )
    return tokenizer


def _whole_modules(config: TrainConfig) -> frozenset[str]:
    """Returns the last names of the modules that a configuration trains whole."""
    return frozenset(path.rpartition(".")[2] for path in config.method_config.modules_to_save)


def on_own_base(config: TrainConfig) -> TrainConfig:
    """Writes the base that a configuration extends, unless it is there, and returns the configuration of a
    training on it.

    Raises:
        ConfigError, Unsupported: see :func:`extended_base`.
        StorageError: the file system refuses.
    """
    extended = extended_base(config)
    if extended is None:
        return config
    said = f"{len(extended.tokens)} more tokens" if extended.tokens else "this tokenizer"
    with PartialState().main_process_first():
        if not extended.folder.exists():
            _write(extended)
    log.info("the base with %s is %s: packs of this training belong to it", said, extended.folder)
    frozen = sorted({name.split(".")[-2] for name in extended.tables} - _whole_modules(config))
    if {*extended.tokens} - {config.special_tokens.get("pad_token")} and frozen:
        log.warning(
            "the rows of the new tokens are not learned: they stay %s; name %s under modules_to_save",
            "the mean of the others" if extended.rows else "what the base has there",
            " and ".join(frozen),
        )
    return config.on_base(str(extended.folder))


def _write(extended: ExtendedBase) -> None:
    """Writes the folder of an extended base: what does not change is linked, or copied where the file system
    has no links.
    """
    base = extended.base
    tables = extended.tables if extended.rows else frozenset()
    with output_folder(extended.folder) as folder:
        extended.tokenizer.save_pretrained(folder)
        for shard in sorted({base.shard_of[name] for name in tables}):
            _write_shard(extended, shard, folder / shard)
        if tables:
            config = read_json(base.folder / CONFIG)
            for part in objects(config):
                if isinstance(part, dict) and part.get("vocab_size") == extended.words:
                    part["vocab_size"] += extended.rows
            write_json(folder / CONFIG, config)
        if tables and base.index is not None:
            more = sum(extended.rows * base.stored[name].nbytes // extended.words for name in tables)
            whole = {"total_size": more + sum(info.nbytes for info in base.stored.values())}
            write_json(folder / base.index_name, {**base.index, "metadata": whole})
        for path in sorted(base.folder.iterdir()):
            if path.is_file() and path.name not in _OF_TOKENIZER and not (folder / path.name).exists():
                link(path.resolve(), folder / path.name)
        base.require_unchanged()


def _write_shard(extended: ExtendedBase, shard: str, target: Path) -> None:
    """Copies a shard, and writes the new rows of its tables after theirs."""
    base = extended.base
    tensors = {name: base.view(name) for name in base.files[shard].tensors}
    for name in extended.tables & tensors.keys():
        table = tensors[name]
        mean = table.mean(axis=0, dtype=np.float64, keepdims=True).astype(table.dtype)
        tensors[name] = np.concatenate([table, *[mean] * extended.rows])
    safetensors.write(target, tensors, base.files[shard].metadata)
