"""Reads metadata of a base: tokenizer digests, chat template, pooling of embeddings, and the license in its
model card.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..io import open_inside, read_at_most, sha256_of
from ..manifest import PackTokenizer
from .base_folder import read_json
from .checkpoint import Checkpoint

TEMPLATE = "chat_template.jinja"
_CARD = "README.md"
_MAX_CARD = 64 << 10
_MAX_LICENSE = 200
_MAX_TEMPLATE = 4 << 20


def tokenizer_of(base: Checkpoint) -> PackTokenizer | None:
    """Returns the digests of the base's tokenizer and chat template; None if it has neither."""
    files = {
        field: base.folder / name
        for field, name in (("tokenizer_json", "tokenizer.json"), ("added_tokens", "added_tokens.json"))
    }
    digests = {field: sha256_of(path) if path.is_file() else None for field, path in files.items()}
    template = chat_template_of(base)
    tokenizer = PackTokenizer(
        **digests,
        chat_template=None if template is None else hashlib.sha256(template.encode("utf-8")).hexdigest(),
    )
    return None if tokenizer == PackTokenizer() else tokenizer


def chat_template_of(base: Checkpoint) -> str | None:
    """Returns the base's chat template, from its own file or ``tokenizer_config.json``; None if there is
    none.
    """
    return chat_template_in(base.folder)


def chat_template_in(folder: Path) -> str | None:
    """Returns the chat template in a folder, which may be a bundle's; like :func:`chat_template_of`."""
    file = folder / TEMPLATE
    config = folder / "tokenizer_config.json"
    if file.is_file():
        with open_inside(file) as template_file:
            return (
                read_at_most(template_file, _MAX_TEMPLATE)
                .decode("utf-8", errors="replace")
                .replace("\r\n", "\n")
                .replace("\r", "\n")
            )
    settings = read_json(config) if config.is_file() else {}
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    return template if isinstance(template, str) else None


def license_of(folder: Path) -> str | None:
    """Returns the license that the front matter of the base's card names on one line, or None."""
    card = folder / _CARD
    if not card.is_file():
        return None
    with open_inside(card) as file:
        first, *lines = read_at_most(file, _MAX_CARD).decode("utf-8", errors="replace").splitlines() or [""]
    if first.strip() != "---":
        return None
    for line in lines:
        key, colon, value = line.partition(":")
        if line.strip() == "---":
            return None
        if colon and key == "license":
            license_ = value.partition(" #")[0].strip().strip("'\"")
            return license_ if license_ and license_.isprintable() and len(license_) <= _MAX_LICENSE else None
    return None


def pooling_of(folder: Path) -> str:
    """Returns the pooling that the base declares for its embeddings, as sentence-transformers writes it; by
    default the mean.
    """
    path = folder / "1_Pooling" / "config.json"
    config = read_json(path, folder) if path.is_file() else {}
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
    }
    chosen = [name for key, name in names.items() if isinstance(config, dict) and config.get(key) is True]
    return chosen[0] if len(chosen) == 1 else "mean"
