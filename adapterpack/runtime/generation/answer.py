"""The answer of one row, token by token: its text, how its tokens were chosen, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from ..text.text_stream import TextStream
from ..text.tokenizer import NoTokenizer, Tokenizer
from .sampling import Sampling
from .token_chooser import Choice, TokenChooser, TokenMask


class Taken(NamedTuple):
    """What an answer took in a step: for each of its rows from then on the row that it goes on from, and its
    token; and the choice that is passed on to the caller, if one is.
    """

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    choice: Choice | None = None


class Ending(NamedTuple):
    """One of the best sequences of a beam search: its tokens without the one at which it ended, its text, its
    score, and why it ended.
    """

    ids: tuple[int, ...]
    text: str
    score: float
    finish_reason: str


class Answer:
    """What a row says to ``prompt``, its tokens, in at most ``room`` tokens. Rows of one seed draw different
    numbers at different places.

    ``chooser`` chooses its next token, ``choices`` are those so far, and ``reason`` says why it ended; None
    while it goes on. ``width`` is how many rows of the pool it needs, and ``sequences`` are the best
    sequences of a beam search.
    """

    width = 1
    sequences: tuple[Ending, ...] = ()

    def __init__(
        self,
        tokenizer: Tokenizer | NoTokenizer,
        sampling: Sampling,
        prompt: Sequence[int],
        room: int,
        place: int = 0,
        mask: TokenMask | None = None,
    ) -> None:
        self._ends = sampling.end_ids(tokenizer.eos_ids)
        self._room, self._stream = room, TextStream(tokenizer, sampling.stop, sampling.skip_special_tokens)
        self.chooser = TokenChooser(sampling, prompt, self._ends, mask, place, room)
        self.choices: list[Choice] = []
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
    def logprobs(self) -> tuple[Choice, ...] | None:
        """The choice of each of its tokens, if the row asks for log-probabilities."""
        return None if self.chooser.options.logprobs is None else tuple(self.choices[: len(self._stream.ids)])

    @property
    def pending(self) -> Future[Any] | None:
        """What the next token waits for besides its logits: until then the row repeats its step."""
        return self.chooser.pending

    def advance(self, logits: Sequence[np.ndarray]) -> Taken:
        """Chooses the next token from the logits ``[vocabulary]`` of its rows.

        Raises:
            AdapterpackError: there is none.
        """
        choice = self.chooser.next(logits[0])
        return Taken((0,), (choice.token,), choice if self.take(choice) else None)

    def take(self, choice: Choice) -> bool:
        """Adds the next token. False of an end token behind which no text was kept back: there is nothing to
        pass on.
        """
        before, at_end = self.text, choice.token in self._ends
        self.choices.append(choice)
        if not at_end:
            self._stream.push(choice.token)
        stops = at_end or self.chooser.finished
        if stops or len(self._stream.ids) == self._room:
            self._stream.finish()
            self.reason = "stop" if stops else "length"
        if self._stream.stopped:
            self.reason = "stop"
        return not at_end or self.text != before
