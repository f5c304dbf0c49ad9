"""Chooses the next token of each row of a batch from its logits. A row's result depends on the row alone, bit
for bit.

Each row is worked on by itself, with operations over its whole vocabulary: a row of 128k logits stays in the
processor's cache, and sums come out the same in any batch. The vocabulary is never sorted.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from ...errors import AdapterpackError, ConfigError, NonFinite
from .bounds import require_in_vocabulary
from .logits_processors import LOGITS_PROCESSORS, RowStart, make_processors
from .sampling import Sampling

Logprobs = tuple[tuple[int, float], ...]
_NONE = np.float32(-np.inf)
_COLDEST = 1e-30
"""A temperature that is a normal number in float32."""
_BLOCK = 512
FEWER = f"give fewer of logit_bias, {', '.join(LOGITS_PROCESSORS)}, json_schema, regex and grammar"
"""What to do where the parameters exclude all tokens."""


class SampledToken(NamedTuple):
    """A row's next token; its log-probability and the likeliest tokens with theirs, likeliest first, if the
    row wants them. With an ``error`` the row has no next token.
    """

    token: int
    logprob: float | None = None
    top_logprobs: Logprobs = ()
    error: AdapterpackError | None = None


class TokenMask(Protocol):
    """Which tokens may be next in a row, by a grammar."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but an end token."""

    @property
    def pending(self) -> Future[Any] | None:
        """What still computes beside the engine's steps which tokens may be next: :meth:`allowed` waits for
        it.
        """

    def allowed(self, vocabulary: int) -> np.ndarray:
        """Whether each token may be next, ``[vocabulary]`` bool."""

    def accept(self, token: int) -> None:
        """Takes the row's next token."""

    def copy(self) -> Self:
        """The mask of another row that is as far as this one."""


class Sampler:
    """How one row's tokens are chosen, and what its choices so far mean for the next one.

    ``prompt`` are the row's tokens at the beginning; ``ends`` those at which it ends. ``stream`` tells apart
    rows of one seed. ``room`` says how many tokens the row may have.
    """

    def __init__(
        self,
        options: Sampling,
        prompt: Sequence[int] = (),
        ends: Collection[int] = (),
        mask: TokenMask | None = None,
        stream: int = 0,
        room: int | None = None,
    ) -> None:
        self.options, self.mask = options, mask
        self._draws = np.random.default_rng([options.seed % (1 << 64), stream])
        self._ends = np.array(sorted(ends), np.intp)
        self._bias = (
            np.array(list(options.logit_bias), np.intp),
            np.array(list(options.logit_bias.values()), np.float32),
        )
        forced = int(len(prompt) <= 1 and options.forced_bos_token_id is not None)
        self._processors = make_processors(options, RowStart(len(prompt), room, self._ends, forced))
        self._row = np.array(prompt if self._processors else (), np.intp)
        """Prompt and answer, where a rule reads them."""
        self._penalized = (
            options.repetition_penalty != 1 or options.presence_penalty != 0 or options.frequency_penalty != 0
        )
        self._tokens = np.unique(np.array(prompt if self._penalized else (), np.intp))
        """The tokens of prompt and answer, each once, and below how often they are in the answer."""
        self._counts = np.zeros(len(self._tokens), np.float32)
        self._places = {token: place for place, token in enumerate(self._tokens.tolist())}

    @property
    def finished(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self.mask is not None and self.mask.finished

    @property
    def pending(self) -> Future[Any] | None:
        """What the next choice would wait for."""
        return None if self.mask is None else self.mask.pending

    def next(self, logits: np.ndarray) -> SampledToken:
        """The row's next token from its logits ``[vocabulary]``. The next call is for the token behind it.

        Raises:
            NonFinite: the logits have NaN or +infinity, or are all -infinity.
            ConfigError: a parameter names a token that the model does not have, or no token may follow.
        """
        logits = logits.astype(np.float32)  # a copy
        top = logits.max()
        if not np.isfinite(top):  # NaN is the largest of its array
            raise NonFinite("the model's logits are not finite", found=top)
        logprobs = None if self.options.logprobs is None else _log_total(logits, top)
        original = logits if logprobs is None else logits.copy()
        token = self._choose(self.process_logits(logits))
        self.accept(token)
        if logprobs is None:
            return SampledToken(token)
        return SampledToken(
            token,
            float(original[token]) - logprobs,
            _top_logprobs(original, self.options.logprobs or 0, logprobs),
        )

    def process_logits(self, logits: np.ndarray) -> np.ndarray:
        """The logits ``[vocabulary]`` float32 with the row's bias, penalties and rules; in place.

        Raises:
            ConfigError: a parameter names a token that the model does not have.
        """
        options, size = self.options, len(logits)
        for name, named in (("logit_bias", options.logit_bias), ("stop_token_ids", options.stop_token_ids)):
            require_in_vocabulary(name, max(named, default=0), size)
        ids, bias = self._bias
        logits[ids] += bias
        if self._penalized:
            known = self._tokens < size  # a prompt may have tokens that stand for images, and have no logits
            tokens, counts = self._tokens[known], self._counts[known]
            values = logits[tokens]
            values = np.where(
                values < 0,
                values * np.float32(options.repetition_penalty),
                values / np.float32(options.repetition_penalty),
            )
            values -= np.float32(options.frequency_penalty) * counts + np.float32(
                options.presence_penalty
            ) * (counts > 0)
            logits[tokens] = values
        for process in self._processors:
            process(logits, self._row)
        return logits

    def _choose(self, logits: np.ndarray) -> int:
        ids = None if self.mask is None else np.flatnonzero(self.mask.allowed(len(logits)))
        values = logits if ids is None else logits[ids]
        place = int(values.argmax()) if len(values) else 0
        if not len(values) or not np.isfinite(values[place]):
            raise ConfigError("no token may follow", where="the row's parameters", remedy=FEWER)
        if self.options.temperature:
            places, weights = candidates(values, self.options)
            place = int(places[_at(weights, self._draws.random())])
        return place if ids is None else int(ids[place])

    def log_probs(self, logits: np.ndarray) -> np.ndarray:
        """The log-probabilities of the row's next token ``[vocabulary]`` float32, with bias and penalties on
        them, as transformers has them in a beam search; -infinity of tokens that may not follow.

        Raises:
            NonFinite, ConfigError: as :meth:`next`.
        """
        logits = logits.astype(np.float32)
        top = logits.max()
        if not np.isfinite(top):
            raise NonFinite("the model's logits are not finite", found=top)
        scores = self.process_logits(logits - np.float32(_log_total(logits, top)))
        if self.mask is not None:
            scores[~self.mask.allowed(len(scores))] = _NONE
        return scores

    def fork(self) -> Sampler:
        """The sampler of another row that is as far as this one."""
        other = copy.copy(self)
        other.mask, other._counts, other._places = (
            self.mask and self.mask.copy(),
            self._counts.copy(),
            dict(self._places),
        )
        return other

    def accept(self, token: int) -> None:
        """Takes the row's next token."""
        if self.mask is not None and token not in self._ends:
            self.mask.accept(token)
        if self._processors:
            self._row = np.append(self._row, token)  # another array: that of a fork stays as it is
        if self._penalized:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._tokens, self._counts = (
                    np.append(self._tokens, token),
                    np.append(self._counts, np.float32(0)),
                )
            self._counts[place] += 1


def sample(logits: np.ndarray, rows: Sequence[Sampler]) -> list[SampledToken]:
    """The next token of each row from ``logits`` ``[rows, vocabulary]``, of any floating type. A row that has
    none is a choice with an error; the others have theirs.
    """
    choices = []
    for row, sampler in zip(logits, rows, strict=True):
        try:
            choices.append(sampler.next(row))
        except AdapterpackError as error:
            choices.append(SampledToken(-1, error=error))
    return choices


def candidates(logits: np.ndarray, options: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens to draw from, in order, by float32 logits; and weights in proportion to their
    probabilities.
    """
    places, top = np.arange(len(logits)), logits.max()
    if 0 < options.top_k < len(logits):
        places = np.flatnonzero(logits >= _largest(logits, options.top_k))
        logits = logits[places]
    weights = logits - top
    with np.errstate(over="ignore"):  # what is too unlikely becomes 0
        weights /= np.float32(max(options.temperature, _COLDEST))
    np.exp(weights, out=weights)
    if options.top_p < 1 or options.min_p:
        heavy = _heavy(weights, options.top_p, options.min_p)
        places, weights = places[heavy], weights[heavy]
    return places, weights


def _largest(values: np.ndarray, count: int) -> np.float32:
    """The least of the ``count`` largest values."""
    value: np.float32 = np.partition(values, -count)[-count]
    return value


def _heavy(weights: np.ndarray, top_p: float, min_p: float) -> np.ndarray:
    """The places of the fewest weights that make up ``top_p`` of the whole, without those below ``min_p``.
    The largest weight is 1.
    """
    if top_p == 1:
        return np.flatnonzero(weights >= min_p)
    total = float(weights.sum(dtype=np.float64))
    spare = (1 - top_p) * total
    # all others together are not more than what is spared
    places = np.flatnonzero(weights >= spare / len(weights))
    heavy = weights[places]
    return places[
        heavy >= max(_first_above(heavy, spare - (total - float(heavy.sum(dtype=np.float64)))), min_p)
    ]


def _first_above(values: np.ndarray, share: float) -> np.float32:
    """The least value that makes the sum of those from the smallest up to it larger than ``share``."""
    while len(values) > _BLOCK:
        half = len(values) // 2
        values = np.partition(values, half)
        smaller = float(values[:half].sum(dtype=np.float64))
        values, share = (values[:half], share) if smaller > share else (values[half:], share - smaller)
    values = np.sort(values)
    value: np.float32 = values[
        np.searchsorted(np.cumsum(values[:-1].astype(np.float64)), share, side="right")
    ]
    return value


def _at(weights: np.ndarray, share: float) -> int:
    """The first place up to which the weights make up more than this share of the whole."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    point = share * blocks[-1]
    block = int(np.searchsorted(blocks, point, side="right"))
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64))
    # both sums are rounded
    point = min(point - (blocks[block - 1] if block else 0.0), np.nextafter(inside[-1], 0))
    return block * _BLOCK + int(np.searchsorted(inside, point, side="right"))


def _log_total(logits: np.ndarray, top: np.float32) -> float:
    return float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))


def _top_logprobs(logits: np.ndarray, count: int, total: float) -> Logprobs:
    if not count:
        return ()
    ids = np.flatnonzero(logits >= _largest(logits, min(count, len(logits))))
    order = ids[np.lexsort((ids, -logits[ids]))][:count]
    return tuple((int(token), float(logits[token]) - total) for token in order)
