"""Guesses a row's next tokens from the tokens it has: those that followed the latest earlier occurrence of
its last ones. One pass of the model reads all guesses, and those that it would have chosen itself are kept.

Answers that quote their prompt or repeat themselves (extraction, edits of code, JSON) come several tokens a
pass. Source: Saxena 2023, "Prompt Lookup Decoding", after Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding".
"""

from __future__ import annotations

from collections.abc import Iterable

_RUN = 3
"""How many last tokens must have occurred before: two occur again in open text, where nothing else does."""
_FIRST = 3
"""How many tokens the first guess has; guesses double where all are right, and halve where few are."""
_MOST_SKIPPED = 64
"""The most tokens without a guess after guesses that were all wrong."""


class GuessLength:
    """How many tokens to guess, at most ``most``: twice as many where all were right, and half as many where
    few were. After guesses that were all wrong there is none for a while, twice as long each time, so that a
    row whose tokens cannot be guessed costs almost nothing.
    """

    def __init__(self, most: int) -> None:
        self._most, self._length, self._skip, self._skipped = most, min(_FIRST, most), 0, 0

    def next(self) -> int:
        """Returns how many tokens to guess now."""
        if self._skip:
            self._skip -= 1
            return 0
        return self._length

    def judge(self, guessed: int, right: int) -> None:
        """Takes in how many of the guessed tokens were right."""
        if right == guessed:
            self._length = min(2 * self._length, self._most)
        elif 2 * right < guessed:
            self._length = max(self._length // 2, 1)
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

    def guess(self) -> list[int]:
        """Returns the guessed next tokens, none where the last tokens are new or guesses have been wrong."""
        count = self.length.next()
        followed = [] if self._start is None else self._tokens[self._start : self._start + count]
        # a run that ends with the last token goes round
        return (followed * count)[:count]
