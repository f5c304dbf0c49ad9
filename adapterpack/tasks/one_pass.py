"""Tasks that answer a row with one pass of a graph: how a row becomes inputs, and how its outputs become a
result.

Rows are prepared and answered one by one, so that the caller may put any rows into one batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, excerpt, nearest
from .data import Result, Row, text_of
from .session import Arrays, RowHead, RowInputs


class PreparedRow(NamedTuple):
    """A row ready to run: its ``inputs``, arrays ``[1, ...]`` without padding, and the ``notes`` needed for
    its result. ``positions`` is how much of a pass a row without tokens takes.
    """

    inputs: Arrays
    notes: Any = None
    positions: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens; 0 for an image."""
        ids = self.inputs.get("input_ids")
        return 0 if ids is None else int(ids.shape[1])


@dataclass(frozen=True)
class NoOptions:
    """The options of a task without options."""


@dataclass(frozen=True)
class OnePass:
    """How to answer the rows of a task.

    Args:
        prepare: (session, row, options) -> the row's inputs. It detects problems of a row before the row
            runs.
        result: (session, prepared row, its outputs ``[1, ...]``, its head, options) -> the result for the
            row. Outputs along tokens may be longer than the row, because padding follows its tokens.
        options: the class of a request's options, which checks them.
    """

    prepare: Callable[[RowInputs, Row, Any], PreparedRow]
    result: Callable[[RowInputs, PreparedRow, Arrays, RowHead, Any], Result]
    options: type = NoOptions

    def options_of(self, given: Mapping[str, Any]) -> Any:
        """Checks the options of a request and returns them.

        Raises:
            ConfigError: the task does not have an option, or a value is invalid.
        """
        known = [field.name for field in dataclasses.fields(self.options)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    "this task has no such option",
                    found=repr(name),
                    remedy=nearest(name, known) if known else "leave it out",
                )
        return self.options(**given)


def text_inputs(session: RowInputs, row: Row) -> Arrays:
    """Returns the inputs of a row with a text, a pair of texts (``text`` and ``text_pair``) or, in place of
    both, token ids (``input_ids``).

    Raises:
        ConfigError: the row has none of these, or a text without a token.
    """
    if "input_ids" in row and not {"text", "prompt"} & row.keys():
        return _ids(row["input_ids"])
    if row.get("text_pair") is None:
        return session.encode([text_of(row)])
    if not isinstance(row["text_pair"], str):
        raise ConfigError(
            "the second text of a pair is no text", where="text_pair", found=type(row["text_pair"]).__name__
        )
    return session.encode_pairs([(text_of(row), row["text_pair"])])[0]


def _ids(ids: Any) -> Arrays:
    if (
        not isinstance(ids, Sequence)
        or not ids
        or not all(type(token) is int and token >= 0 for token in ids)
    ):
        raise ConfigError(
            "these are not token ids",
            where="input_ids",
            expected="a list of numbers from 0",
            found=excerpt(ids),
        )
    array = np.array([ids], np.int64)
    return {"input_ids": array, "attention_mask": np.ones_like(array)}
