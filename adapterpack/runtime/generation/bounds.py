"""Checks the values of sampling parameters: numbers within bounds, and lists of token ids."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..text.model_files import MAX_ID

MAX_TOKENS = (1 << 31) - 1
MAX_ENTRIES = 1024
"""The most entries of ``logit_bias``, ``stop_token_ids`` and ``bad_words_ids``.
"""


class Range(NamedTuple):
    """The range of a number; with ``above`` it excludes ``least``."""

    kind: type[int] | type[float]
    least: float
    most: float
    above: bool = False

    def read(self, name: str, value: Any) -> int | float:
        """Checks a parameter and returns its value as ``kind``.

        Raises:
            ConfigError: the value is no number of that kind, or out of range.
        """
        right = isinstance(value, Integral if self.kind is int else Real) and not isinstance(value, bool)
        if not right or not self.least <= value <= self.most or (self.above and value == self.least):
            raise ConfigError(
                "a sampling parameter is out of range",
                where=name,
                found=repr(value)[:80],
                expected=f"a {'whole ' * (self.kind is int)}number {'above' if self.above else 'from'} "
                f"{self.least} {'and up ' * self.above}to {self.most}",
            )
        return self.kind(value)


TOKEN_ID = Range(int, 0, MAX_ID)


def read_ids(name: str, ids: Any) -> tuple[int, ...]:
    """Checks a parameter that is a list of token ids, and returns it as a tuple.

    Raises:
        ConfigError: the value is no list of token ids.
    """
    if isinstance(ids, str) or not isinstance(ids, Collection) or len(ids) > MAX_ENTRIES:
        raise ConfigError(
            "these are no token ids",
            where=name,
            found=repr(ids)[:80],
            expected=f"at most {MAX_ENTRIES} numbers",
        )
    return tuple(int(TOKEN_ID.read(name, token)) for token in ids)


def require_in_vocabulary(name: str, largest: int, size: int) -> None:
    """Checks that a parameter names only tokens that the model has.

    Raises:
        ConfigError: ``largest`` is outside of the vocabulary.
    """
    if largest >= size:
        raise ConfigError(
            "a parameter names a token that the model does not have",
            where=name,
            found=largest,
            expected=f"at most {size - 1}",
        )
