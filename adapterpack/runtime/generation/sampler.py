"""Samples the next token of a row from its logits.

Each row is processed by itself, so that the result is the same in any batch, bit for bit; 128k logits fit the
CPU's cache. The vocabulary is never sorted; partitions find the largest logits faster.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, NonFinite
from .logits_processors import LOGITS_PROCESSORS, RowStart, make_processors, require_in_vocabulary
from .sampling import Sampling
from .structured import TokenMask

Logprobs = tuple[tuple[int, float], ...]
_NONE = np.float32(-np.inf)
_COLDEST = 1e-30
"""The least temperature to divide by; still a normal number in float32."""
_BLOCK = 512
_LIKELY = (1e-3, 1e-5)
"""Weights of which those that top_p keeps are looked for first, where smaller ones cannot be among them."""
_PEAKED = 64.0
"""The total, in weights of the largest, up to which few tokens are likely."""
FEWER = f"give fewer of logit_bias, {', '.join(LOGITS_PROCESSORS)}, json_schema, regex and grammar"
"""The remedy in errors about parameters that exclude every token."""


class SampledToken(NamedTuple):
    """The next token of a row. If the row asks for them, it has the token's log-probability, and the most
    likely tokens with theirs, in descending order.
    """

    token: int
    logprob: float | None = None
    top_logprobs: Logprobs = ()


class Sampler:
    """Chooses the tokens of one row, and keeps the state that its penalties, processors and random draws
    need.

    ``prompt`` are the first tokens of the row, ``ends`` its end tokens. ``stream`` gives rows with one seed
    different draws. ``room`` is the most tokens that the row may take.
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
        forced = len(options.first_tokens) or int(
            len(prompt) <= 1 and options.forced_bos_token_id is not None
        )
        self._processors = make_processors(options, RowStart(len(prompt), room, self._ends, forced))
        self._row = np.array(prompt if self._processors else (), np.intp)
        """The tokens of prompt and answer, kept only for processors that read them."""
        self._penalized = (
            options.repetition_penalty != 1 or options.presence_penalty != 0 or options.frequency_penalty != 0
        )
        self._changes = bool(options.logit_bias or self._penalized or self._processors)
        """Whether :meth:`process_logits` changes the logits."""
        self._tokens = np.unique(np.array(prompt if self._penalized else (), np.intp))
        """The distinct tokens of prompt and answer; ``_counts`` has how often each occurs in the answer."""
        self._counts = np.zeros(len(self._tokens), np.float32)
        self._places = {token: place for place, token in enumerate(self._tokens.tolist())}

    @property
    def finished(self) -> bool:
        """Whether the grammar permits nothing but an end token."""
        return self.mask is not None and self.mask.finished

    @property
    def pending(self) -> Future[Any] | None:
        """The computation for which the next choice would wait."""
        return None if self.mask is None else self.mask.pending

    def next(self, logits: np.ndarray) -> SampledToken:
        """Chooses the next token of the row from its logits ``[vocabulary]``, and advances the state by it.

        Raises:
            NonFinite: the logits have NaN or +infinity, or are all -infinity.
            ConfigError: a parameter names a token that the model does not have, or no token is left.
        """
        logits = logits.astype(np.float32, copy=self._changes)
        place = int(logits.argmax())
        if not np.isfinite(logits[place]):  # argmax finds the first NaN
            raise NonFinite("the model's logits are not finite", found=logits[place])
        count = self.options.logprobs
        original = logits.copy() if count is not None and self._changes else logits
        token = self._choose(self.process_logits(logits), None if self._changes else place)
        self.accept(token)
        if count is None:
            return SampledToken(token)
        return scored(original, token, count)

    def process_logits(self, logits: np.ndarray) -> np.ndarray:
        """Applies the row's bias, penalties and processors to logits ``[vocabulary]`` float32, in place, and
        returns them.

        Raises:
            ConfigError: a parameter names a token that the model does not have.
        """
        options = self.options
        size = len(logits)
        for name, named in (("logit_bias", options.logit_bias), ("stop_token_ids", options.stop_token_ids)):
            require_in_vocabulary(name, max(named, default=0), size)
        ids, bias = self._bias
        if len(ids):
            logits[ids] += bias
        if self._penalized:
            # a prompt may contain image tokens beyond the vocabulary, which have no logits
            known = self._tokens < size
            tokens, counts = self._tokens[known], self._counts[known]
            values = logits[tokens]
            # As in transformers: a penalty above 1 makes a logit smaller, whatever its sign.
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

    def _choose(self, logits: np.ndarray, best: int | None) -> int:
        """Returns the next token; ``best`` is the likeliest one before the mask, if it is known."""
        ids = None if self.mask is None else np.flatnonzero(self.mask.allowed(len(logits)))
        values = logits if ids is None else logits[ids]
        place = best if ids is None and best is not None else int(values.argmax()) if len(values) else 0
        if not len(values) or not np.isfinite(values[place]):
            raise ConfigError("no token is left to choose", where="the row's parameters", remedy=FEWER)
        if self.options.temperature:
            places, weights = candidates(values, self.options, values[place])
            place = int(places[_index_at_share(weights, self._draws.random())])
        return place if ids is None else int(ids[place])

    def log_probs(self, logits: np.ndarray) -> np.ndarray:
        """Returns the log-probabilities of the next token ``[vocabulary]`` float32, to which bias and
        penalties are then applied, as in transformers' beam search; -infinity for excluded tokens.

        Raises:
            NonFinite, ConfigError: see :meth:`next`.
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
        """Returns an independent sampler in the same state, for another beam."""
        other = copy.copy(self)
        other.mask, other._counts, other._places = (
            self.mask and self.mask.copy(),
            self._counts.copy(),
            dict(self._places),
        )
        return other

    def accept(self, token: int) -> None:
        """Advances the state by the token that was chosen."""
        if self.mask is not None and token not in self._ends:
            self.mask.accept(token)
        if self._processors:
            self._row = np.append(self._row, token)  # a new array, so that forks keep theirs
        if self._penalized:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._tokens, self._counts = (
                    np.append(self._tokens, token),
                    np.append(self._counts, np.float32(0)),
                )
            self._counts[place] += 1


def candidates(
    logits: np.ndarray, options: Sampling, top: np.float32
) -> tuple[Sequence[int] | np.ndarray, np.ndarray]:
    """Returns the indices of the tokens to draw from, in ascending order, and weights proportional to their
    probabilities, from float32 logits, of which ``top`` is the largest.
    """
    places: range | np.ndarray = range(len(logits))
    if 0 < options.top_k < len(logits):
        places = np.flatnonzero(logits >= _kth_largest(logits, options.top_k))
        logits = logits[places]
    weights = logits - top
    with np.errstate(over="ignore"):  # very unlikely tokens underflow to 0
        weights /= np.float32(max(options.temperature, _COLDEST))
    np.exp(weights, out=weights)
    if options.top_p < 1 or options.min_p:
        kept = _nucleus(weights, options.top_p, options.min_p)
        places = kept if isinstance(places, range) else places[kept]
        weights = weights[kept]
    return places, weights


def _kth_largest(values: np.ndarray, count: int) -> np.float32:
    """Returns the smallest of the ``count`` largest values."""
    value: np.float32 = np.partition(values, -count)[-count]
    return value


def _nucleus(weights: np.ndarray, top_p: float, min_p: float) -> np.ndarray:
    """Returns the indices of the fewest weights that make up ``top_p`` of the total, without weights below
    ``min_p``. The largest weight is 1.
    """
    if top_p == 1:
        return np.flatnonzero(weights >= min_p)
    total = float(weights.sum(dtype=np.float64))
    spare = (1 - top_p) * total
    # Weights that all together are at most what top_p leaves out can go first: those below the last bound are
    # in any case, and where few tokens are likely those below a larger one are, too.
    for least in (*(_LIKELY if total < _PEAKED else ()), spare / len(weights)):
        places = np.flatnonzero(weights >= least)
        kept = weights[places]
        left = total - float(kept.sum(dtype=np.float64))
        if left < spare:
            break
    return places[kept >= max(_threshold_above(kept, spare - left), min_p)]


def _threshold_above(values: np.ndarray, share: float) -> np.float32:
    """Returns the smallest value such that the sum of all values up to it exceeds ``share``."""
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


def _index_at_share(weights: np.ndarray, share: float) -> int:
    """Returns the first index at which the running sum of the weights exceeds this share of the total."""
    if len(weights) <= _BLOCK:
        sums = np.cumsum(weights, dtype=np.float64)
        return int(np.searchsorted(sums[:-1], share * sums[-1], side="right"))
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    point = share * blocks[-1]
    block = int(np.searchsorted(blocks, point, side="right"))
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64))
    # The two running sums round differently; the clamp keeps the index inside of the block.
    point = min(point - (blocks[block - 1] if block else 0.0), np.nextafter(inside[-1], 0))
    return block * _BLOCK + int(np.searchsorted(inside, point, side="right"))


def scored(logits: np.ndarray, token: int, count: int) -> SampledToken:
    """Returns a token with its log-probability by logits ``[vocabulary]``, and the ``count`` likeliest
    tokens.

    Raises:
        NonFinite: the logits have NaN or +infinity, or are all -infinity.
    """
    logits = logits.astype(np.float32, copy=False)
    top = logits.max()
    if not np.isfinite(top):
        raise NonFinite("the model's logits are not finite", found=top)
    total = _log_total(logits, top)
    return SampledToken(token, float(logits[token]) - total, _top_logprobs(logits, count, total))


def _log_total(logits: np.ndarray, top: np.float32) -> float:
    return float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))


def _top_logprobs(logits: np.ndarray, count: int, total: float) -> Logprobs:
    if not count:
        return ()
    ids = np.flatnonzero(logits >= _kth_largest(logits, min(count, len(logits))))
    order = ids[np.lexsort((ids, -logits[ids]))][:count]
    return tuple((int(token), float(logits[token]) - total) for token in order)
