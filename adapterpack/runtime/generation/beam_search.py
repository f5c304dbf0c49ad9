"""Beam search as transformers does it: of all continuations of a row's beams the most likely are kept, and
the best finished sequences are its answers.

The score of a sequence is the sum of its log-probabilities, divided by ``length ** length_penalty`` once it
has ended. Source: ``GenerationMixin._beam_search`` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import ConfigError
from .answer import AnswerRequest, Ending, NextTokens
from .sampler import FEWER, Sampler

_NEVER = np.float32(-1e9)
"""The score of a placeholder, below that of any real sequence."""
_DEAD = np.float32(-1e8)
"""A beam with a lower score is a placeholder: there are fewer real beams than ``num_beams``.
"""


class _Beam(NamedTuple):
    """An unfinished sequence: its tokens so far, and the sampler that scores its next token."""

    ids: tuple[int, ...]
    sampler: Sampler


class _Finished(NamedTuple):
    """A finished sequence, or with ``done`` False a placeholder for one."""

    score: np.float32 = _NEVER
    ids: tuple[int, ...] = ()
    reason: str = "length"
    done: bool = False


class BeamAnswer:
    """The answer of a row by ``num_beams`` beams; it has the interface of :class:`.Answer`. ``sequences``
    holds the best ones once the search has ended.
    """

    logprobs = None
    pending = None
    ending = None
    stop = None

    def __init__(self, request: AnswerRequest) -> None:
        self._request = request
        self._sampling = request.sampling
        self._room = request.room
        self._ends = request.end_ids
        self.width = request.sampling.num_beams
        first = _Beam((), request.make_sampler())
        self._beams = [first] * self.width
        self._scores = np.full(self.width, _NEVER)
        # All beams start equal, so only the first may score: otherwise all would choose the same tokens.
        self._scores[0] = 0
        self._finished = [_Finished()] * self.width
        self.sequences: tuple[Ending, ...] = ()
        self.reason: str | None = None

    @property
    def text(self) -> str:
        """The text of the best sequence; empty before the end."""
        return self.sequences[0].text if self.sequences else ""

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of the best sequence, without the end token."""
        return self.sequences[0].ids if self.sequences else ()

    def advance(self, logits: Sequence[np.ndarray]) -> NextTokens:
        """Extends every beam by one token, from the logits ``[vocabulary]`` of each. In the first step all
        have the logits of the prompt.

        Raises:
            NonFinite: the logits of a beam are not finite.
            ConfigError: the parameters leave no token to any beam.
        """
        dead = self._scores < _DEAD
        totals = np.stack(
            [
                np.full(len(row), -np.inf, np.float32) if out else beam.sampler.log_probs(row) + score
                for row, beam, score, out in zip(logits, self._beams, self._scores, dead, strict=True)
            ]
        )
        # Enough candidates that num_beams of them remain even if every end token is among them.
        places = _largest(totals.ravel(), max(2, 1 + len(self._ends)) * self.width)
        scores = totals.ravel()[places]
        parents, tokens = np.divmod(places, totals.shape[1])
        if not np.isfinite(scores[0]):
            raise ConfigError("no token is left to choose", where="the row's parameters", remedy=FEWER)
        candidates = [
            self._extend(int(parent), int(token), np.isfinite(score))
            for parent, token, score in zip(parents, tokens, scores, strict=True)
        ]
        reasons = [self._reason(beam) for beam in candidates]
        ended = np.array([reason is not None for reason in reasons])
        # A finished candidate gets a score so low that it is never continued while real ones remain.
        going = np.maximum(scores, _NEVER) + np.where(ended, _NEVER, np.float32(0))
        chosen = _largest(going, self.width)
        self._finish(scores, candidates, reasons)
        self._beams = [candidates[place] for place in chosen]
        self._scores = going[chosen]
        self._maybe_end(len(candidates[0].ids), bool(ended.all()))
        return NextTokens(
            tuple(int(parents[place]) for place in chosen), tuple(int(tokens[place]) for place in chosen)
        )

    def _extend(self, parent: int, token: int, real: bool) -> _Beam:
        """Returns a beam with one more token. Its sampler takes the token only if it is ``real``, that is,
        may follow.
        """
        beam = self._beams[parent]
        sampler = beam.sampler.fork()
        if real:
            sampler.accept(token)
        return _Beam((*beam.ids, token), sampler)

    def _reason(self, beam: _Beam) -> str | None:
        """Returns why a sequence ends here, or None."""
        options = self._sampling
        text = (
            self._request.tokenizer.decode(list(beam.ids), options.skip_special_tokens)
            if options.stop
            else ""
        )
        stops = (
            beam.ids[-1] in self._ends
            or beam.sampler.finished
            or any(stop in text for stop in options.stop if stop)
        )
        return "stop" if stops else "length" if len(beam.ids) == self._room else None

    def _finish(self, scores: np.ndarray, candidates: Sequence[_Beam], reasons: Sequence[str | None]) -> None:
        """Merges candidates that have ended into the best finished sequences, of which it keeps
        ``num_beams``.
        """
        ended = [
            _Finished(score, beam.ids, reason, True)
            for score, beam, reason in zip(
                scores / np.float32(len(candidates[0].ids) ** self._sampling.length_penalty),
                candidates[: self.width],
                reasons,
                strict=False,
            )
            if reason is not None and np.isfinite(score)
        ]
        self._finished = sorted([*self._finished, *ended], key=lambda one: -one.score)[: self.width]

    def _maybe_end(self, length: int, all_ended: bool) -> None:
        options = self._sampling
        finished = all(one.done for one in self._finished)
        # The best that a running beam can still reach: with "never" it may grow to the longest length, which
        # a positive penalty favours.
        longest = self._room if options.early_stopping == "never" and options.length_penalty > 0 else length
        best = self._scores[0] / np.float32(longest**options.length_penalty)
        worst = min(one.score for one in self._finished)
        improvable = any(best > (worst if one.done else _NEVER) for one in self._finished)
        if improvable and not (finished and options.early_stopping is True) and not all_ended:
            return
        self.sequences = tuple(
            self._ending(one) for one in self._finished[: options.num_return_sequences] if one.done
        )
        self.reason = self.sequences[0].finish_reason if self.sequences else "length"

    def _ending(self, one: _Finished) -> Ending:
        stream = self._request.make_detokenizer()
        for token in one.ids:
            if token not in self._ends:
                stream.push(token)
        stream.finish()
        return Ending(tuple(stream.ids), stream.text, float(one.score), one.reason)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the ``count`` largest values, the largest first."""
    count = min(count, len(values))
    places = np.argpartition(values, len(values) - count)[len(values) - count :]
    return places[np.lexsort((places, -values[places]))]
