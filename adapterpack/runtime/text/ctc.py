"""Reads the ids that a model of speech gives frame by frame as text, by connectionist temporal classification
(CTC).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FormatError
from .model_files import read_object


class SpokenWord(NamedTuple):
    """A word, and the frames from ``start`` to before ``end`` in which it is spoken."""

    text: str
    start: int
    end: int


class Characters:
    """A vocabulary of characters as Wav2Vec2CTCTokenizer stores it: ``vocab.json``, with a token between
    words.

    Raises:
        FormatError: the file is not a vocabulary of one language.
    """

    def __init__(self, folder: Path) -> None:
        self._settings, ids = (
            read_object(folder / "tokenizer_config.json"),
            read_object(folder / "vocab.json"),
        )
        if not ids or not all(type(number) is int for number in ids.values()):
            raise FormatError(
                "this is not a vocabulary of one language",
                where=folder / "vocab.json",
                remedy="save the tokenizer of one language: set_target_lang, then save_pretrained",
            )
        self._tokens = {number: token for token, number in ids.items()}
        self._between = self._setting("word_delimiter_token", "|")

    def _setting(self, name: str, usual: str) -> str:
        value: Any = self._settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else usual

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without repetitions and blanks."""
        space = self._setting("replace_word_delimiter_char", " ")
        tokens = (self._tokens.get(number, "") for number in ids)
        text = "".join(space if token == self._between else token for token in tokens).strip()
        return text.lower() if self._settings.get("do_lower_case") is True else text

    def words(self, spoken: Sequence[tuple[int, int, int]]) -> Iterator[SpokenWord]:
        """Yields the words of ids with their frames."""
        for between, group in groupby(spoken, lambda one: self._tokens.get(one[0]) == self._between):
            if not between:
                own = [*group]
                yield SpokenWord(self.text([number for number, _, _ in own]), own[0][1], own[-1][2])


def collapse(ids: Sequence[int], blank: int) -> list[tuple[int, int, int]]:
    """Returns the ids of frames without repetitions and without ``blank``, each with its first frame and the
    one after its last (Graves et al. 2006, section 3.1, the greedy path).

    Example:
        >>> collapse([5, 5, 0, 5, 7], 0)
        [(5, 0, 2), (5, 3, 4), (7, 4, 5)]
    """
    spoken = []
    start = 0
    for number, group in groupby(ids):
        end = start + sum(1 for _ in group)
        if number != blank:
            spoken.append((int(number), start, end))
        start = end
    return spoken
