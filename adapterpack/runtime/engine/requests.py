"""The requests of an engine, the sequences that it runs for them, and the events that its steps return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...adapter_methods import Tensors
from ...errors import AdapterpackError
from ..generation import Answer, BeamAnswer, Ending, GuessLength, PromptLookup, SampledToken
from ..media import OFFSETS
from .adapter_feeds import ResidentAdapter


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step.

    Attributes:
        request: the number that :meth:`~.base.Engine.add` gave.
        adapter: the digest of the pack that the row runs with, None for the base.
        token: the id of the row's new token; None if the step ended the row without one.
        choice: how it was chosen, with its log-probability if the request asks for it.
        text: the answer so far. Later events only extend it. A beam search has none before its end.
        finish_reason: why the row ended: ``stop``, ``length``, ``cancelled`` or ``error``; None while it
            runs.
        error: the error of a row that ended by ``error``.
        result: for a task that makes no text, the result of the row's pass: the keys that ``adapterpack run``
            adds to such a row.
        prompt_tokens: the number of tokens that were read for the result.
        sequences: the best sequences of a beam search that has ended, best first.
        ending: the end token that closed the answer, and is no part of it.
        stop: the stop text, or the token of ``stop_token_ids``, that ended the answer.
        reused: the tokens of the prompt whose keys and values were known from earlier rows.
        scored: the tokens of the prompt with their log-probabilities, if the request asks for them; the
            first has none.
    """

    request: int
    adapter: str | None
    token: int | None = None
    choice: SampledToken | None = None
    text: str = ""
    finish_reason: str | None = None
    error: AdapterpackError | None = None
    result: Mapping[str, Any] | None = None
    prompt_tokens: int | None = None
    sequences: tuple[Ending, ...] = ()
    ending: SampledToken | None = None
    stop: str | int | None = None
    reused: int = 0
    scored: Sequence[SampledToken] = ()


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """One sequence of tokens in the runner. It holds its adapter itself, since names may change while it
    runs.

    ``prompt`` are its tokens, of which ``num_computed_tokens`` have been read. Sequences share cached
    prefixes only with those of the same ``salt``. ``features`` are other inputs of its pass, and ``source``
    the inputs of the encoder. With a number in ``scores`` its prompt's tokens get log-probabilities,
    ``scored``, with so many of the likeliest at each place. ``kv_len`` is the number of its positions in the
    cache, and ``next_token`` the token to read next. ``request`` is the request to which it belongs.
    """

    prompt: Sequence[int]
    adapter: ResidentAdapter | None = None
    features: Tensors = field(default_factory=dict)
    source: Tensors = field(default_factory=dict)
    salt: bytes = b""
    request: Any = None
    scores: int | None = None
    scored: list[SampledToken] = field(init=False, default_factory=list)
    reused: int = field(init=False, default=0)
    """The tokens of its prompt that were not read, but known from earlier rows."""
    whole: bool = False
    """Whether its prompt is read in one pass, and no row shares its beginning: it says less than its inputs,
    or its tokens see later ones.
    """
    source_length: int = field(init=False, default=0)
    """The length of the encoder's output for it; 0 until the encoder has run."""
    known: int = field(init=False, default=0)
    """The tokens of its prompt that earlier rows had in common with it when it began."""
    num_computed_tokens: int = 0
    kv_len: int = 0
    next_token: int = 0
    acting: np.ndarray | None = field(init=False, default=None)
    """The prompt tokens at which its adapter acts, ``[tokens]`` bool; None if it acts everywhere."""
    acted: bool = field(init=False, default=False)
    """Whether the adapter has acted at some token so far."""
    acted_before: bool = field(init=False, default=False)
    """The value of ``acted`` before the last step, which :meth:`.ModelRunner.retract` restores."""
    answered: list[int] = field(init=False, default_factory=list)
    """The tokens after the prompt that are in the cache."""
    begun: bool = field(init=False, default=False)
    """Whether its prompt is being read, or has been."""

    def fork(self) -> SequenceState:
        """Returns another sequence of the same prompt and request that has computed nothing yet."""
        return replace(self, num_computed_tokens=0, kv_len=0, next_token=0)

    def follow(self, other: SequenceState) -> None:
        """Takes over the progress of another sequence of the same prompt."""
        self.num_computed_tokens, self.kv_len = other.num_computed_tokens, other.kv_len
        self.source_length, self.acted = other.source_length, other.acted
        self.begun, self.answered = other.begun, list(other.answered)
        self.scored, self.reused = other.scored, other.reused

    def __post_init__(self) -> None:
        self.whole = self.whole or bool(self.features or self.source)
        self.acting = self.acting_at(self.prompt)
        self.scored = [SampledToken(token) for token in self.prompt[:1] if self.scores is not None]
        self.acted = self.acting is not None and bool(self.acting.any())

    def acting_at(self, tokens: Sequence[int], before: bool | None = None) -> np.ndarray | None:
        """Returns at which of these tokens its adapter acts, ``[tokens]`` bool; None if it acts everywhere.
        ``before`` says whether it has acted at an earlier token; by default these are the first ones.
        """
        acts = None if self.adapter is None else self.adapter.acts
        if acts is None:
            return None
        whole = np.ones((1, len(tokens)), bool)
        earlier = None if before is None else np.array([before])
        acting: np.ndarray = acts.mask(np.array([tokens], np.int64), whole, whole, earlier)[0]
        return acting

    def offsets(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns how far the positions of the tokens at these places are from their places ``[tokens, 3]``;
        tokens after the prompt have those of the last place.
        """
        moved = self.features.get(OFFSETS, np.zeros((1, 1, 3), np.int64))[0]
        taken: np.ndarray = moved[np.minimum(places, len(moved) - 1)]
        return taken

    @property
    def virtual(self) -> int:
        """The number of positions that its adapter's prompt takes in its cache."""
        return 0 if self.adapter is None else self.adapter.virtual

    @property
    def tokens(self) -> list[int]:
        """The tokens in its cache, without the virtual tokens of the adapter's prompt."""
        return [*self.prompt[: self.num_computed_tokens], *self.answered]


@dataclass(eq=False)
class Request:
    """A request: its number, its answer so far, and the sequences that the engine runs for it, in the order
    of the answer.
    """

    number: int
    answer: Answer | BeamAnswer
    sequences: list[SequenceState]
    lookup: PromptLookup | None = None
    """Guesses its next tokens."""
    length: GuessLength = field(init=False)
    """The length of its next guess, which follows how many guessed tokens were right."""

    def __post_init__(self) -> None:
        self.sequences[0].request = self

    @property
    def adapter(self) -> ResidentAdapter | None:
        """The adapter with which its sequences run."""
        return self.sequences[0].adapter

    @property
    def digest(self) -> str | None:
        """The digest of its adapter."""
        return None if self.adapter is None else self.adapter.digest
