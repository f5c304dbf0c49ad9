"""Logits processors: parameters that exclude tokens, or force one; and how the values of sampling parameters
are checked. Each processor registers itself under its name.

The processors are those of transformers (the ``generation_config.json`` of summarization and speech models
uses them) and apply in the order of ``GenerationMixin._get_logits_processor``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, excerpt
from ..text import MAX_ID

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
                found=excerpt(value),
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
    _require_list(name, ids, "these are not token ids", MAX_ENTRIES, "numbers")
    return tuple(int(TOKEN_ID.read(name, token)) for token in ids)


def _require_list(name: str, value: Any, wrong: str, most: int, entries: str) -> None:
    """Raises ConfigError with the text ``wrong`` unless a value is a list of at most ``most`` entries."""
    if isinstance(value, str) or not isinstance(value, Collection) or len(value) > most:
        raise ConfigError(wrong, where=name, found=excerpt(value), expected=f"at most {most} {entries}")


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


LONGEST_WORD = 64
"""The most tokens in one word of ``bad_words_ids``."""


class RowStart(NamedTuple):
    """What a processor knows about a row: the length of its ``prompt``, how many tokens may follow
    (``room``), its end tokens, and how many of its first tokens are ``forced``.
    """

    prompt: int
    room: int | None
    ends: np.ndarray
    forced: int = 0


LogitsProcessor = Callable[[np.ndarray, np.ndarray], None]
"""Changes the logits ``[vocabulary]`` of a row in place; the second argument holds all tokens of the row, its
prompt included.
"""

MakeProcessor = Callable[[Any, RowStart], LogitsProcessor]
"""Makes the processor for a value of the parameter and a row."""


class ProcessorKind(NamedTuple):
    """One parameter of :class:`.Sampling`: ``read(name, value)`` checks its value, ``unset`` is the value
    that means no processor, and ``rule(value, row)`` makes the processor for a row.
    """

    name: str
    unset: Any
    read: Callable[[str, Any], Any]
    rule: MakeProcessor


LOGITS_PROCESSORS: dict[str, ProcessorKind] = {}
"""Parameter -> its kind, in the order in which the processors apply."""


def make_processors(options: Any, row: RowStart) -> list[LogitsProcessor]:
    """Makes the processors of a row, for the parameters that are set."""
    values = ((rule, getattr(options, rule.name)) for rule in LOGITS_PROCESSORS.values())
    return [rule.rule(value, row) for rule, value in values if value != rule.unset]


def _register(
    name: str, unset: Any, read: Callable[[str, Any], Any]
) -> Callable[[MakeProcessor], MakeProcessor]:
    def registered(rule: MakeProcessor) -> MakeProcessor:
        LOGITS_PROCESSORS[name] = ProcessorKind(name, unset, read, rule)
        return rule

    return registered


def _ban(logits: np.ndarray, ids: np.ndarray) -> None:
    logits[ids[ids < len(logits)]] = -np.inf


def _force(name: str, ids: Sequence[int], logits: np.ndarray) -> None:
    require_in_vocabulary(name, max(ids), len(logits))
    logits[:] = -np.inf
    logits[list(ids)] = 0


def _optional(read: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    return None if value is None else read(name, value)


def _one_or_more(name: str, value: Any) -> tuple[int, ...]:
    """Reads one token id, or a list of them that is not empty."""
    ids = read_ids(name, value if isinstance(value, Collection) else [value])
    if not ids:
        raise ConfigError(
            "these are not token ids", where=name, found="none", expected=f"1 to {MAX_ENTRIES} numbers"
        )
    return ids


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    _require_list(name, value, "these are not words in token ids", MAX_ENTRIES, "lists")
    words = tuple(read_ids(name, word) for word in value)
    wrong = next((word for word in words if not 1 <= len(word) <= LONGEST_WORD), None)
    if wrong is not None:
        raise ConfigError(
            "a word has too few or too many tokens",
            where=name,
            found=len(wrong),
            expected=f"1 to {LONGEST_WORD}",
        )
    return words


_COUNT = Range(int, 0, MAX_TOKENS).read
_ONE = partial(_optional, TOKEN_ID.read)


@_register("no_repeat_ngram_size", 0, _COUNT)
def _no_repeats(size: int, row: RowStart) -> LogitsProcessor:
    """Excludes tokens that would complete an n-gram of ``size`` tokens which the row contains already."""

    def process(logits: np.ndarray, tokens: np.ndarray) -> None:
        if len(tokens) >= size:
            # Every n-gram of the row; those whose first n-1 tokens equal the row's last n-1 would be
            # completed again.
            windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
            _ban(logits, windows[(windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(axis=1), -1])

    return process


@_register("bad_words_ids", (), _words)
def _no_words(words: Sequence[tuple[int, ...]], row: RowStart) -> LogitsProcessor:
    """Excludes the last token of each word whose other tokens precede it. An end token alone is not treated
    as a word.
    """
    ends = set(row.ends.tolist())
    by_length = _by_length(word for word in words if len(word) > 1 or word[0] not in ends)
    largest = max(map(max, words))

    def process(logits: np.ndarray, tokens: np.ndarray) -> None:
        require_in_vocabulary("bad_words_ids", largest, len(logits))
        for same in by_length:
            before = same.shape[1] - 1
            if before <= len(tokens):
                _ban(logits, same[(same[:, :-1] == tokens[len(tokens) - before :]).all(axis=1), -1])

    return process


def _by_length(words: Iterable[tuple[int, ...]]) -> list[np.ndarray]:
    """Groups words by length, as one array for each length."""
    groups: dict[int, list[tuple[int, ...]]] = {}
    for word in words:
        groups.setdefault(len(word), []).append(word)
    return [np.array(group, np.intp) for group in groups.values()]


@_register("min_length", 0, _COUNT)
def _no_end_below(length: int, row: RowStart) -> LogitsProcessor:
    """Excludes end tokens while prompt and answer together are shorter. In an encoder-decoder the prompt is
    the decoder's first tokens.
    """

    def process(logits: np.ndarray, tokens: np.ndarray) -> None:
        if len(tokens) < length:
            _ban(logits, row.ends)

    return process


@_register("min_new_tokens", 0, _COUNT)
def _no_end_before(count: int, row: RowStart) -> LogitsProcessor:
    """Excludes end tokens while the answer is shorter."""
    return _no_end_below(row.prompt + count, row)


@_register("forced_bos_token_id", None, _ONE)
def _force_first(token: int, row: RowStart) -> LogitsProcessor:
    """Forces the token after a single first token."""

    def process(logits: np.ndarray, tokens: np.ndarray) -> None:
        if len(tokens) == 1:
            _force("forced_bos_token_id", [token], logits)

    return process


@_register("forced_eos_token_id", None, partial(_optional, _one_or_more))
def _force_last(ids: Sequence[int], row: RowStart) -> LogitsProcessor:
    """Forces the last token for which the row has room."""

    def process(logits: np.ndarray, tokens: np.ndarray) -> None:
        if row.room is not None and len(tokens) == row.prompt + row.room - 1:
            _force("forced_eos_token_id", ids, logits)

    return process


@_register("suppress_tokens", (), read_ids)
def _suppress(ids: Sequence[int], row: RowStart) -> LogitsProcessor:
    """Excludes these tokens everywhere."""
    banned = np.array(ids, np.intp)
    return lambda logits, tokens: _ban(logits, banned)


@_register("begin_suppress_tokens", (), read_ids)
def _suppress_at_first(ids: Sequence[int], row: RowStart) -> LogitsProcessor:
    """Excludes these tokens at the first position that is not forced."""
    banned = np.array(ids, np.intp)

    def process(logits: np.ndarray, tokens: np.ndarray) -> None:
        if len(tokens) == row.prompt + row.forced:
            _ban(logits, banned)

    return process


def _choices(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    _require_list(name, value, "these are no choices of first tokens", LONGEST_WORD, "lists")
    return tuple(_one_or_more(name, ids) for ids in value)


@_register("first_tokens", (), _choices)
def _choose_first(choices: Sequence[tuple[int, ...]], row: RowStart) -> LogitsProcessor:
    """Lets the row begin with one of the first choices, then one of the second, and so on, even those that
    another processor excludes.
    """
    largest = max(map(max, choices))

    def process(logits: np.ndarray, tokens: np.ndarray) -> None:
        require_in_vocabulary("first_tokens", largest, len(logits))
        if (place := len(tokens) - row.prompt) < len(choices):
            ids = list(choices[place])
            kept = logits[ids]
            logits[:] = -np.inf
            logits[ids] = kept if np.isfinite(kept).any() else 0

    return process
