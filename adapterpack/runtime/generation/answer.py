"""The answer of one row, token by token: its text, the choice of each token, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from ..text import Detokenizer, NoTokenizer, Tokenizer
from .sampler import SampledToken, Sampler
from .sampling import Sampling
from .structured import TokenMask


class NextTokens(NamedTuple):
    """The tokens that an answer takes in one step. For each of its sequences after the step, ``parents`` has
    the index of the sequence that it continues and ``tokens`` its new token. ``choice`` is passed on to the
    caller; None if nothing is.
    """

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    choice: SampledToken | None = None


class Ending(NamedTuple):
    """One of the best sequences of a beam search: its tokens without the end token, its text, its score, and
    why it ended.
    """

    ids: tuple[int, ...]
    text: str
    score: float
    finish_reason: str


class AnswerRequest(NamedTuple):
    """The parameters of an answer: it continues the tokens ``prompt`` with at most ``room`` tokens. Rows with
    one seed draw different numbers if their ``place`` differs.
    """

    tokenizer: Tokenizer | NoTokenizer
    sampling: Sampling
    prompt: Sequence[int]
    room: int
    place: int = 0
    mask: TokenMask | None = None

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens at which the answer ends."""
        return self.sampling.end_ids(self.tokenizer.eos_ids)

    def make_sampler(self) -> Sampler:
        """Makes the sampler that chooses the answer's tokens."""
        return Sampler(self.sampling, self.prompt, self.end_ids, self.mask, self.place, self.room)

    def make_detokenizer(self) -> Detokenizer:
        """Makes the detokenizer that turns the answer's tokens into text."""
        options = self.sampling
        return Detokenizer(
            self.tokenizer, options.stop, options.skip_special_tokens, options.include_stop_str_in_output
        )


class Answer:
    """An answer of one sequence, as sampling and greedy decoding make it.

    ``sampler`` chooses the next token, ``sampled`` are those so far, and ``reason`` says why the answer
    ended, None until then. ``width`` is the number of sequences that the engine runs for it; ``sequences``
    are the best ones of a beam search.
    """

    width = 1
    sequences: tuple[Ending, ...] = ()

    def __init__(self, request: AnswerRequest) -> None:
        self._ends = request.end_ids
        self._room = request.room
        self._stream = request.make_detokenizer()
        self.sampler = request.make_sampler()
        self.sampled: list[SampledToken] = []
        self.reason: str | None = None
        self.ending: SampledToken | None = None
        """The end token that closed the answer, and is no part of it."""

    @property
    def stop(self) -> str | int | None:
        """The stop text, or the token of ``stop_token_ids``, that ended the answer."""
        if self._stream.stop is not None:
            return self._stream.stop
        stops = () if self.ending is None else self.sampler.options.stop_token_ids
        return self.ending.token if self.ending is not None and self.ending.token in stops else None

    @property
    def text(self) -> str:
        """The text so far. It is final: later tokens only extend it."""
        return self._stream.text

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens so far, without the end token."""
        return tuple(self._stream.ids)

    @property
    def logprobs(self) -> tuple[SampledToken, ...] | None:
        """The choice of each token with its log-probability, if the row asks for them."""
        return None if self.sampler.options.logprobs is None else tuple(self.sampled[: len(self._stream.ids)])

    @property
    def pending(self) -> Future[Any] | None:
        """The computation for which the next token waits besides its logits; until it is done, the engine
        repeats the row's step.
        """
        return self.sampler.pending

    def advance(self, logits: Sequence[np.ndarray]) -> NextTokens:
        """Chooses the next token from the logits ``[vocabulary]`` of each of its sequences.

        Raises:
            AdapterpackError: no token is left to choose, or the logits are not finite.
        """
        choice = self.sampler.next(logits[0])
        return NextTokens((0,), (choice.token,), choice if self.take(choice) else None)

    def take(self, choice: SampledToken) -> bool:
        """Adds the next token, and returns whether there is something to pass on to the caller: not for an
        end token, unless it releases text that was held back.
        """
        before = self.text
        at_end = choice.token in self._ends
        self.sampled.append(choice)
        if at_end:
            self.ending = choice
        else:
            self._stream.push(choice.token)
        stops = at_end or self.sampler.finished
        if stops or len(self._stream.ids) == self._room:
            self._stream.finish()
            self.reason = "stop" if stops else "length"
        if self._stream.stop is not None:
            self.reason = "stop"
        return not at_end or self.text != before
