"""What lies beside a base's weights and belongs to its identity: the tokenizer, the chat template, the license of its card."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..io.hashing import sha256_of
from ..manifest.parts import Tokenizer
from .checkpoint import Checkpoint, read_json

TEMPLATE = "chat_template.jinja"
_CARD = "README.md"
_MAX_CARD = 64 << 10
_MAX_LICENSE = 200


def base_template(base: Checkpoint) -> str | None:
    """The base's chat template: its own file, or what ``tokenizer_config.json`` says."""
    own, config = base.folder / TEMPLATE, base.folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text("utf-8", errors="replace")
    value: Any = read_json(config) if config.is_file() else {}
    found = value.get("chat_template") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def tokenizer_of(base: Checkpoint) -> Tokenizer | None:
    """The digests of the base's tokenizer and chat template; None for a base without either."""
    files = {field: base.folder / name for field, name in (("tokenizer_json", "tokenizer.json"), ("added_tokens", "added_tokens.json"))}
    digests = {field: sha256_of(path) if path.is_file() else None for field, path in files.items()}
    template = base_template(base)
    known = Tokenizer(**digests, chat_template=None if template is None else hashlib.sha256(template.encode("utf-8")).hexdigest())
    return None if known == Tokenizer() else known


def license_of(folder: Path) -> str | None:
    """The license that the front matter of the base's card names on one line, or None."""
    card = folder / _CARD
    if not card.is_file():
        return None
    with card.open("rb") as file:
        first, *lines = file.read(_MAX_CARD).decode("utf-8", errors="replace").splitlines() or [""]
    if first.strip() != "---":
        return None
    for line in lines:
        key, colon, value = line.partition(":")
        if line.strip() == "---":
            return None
        if colon and key == "license":
            told = value.partition(" #")[0].strip().strip("'\"")
            return told if told and told.isprintable() and len(told) <= _MAX_LICENSE else None
    return None
