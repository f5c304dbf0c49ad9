"""The text and bytes of single tokens, for lists of log-probabilities."""

from __future__ import annotations

import re

from ...runtime import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD = "\u2581"
"""The character that represents a space in SentencePiece tokens."""


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens, by id. A token may be part of a character; its text then has a
    replacement character, while its bytes are exact.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._core = tokenizer.core
        self._decode = tokenizer.core.decode
        self._known: dict[int, tuple[str, bytes]] = {}
        by_bytes = all(self._core.token_to_id(character) is not None for character in _BYTES)
        self._bytes = _BYTES if by_bytes else {}

    def of(self, token: int) -> tuple[str, bytes]:
        """Returns the text and the bytes of a token."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> tuple[str, bytes]:
        written: str = self._core.id_to_token(token) or ""
        if match := _BYTE.fullmatch(written):
            data = bytes([int(match[1], 16)])
        elif self._bytes and written and all(character in self._bytes for character in written):
            data = bytes(self._bytes[character] for character in written)
        elif written.startswith(_WORD):
            data = written.replace(_WORD, " ").encode()
        else:
            data = (self._decode([token], skip_special_tokens=False) or written).encode()
        return data.decode("utf-8", "replace"), data


def _byte_characters() -> dict[str, int]:
    """Returns the characters that represent bytes in byte-level tokenizers: printable bytes as themselves,
    others from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(0x100 + number): byte for number, byte in enumerate(others)},
    }


_BYTES = _byte_characters()
