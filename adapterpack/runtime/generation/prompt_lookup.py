"""Guesses a row's next tokens from the tokens it has: those that followed the latest earlier occurrence of
its last ones. One pass of the model reads all guesses, and those that it would have chosen itself are kept.

Answers that quote their prompt or repeat themselves (extraction, edits of code, JSON) come several tokens a
pass. Source: Saxena 2023, "Prompt Lookup Decoding", after Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_RUN = 3
"""How many last tokens must have occurred before: two occur again in open text, where nothing else does."""
_FIRST = 3
"""How many tokens the first guess has; guesses double where all are right, and halve where few are."""
_MOST_SKIPPED = 64
"""The most tokens without a guess after guesses that were all wrong."""
_RATE = 0.75
"""The share of guessed tokens that are taken for right before there are any."""
_FADING = 0.98
"""Each pass multiplies the weights of earlier ones by this."""


class PassCosts:
    """What passes of several rows take, as ``start + tokens * each`` seconds, by the passes so far (least
    squares, in which a pass counts less with each later one).
    """

    def __init__(self) -> None:
        self._squares = np.zeros((2, 2))
        self._products = np.zeros(2)

    def add(self, tokens: int, seconds: float) -> None:
        """Takes in a pass over so many tokens."""
        one = np.array([1.0, tokens])
        self._squares = _FADING * self._squares + np.outer(one, one)
        self._products = _FADING * self._products + seconds * one

    def worth(self, rows: int) -> float:
        """Returns the least probability of being right at which a guessed token saves time in a batch of
        ``rows`` rows: the time that it adds to a pass, divided by that of a token without guesses; 0 while
        these are unknown.
        """
        # passes of late had nearly as many tokens
        if np.linalg.det(self._squares) <= self._squares[0, 0] ** 2:
            return 0.0
        start, each = np.maximum(np.linalg.solve(self._squares, self._products), 0.0)
        return float(each * rows / max(start + each * rows, 1e-9))


class GuessLength:
    """How many tokens to guess, at most ``most``: twice as many where all were right, and half as many where
    few were. After guesses that were all wrong there is none for a while, twice as long each time, so that a
    row whose tokens cannot be guessed costs almost nothing.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = min(_FIRST, most)
        self._skip = 0
        self._skipped = 0
        self._rate = _RATE

    def next(self, worth: float = 0.0) -> int:
        """Returns how many tokens to guess now: as long as the last of them is right with a probability of at
        least ``worth``, estimated from recent guesses.
        """
        if self._skip:
            self._skip -= 1
            return 0
        length = 0
        while length < self._length and self._rate ** (length + 1) >= worth:
            length += 1
        if not length:  # what the row says may have changed meanwhile
            self._rate += (_RATE - self._rate) / 16
        return length

    def judge(self, guessed: int, right: int) -> None:
        """Takes in how many of the guessed tokens were right."""
        if right == guessed:
            self._length = min(2 * self._length, self._most)
        elif 2 * right < guessed:
            self._length = max(self._length // 2, 1)
        self._rate += (right / (right + (right < guessed)) - self._rate) / 4
        self._skipped = 0 if right else min(2 * self._skipped + 1, _MOST_SKIPPED)
        self._skip = self._skipped


class PromptLookup:
    """The tokens of one row, and where runs of them occurred last; guesses at most ``most`` at a time
    (``length``). What it guesses depends on the tokens alone.

    Example:
        >>> PromptLookup([1, 2, 3, 4, 9, 1, 2, 3], most=8).guess()
        [4, 9, 1]
    """

    def __init__(self, tokens: Iterable[int], most: int) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._start: int | None = None
        self.length = GuessLength(most)
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds the row's further tokens."""
        for token in tokens:
            self._tokens.append(token)
            run = tuple(self._tokens[-_RUN:])
            # looked up before it is entered: the last tokens themselves are no earlier occurrence
            self._start = self._after.get(run)
            self._after[run] = len(self._tokens)

    def guess(self, worth: float = 0.0) -> list[int]:
        """Returns the guessed next tokens, none where the last tokens are new, or guesses have been wrong or
        not ``worth`` it (:meth:`GuessLength.next`).
        """
        count = self.length.next(worth)
        followed = [] if self._start is None else self._tokens[self._start : self._start + count]
        # a run that ends with the last token goes round
        return (followed * count)[:count]
