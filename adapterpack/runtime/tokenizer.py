"""Text to ids and back, from a bundle's own files: ``tokenizers`` for the ids, a sandboxed jinja2 for the chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core

from ..chat import ChatTemplate, Message
from ..errors import StorageError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What a template knows beside the messages, as under transformers."""


class Tokenizer:
    """The tokenizer in a folder.

    Raises:
        StorageError: the folder has no ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise StorageError("the bundle has no tokenizer", where=path, remedy="export from a base folder that holds tokenizer.json")
        self.core: Any = Core.from_file(str(path))
        self.core.no_padding()
        self.core.no_truncation()

    @cached_property
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``."""
        return read_json(self.folder / "tokenizer_config.json")

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The ids at which generation ends."""
        for name in ("generation_config.json", "config.json"):  # the first that says it, as in transformers
            eos = read_json(self.folder / name).get("eos_token_id")
            if eos is not None:
                return frozenset([eos] if isinstance(eos, int) else eos)
        return frozenset()

    @cached_property
    def pad_id(self) -> int:
        """The id that fills up short rows; masked, so any id would do."""
        token = self._token("pad_token")
        known = self.core.token_to_id(token) if token else None
        return int(known) if known is not None else 0

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.template or "", self.folder)

    @cached_property
    def template(self) -> str | None:
        """The chat template, or None."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text("utf-8")
        inline = self.config.get("chat_template")
        if isinstance(inline, list):  # several by name
            inline = {entry["name"]: entry["template"] for entry in inline}.get("default")
        return inline if isinstance(inline, str) else None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text, with the tokenizer's own special tokens around it unless ``special`` is off."""
        ids: list[int] = self.core.encode(text, add_special_tokens=special).ids
        return ids

    def places(self, text: str) -> list[tuple[int, int]]:
        """Where each id of a text has its characters, the end excluded; a special token has none."""
        found: list[tuple[int, int]] = self.core.encode(text).offsets
        return found

    def pair(self, first: str, second: str) -> tuple[list[int], list[int], list[tuple[int, int] | None]]:
        """The ids of two texts in one row, their types, and of the ids of the second text where in it their characters are."""
        found = self.core.encode(first, second)
        places = [place if side == 1 else None for place, side in zip(found.offsets, found.sequence_ids, strict=True)]
        return found.ids, found.type_ids, places

    @property
    def mask_token(self) -> str:
        """The token in whose place a word is to be guessed, or nothing."""
        return self._token("mask_token")

    @property
    def mask_id(self) -> int | None:
        """Its id."""
        found: int | None = self.core.token_to_id(self.mask_token) if self.mask_token else None
        return found

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """The ids of a prompt: a text becomes one user message, and the chat template (if any) renders the messages."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.template is None:
            return self.encode("\n".join(message["content"] for message in messages))
        return self.encode(self.render(messages), special=False)

    def render(self, messages: Sequence[Message]) -> str:
        """The messages in the template's form, ready for the model's answer.

        Raises:
            FormatError: the template does not render.
        """
        special = {name: self._token(name) for name in _SPECIAL if self._token(name)}
        return self._chat.render(messages, special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        text: str = self.core.decode(list(ids), skip_special_tokens=True)
        return text

    def _token(self, name: str) -> str:
        value = self.config.get(name)
        return value if isinstance(value, str) else (value or {}).get("content", "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a bundle, or nothing where there is none."""
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return loaded
