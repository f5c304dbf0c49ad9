"""Text to ids and back, from a bundle's own files: ``tokenizers`` for the ids, the chat template for
messages.
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

from ...chat.template import ChatTemplate, Message
from ...errors import ConfigError, FormatError, StorageError, Unsupported
from ...extras import needed_by
from ...library_errors import library_errors
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox
from .encoding import EncodedText
from .model_files import read_bytes, read_object, read_text, token_ids
from .tokenizer_limits import is_quick, require_bounded_growth, require_bounded_load

MAX_TOKENIZER = 64 << 20
MAX_CHARACTERS = 1 << 20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What a template knows besides the messages, as under transformers."""
_FAILS, _REMEDY = "the tokenizer fails on a text", "fetch tokenizer.json again from where it came"
_SANDBOX = Sandbox("adapterpack.runtime.text.encoding:encode", SandboxLimits(memory=512 << 20, seconds=3))
"""Where the few tokenizers work whose expressions may take any time. The first text of one waits until it is
loaded, a second or so.
"""
_HALF = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """The tokenizer in a folder, for texts of at most ``most`` characters. What else the folder says of texts
    is read when it is first needed, each time inside of ``reading``, which may look that the files are still
    the same.

    Raises:
        StorageError: the folder has no ``tokenizer.json``.
        FormatError: it is damaged, too large, or made to be slow.
    """

    def __init__(
        self,
        folder: Path,
        most: int = MAX_CHARACTERS,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._reading = reading
        self.folder, self.path, self.most = folder, folder / "tokenizer.json", most
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
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``."""
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
        """The id that fills up short rows; masked, so any id would do."""
        token = self._token("pad_token")
        known = self.core.token_to_id(token) if token else None
        return int(known) if known is not None else 0

    @cached_property
    def template(self) -> str | None:
        """The chat template, or None."""
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
        """The ids of a text, with the tokenizer's own special tokens around it unless ``special`` is off.

        Raises:
            ConfigError: the text has half of a surrogate pair, which is no character.
            FormatError: the tokenizer fails on it.
        """
        ids: list[int] = self._encode(text, add_special_tokens=special).ids
        return ids

    def row(self, text: str) -> list[int]:
        """The ids of a text that is a row for itself.

        Raises:
            ConfigError: there are none.
        """
        ids = self.encode(text)
        if not ids:
            raise ConfigError("a text has no tokens", found=repr(text))
        return ids

    def places(self, text: str) -> list[tuple[int, int]]:
        """Where each id of a text has its characters, the end excluded; a special token has none."""
        places: list[tuple[int, int]] = self._encode(text).offsets
        return places

    def pair(self, first: str, second: str) -> tuple[list[int], list[int], list[tuple[int, int] | None]]:
        """The ids of two texts in one row, their types, and of the ids of the second text where in it their
        characters are.
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
                    found=repr(text)[:80],
                    remedy="write characters beyond U+FFFF as they are, or as two escapes",
                )
        if self._slow is not None:
            return encoded_apart(self.path, self._slow, texts, options, self.path)
        with self._errors(_FAILS):
            return self.core.encode(*texts, **options)

    @cached_property
    def for_grammars(self) -> Any:
        """The tokens as llguidance reads them, for grammars of answers; that takes a second or so, once.

        Raises:
            MissingExtra: llguidance is not installed.
            Unsupported: it cannot tell the bytes of the tokens, or the tokenizer may take any time for a
                text.
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
        """The special tokens that a chat template knows, by their names."""
        return {name: self._token(name) for name in _SPECIAL if self._token(name)}

    def special_id(self, token: str) -> int | None:
        """The id of a special token, for which no text stands; None of any other."""
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
        """The token in whose place a word is to be guessed, or nothing."""
        return self._token("mask_token")

    @property
    def mask_id(self) -> int | None:
        """Its id."""
        found: int | None = self.core.token_to_id(self.mask_token) if self.mask_token else None
        return found

    def prompt(self, prompt: str | Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids of a prompt: a text becomes one user message, and the chat template (if any) renders the
        messages, with ``tools`` that the model may call.

        Raises:
            ConfigError: without a chat template, messages whose content is no text.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.template is not None:
            return self.encode(self.render(messages, tools), special=False)
        contents = [message["content"] for message in messages]
        if not all(isinstance(content, str) for content in contents):
            raise ConfigError(
                "the content of a message is a text where there is no chat template",
                found=repr(contents)[:80],
            )
        return self.encode("\n".join(contents))

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The messages in the template's form, with the tools that the model may call, ready for its answer.

        Raises:
            FormatError: the template does not render.
        """
        return self._chat.render(
            messages, {**self.special_tokens, **({"tools": list(tools)} if tools else {})}
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; special tokens have none, unless that is off."""
        with self._errors("the tokenizer fails on its own ids"):
            text: str = self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stepper(self, skip_special_tokens: bool = True) -> Callable[[int], str | None]:
        """A function of the next id of a row, which gives the text that is complete with it."""
        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        return lambda token: stream.step(self.core, token)

    def _token(self, name: str) -> str:
        value = self.config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str | None):
            raise FormatError(
                "a special token is no text", where=f"{self._config}#{name}", found=repr(value)[:80]
            )
        return text or ""

    def _errors(self, what: str) -> AbstractContextManager[None]:
        return library_errors("tokenizers", what, where=self.path, remedy=_REMEDY)


class NoTokenizer:
    """Stands for the tokenizer where a folder has none: answers are ids, and have no text."""

    def __init__(self, folder: Path) -> None:
        self.eos_ids = eos_ids(folder)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """No text."""
        return ""

    def stepper(self, skip_special_tokens: bool = True) -> Callable[[int], str | None]:
        """A function that gives no text."""
        return lambda token: ""


def eos_ids(folder: Path) -> frozenset[int]:
    """The ids at which generation ends, as the model's files say."""
    for name in ("generation_config.json", "config.json"):  # the first that says it, as in transformers
        ids = token_ids(read_object(folder / name), "eos_token_id", folder / name)
        if ids:
            return frozenset(ids)
    return frozenset()


def encoded_apart(
    path: Path, digest: str, texts: Sequence[str], options: Mapping[str, Any], where: Path
) -> EncodedText:
    """One text or two as a row, by a ``tokenizer.json`` with that sha256, in a process with limits.

    Raises:
        OutOfLimits: it takes too long, or too much memory.
        FormatError: the tokenizer fails.
    """
    request = json.dumps([str(path.absolute()), digest, list(texts), dict(options)])
    return EncodedText.parse(_SANDBOX.run(request.encode(), _FAILS, where, _REMEDY))
