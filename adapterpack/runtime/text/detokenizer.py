"""Turns the tokens of a row into text as they arrive; text that was emitted is never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import NoTokenizer, Tokenizer


class Detokenizer:
    """The text of one row, token by token. ``text`` is final: later tokens only extend it. ``ids`` are the
    tokens so far.

    It holds back the bytes of an unfinished character and a possible beginning of a stop text until they are
    decided. A stop text ends the row (``stop``) and is cut off, unless ``keeps_stop``; of several the
    earliest counts. Special tokens have no text unless ``skip_special_tokens`` is off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | NoTokenizer,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        keeps_stop: bool = False,
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.stop: str | None = None
        """The stop text that ended the row."""
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._skips, self._keeps_stop = skip_special_tokens, keeps_stop
        self._step = tokenizer.stepper(skip_special_tokens)
        self._decoded = 0  # the number of ids whose text is complete
        self._kept = ""  # text that may be the beginning of a stop text

    def push(self, token: int) -> None:
        """Takes the next token of the row."""
        self.ids.append(token)
        try:
            piece = self._step(token)
        # The token changes the text of earlier ones, but that was emitted already: decodes only the rest
        # again.
        except Exception:
            piece = self._tokenizer.decode(self.ids[self._decoded :], self._skips)
            self._step = self._tokenizer.stepper(self._skips)
            self._step(token)
        if piece:
            self._decoded = len(self.ids)
            self._add(piece)

    def finish(self) -> None:
        """Releases text that was held back, since no token follows."""
        if self.stop is None:
            self._add(self._incomplete(), last=True)

    def _incomplete(self) -> str:
        """Returns the text of the last ids, which never formed complete characters."""
        if self._decoded == len(self.ids):
            return ""
        whole = self._tokenizer.decode(self.ids, self._skips)
        given = self.text + self._kept
        return (
            whole[len(given) :]
            if whole.startswith(given)
            else self._tokenizer.decode(self.ids[self._decoded :], self._skips)
        )

    def _add(self, piece: str, last: bool = False) -> None:
        text = self._kept + piece
        cuts = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if cuts:
            final, self.stop = min(cuts)
            final += len(self.stop) if self._keeps_stop else 0
        else:
            held = 0 if last else max((overlap(text, stop) for stop in self._stop), default=0)
            final = len(text) - held
        self.text += text[:final]
        self._kept = "" if cuts else text[final:]


def overlap(text: str, stop: str) -> int:
    """Returns how many of the last characters of ``text`` form a proper prefix of ``stop``.

    Example:
        >>> overlap("one <sto", "<stop>"), overlap("one", "<stop>")
        (4, 0)
    """
    return next(
        (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0
    )
