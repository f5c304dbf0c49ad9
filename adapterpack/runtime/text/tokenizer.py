"""Tokenizes and decodes text with a bundle's own files: the ``tokenizers`` library for ids, the chat template
for messages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Core
from tokenizers.decoders import DecodeStream

from ...chat_templates.template import ChatTemplate, Message
from ...errors import ConfigError, FormatError, StorageError, Unsupported, excerpt
from ...extras import needed_by
from ...io import Json
from ...library_errors import library_errors
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox
from .encoding import EncodedText
from .model_files import read_bytes, read_object, read_text, token_ids
from .tokenizer_limits import is_quick, require_bounded_growth, require_bounded_load

MAX_TOKENIZER = 64 << 20
MAX_CHARACTERS = 1 << 20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a chat template can use, as in transformers."""
_FAILS = "the tokenizer fails on a text"
_REMEDY = "fetch tokenizer.json again from where it came"
_SANDBOX = Sandbox("adapterpack.runtime.text.encoding:encode", SandboxLimits(memory=512 << 20, seconds=3))
"""Runs the few tokenizers whose regular expressions may take any time. Their first text waits about a second,
until the sandbox has loaded the file.
"""
_HALF = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """The tokenizer in a folder, for texts of at most ``most`` characters. It reads other text files of the
    folder on first use, inside of the context ``reading``, which may check that they are unchanged.

    Raises:
        StorageError: the folder has no ``tokenizer.json``.
        FormatError: the file is damaged, too large, or built to be slow.
    """

    def __init__(
        self,
        folder: Path,
        most: int = MAX_CHARACTERS,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._reading = reading
        self.folder = folder
        self.path = folder / "tokenizer.json"
        self.most = most
        if not self.path.is_file():
            raise StorageError(
                "the bundle has no tokenizer",
                where=self.path,
                remedy="export from a base folder that holds tokenizer.json",
            )
        data = read_bytes(self.path, MAX_TOKENIZER)
        require_bounded_load(data, self.path)
        with self._errors("this is not a tokenizer"):
            self.core: Any = Core.from_buffer(data)
            self.core.no_padding()
            self.core.no_truncation()
        require_bounded_growth(self.core, self.path)
        self._slow = None if is_quick(self.core) else hashlib.sha256(data).hexdigest()

    @cached_property
    def config(self) -> Json:
        """The contents of ``tokenizer_config.json``."""
        with self._reading():
            return read_object(self._config)

    @property
    def _config(self) -> Path:
        return self.folder / "tokenizer_config.json"

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The ids at which generation ends."""
        with self._reading():
            return eos_ids(self.folder)

    @cached_property
    def pad_id(self) -> int:
        """The id that pads short rows; 0 without a padding token, since padding is masked."""
        token = self._token("pad_token")
        known = self.core.token_to_id(token) if token else None
        return int(known) if known is not None else 0

    @cached_property
    def template(self) -> str | None:
        """The chat template, or None if the folder has none."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            with self._reading():
                return read_text(path)
        inline = self.config.get("chat_template")
        if isinstance(inline, list):  # several by name
            named = [entry for entry in inline if isinstance(entry, dict) and entry.get("name") == "default"]
            if inline and not named:
                raise FormatError(
                    "none of the chat templates is the default",
                    where=f"{self._config}#chat_template",
                    expected="a text, or a list of templates with one that is called 'default'",
                )
            inline = named[0].get("template") if named else None
        if not isinstance(inline, str | None):
            raise FormatError(
                "the chat template is no text",
                where=f"{self._config}#chat_template",
                found=type(inline).__name__,
            )
        return inline

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.template or "", self.folder)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns the ids of a text, with the tokenizer's special tokens around it unless ``special`` is off.

        Raises:
            ConfigError: the text has half of a surrogate pair, which is no character.
            FormatError: the tokenizer fails on the text.
        """
        ids: list[int] = self._encode(text, add_special_tokens=special).ids
        return ids

    def row(self, text: str) -> list[int]:
        """Returns the ids of a text that forms a row by itself.

        Raises:
            ConfigError: the text has no tokens.
        """
        ids = self.encode(text)
        if not ids:
            raise ConfigError("a text has no tokens", found=repr(text))
        return ids

    def places(self, text: str) -> list[tuple[int, int, int | None]]:
        """Returns the character range of each id of a text, end exclusive, and the number of its word; a
        special token has an empty range.
        """
        row = self._encode(text)
        return [(*place, word) for place, word in zip(row.offsets, row.word_ids, strict=True)]

    def pair(self, first: str, second: str) -> tuple[list[int], list[int], list[tuple[int, int] | None]]:
        """Tokenizes two texts into one row. Returns its ids, their type ids, and for each id of the second
        text its character range there.
        """
        row = self._encode(first, second)
        places = [
            place if side == 1 else None for place, side in zip(row.offsets, row.sequence_ids, strict=True)
        ]
        return row.ids, row.type_ids, places

    def _encode(self, *texts: str, **options: Any) -> Any:
        for text in texts:
            if len(text) > self.most:
                raise ConfigError(
                    "a text is too long for the model",
                    expected=f"at most {self.most} characters",
                    found=len(text),
                    remedy="shorten it",
                )
            if not text.isascii() and _HALF.search(text):
                raise ConfigError(
                    "a text has half of a surrogate pair, which is no character",
                    found=excerpt(text),
                    remedy="write characters beyond U+FFFF as they are, or as two escapes",
                )
        if self._slow is not None:
            return encoded_apart(self.path, self._slow, texts, options, self.path)
        with self._errors(_FAILS):
            return self.core.encode(*texts, **options)

    @cached_property
    def for_grammars(self) -> Any:
        """The tokenizer in llguidance's form, for grammars; building it takes about a second, once.

        Raises:
            MissingExtra: llguidance is not installed.
            Unsupported: llguidance cannot derive the bytes of the tokens, or the tokenizer may take any time
                for a text.
        """
        with needed_by("a grammar of answers"):
            from llguidance import LLTokenizer  # noqa: PLC0415 - an extra

        if self._slow is not None:
            raise Unsupported(
                "with this tokenizer an answer cannot have a given form: it may take any time",
                where=self.path,
            )
        with library_errors(
            "llguidance",
            "with this tokenizer an answer cannot have a given form",
            where=self.path,
            kind=Unsupported,
        ):
            return LLTokenizer(self.core.to_str(), eos_token=sorted(self.eos_ids) or None)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that a chat template can use, by name."""
        return {name: self._token(name) for name in _SPECIAL if self._token(name)}

    def special_id(self, token: str) -> int | None:
        """Returns the id of a special token, or None for any other token."""
        return self._special_ids.get(token)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {
            token.content: number
            for number, token in self.core.get_added_tokens_decoder().items()
            if token.special
        }

    @property
    def mask_token(self) -> str:
        """The token that masks a word to be predicted, or an empty string."""
        return self._token("mask_token")

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token."""
        return self.core.token_to_id(self.mask_token) if self.mask_token else None

    def prompt(
        self,
        prompt: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        filled: Callable[[str], str] = str,
        values: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a prompt. A text becomes one user message, and the chat template, if there is
        one, renders the messages with the ``tools`` that the model may call, and with further ``values``.
        ``filled`` changes the text before it becomes ids.

        Raises:
            ConfigError: there is no chat template, and a message has content other than text.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.template is not None:
            return self.encode(filled(self.render(messages, tools, values)), special=False)
        contents = [message["content"] for message in messages]
        if not all(isinstance(content, str) for content in contents):
            raise ConfigError(
                "the content of a message is a text where there is no chat template",
                found=excerpt(contents),
            )
        return self.encode(filled("\n".join(contents)))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders messages with the chat template, the tools that the model may call, and further ``values``,
        up to the point where the answer begins. With the value ``continue_final_message`` that is the end of
        the last message's text, as in transformers.

        Raises:
            FormatError: the template does not render, or leaves out the message to be continued.
        """
        given = dict(values or {})
        continued = given.pop("continue_final_message", False)
        if continued:
            given["add_generation_prompt"] = False
        text = self._chat.render(
            messages, {**self.special_tokens, **given, **({"tools": list(tools)} if tools else {})}
        )
        return _before_end(text, str(messages[-1]["content"]), self.path) if continued else text

    def text_of(self, token: int) -> str:
        """Returns the text of one token of the vocabulary, such as a special one.

        Raises:
            ConfigError: there is no such token.
        """
        text: str | None = self.core.id_to_token(token)
        if text is None:
            raise ConfigError("the tokenizer has no such token", where=self.path, found=token)
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids. Special tokens have no text unless ``skip_special_tokens`` is off."""
        with self._errors("the tokenizer fails on its own ids"):
            text: str = self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stepper(self, skip_special_tokens: bool = True) -> Callable[[int], str | None]:
        """Returns a function that takes the ids of a row one by one and returns the text that each
        completes.
        """
        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        return lambda token: stream.step(self.core, token)

    def _token(self, name: str) -> str:
        value = self.config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str | None):
            raise FormatError(
                "a special token is no text", where=f"{self._config}#{name}", found=excerpt(value)
            )
        return text or ""

    def _errors(self, what: str) -> AbstractContextManager[None]:
        return library_errors("tokenizers", what, where=self.path, remedy=_REMEDY)


def _before_end(text: str, last: str, where: object) -> str:
    """Returns a rendered chat up to the end of its last message, whose spaces the template may have cut."""
    at = text.rfind(last.strip())
    if at < 0 or not last.strip():
        raise FormatError("the chat template leaves out the message that is to be continued", where=where)
    whole = last.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else last.strip())]


class NoTokenizer:
    """Replaces the tokenizer if a folder has none: answers then have ids but no text."""

    def __init__(self, folder: Path) -> None:
        self.eos_ids = eos_ids(folder)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns an empty text."""
        return ""

    def stepper(self, skip_special_tokens: bool = True) -> Callable[[int], str | None]:
        """Returns a function that yields no text."""
        return lambda token: ""


def eos_ids(folder: Path) -> frozenset[int]:
    """Returns the end-of-text ids that the model's files name."""
    # the first file with an entry counts, as in transformers
    for name in ("generation_config.json", "config.json"):
        ids = token_ids(read_object(folder / name), "eos_token_id", folder / name)
        if ids:
            return frozenset(ids)
    return frozenset()


def encoded_apart(
    path: Path, digest: str, texts: Sequence[str], options: Mapping[str, Any], where: Path
) -> EncodedText:
    """Tokenizes one or two texts in a sandbox process, with the ``tokenizer.json`` of that SHA-256.

    Raises:
        OutOfLimits: tokenizing takes too long, or too much memory.
        FormatError: the tokenizer fails.
    """
    request = json.dumps([str(path.absolute()), digest, list(texts), dict(options)])
    return EncodedText.parse(_SANDBOX.run(request.encode(), _FAILS, where, _REMEDY))
