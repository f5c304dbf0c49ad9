"""The answer of one row, token by token: its text, how its tokens were chosen, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from ..text.detokenizer import Detokenizer
from ..text.tokenizer import NoTokenizer, Tokenizer
from .sampler import SampledToken, Sampler, TokenMask
from .sampling import Sampling


class NextTokens(NamedTuple):
    """What an answer takes in a step: for each of its sequences from then on the one that it continues, and
    its token; and the choice that is passed on to the caller, if one is.
    """

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    choice: SampledToken | None = None


class Ending(NamedTuple):
    """One of the best sequences of a beam search: its tokens without the one at which it ended, its text, its
    score, and why it ended.
    """

    ids: tuple[int, ...]
    text: str
    score: float
    finish_reason: str


class AnswerRequest(NamedTuple):
    """What a row is asked: an answer to the tokens ``prompt`` in at most ``room`` tokens. Rows of one seed
    draw different numbers at different places.
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
        """What chooses the answer's tokens."""
        return Sampler(self.sampling, self.prompt, self.end_ids, self.mask, self.place, self.room)

    def make_detokenizer(self) -> Detokenizer:
        """What makes text of the answer's tokens."""
        return Detokenizer(self.tokenizer, self.sampling.stop, self.sampling.skip_special_tokens)


class Answer:
    """The answer of a row, of one sequence.

    ``sampler`` chooses its next token, ``choices`` are those so far, and ``reason`` says why it ended; None
    while it goes on. ``width`` is how many sequences the engine runs for it, and ``sequences`` are the best
    ones of a beam search.
    """

    width = 1
    sequences: tuple[Ending, ...] = ()

    def __init__(self, request: AnswerRequest) -> None:
        self._ends, self._room, self._stream = request.end_ids, request.room, request.make_detokenizer()
        self.sampler = request.make_sampler()
        self.choices: list[SampledToken] = []
        self.reason: str | None = None

    @property
    def text(self) -> str:
        """The text so far, which is final: later tokens only add to it."""
        return self._stream.text

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens so far, without the one at which it ended."""
        return tuple(self._stream.ids)

    @property
    def logprobs(self) -> tuple[SampledToken, ...] | None:
        """The choice of each of its tokens, if the row asks for log-probabilities."""
        return None if self.sampler.options.logprobs is None else tuple(self.choices[: len(self._stream.ids)])

    @property
    def pending(self) -> Future[Any] | None:
        """What the next token waits for besides its logits: until then the row repeats its step."""
        return self.sampler.pending

    def advance(self, logits: Sequence[np.ndarray]) -> NextTokens:
        """Chooses the next token from the logits ``[vocabulary]`` of its rows.

        Raises:
            AdapterpackError: there is none.
        """
        choice = self.sampler.next(logits[0])
        return NextTokens((0,), (choice.token,), choice if self.take(choice) else None)

    def take(self, choice: SampledToken) -> bool:
        """Adds the next token. False of an end token behind which no text was kept back: there is nothing to
        pass on.
        """
        before, at_end = self.text, choice.token in self._ends
        self.choices.append(choice)
        if not at_end:
            self._stream.push(choice.token)
        stops = at_end or self.sampler.finished
        if stops or len(self._stream.ids) == self._room:
            self._stream.finish()
            self.reason = "stop" if stops else "length"
        if self._stream.stopped:
            self.reason = "stop"
        return not at_end or self.text != before
