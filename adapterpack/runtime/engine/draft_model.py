"""Guesses a row's next tokens with a bundle that is faster: the same base in fewer bits, or a smaller model
with the same tokens. One pass of the engine reads all guesses, and those that it would have chosen itself are
kept.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

from os.path import commonprefix

from ...bundle import DECODER, without_decoder
from ...errors import Unsupported
from ...paths import StrPath
from ..generation import GuessLength
from ..open_bundle import OpenBundle
from ..providers import Device
from .adapter_reader import AdapterReader
from .model_runner import ModelRunner
from .requests import SequenceState
from .slot_layout import SlotLayout

DRAFTED = 8
"""The most tokens that are guessed at a time."""


class DraftModel:
    """Runs a draft's bundle beside the engine, on the one row that runs alone. Where the draft has the slots
    of the engine's graph (``layout``), it guesses with the row's own adapter, whose values both read; else as
    its base.

    Raises:
        Unsupported: the draft has no graph for the engine, or other tokens.
    """

    def __init__(
        self,
        bundle: StrPath | OpenBundle,
        target: OpenBundle,
        layout: SlotLayout,
        device: Device,
        max_length: int,
        prefix_budget: int,
    ) -> None:
        self.bundle = OpenBundle.of(bundle, device, None, "cached")
        if not self.bundle.bundle.decoder:
            raise without_decoder(self.bundle.bundle, self.bundle.given)
        mine, theirs = (one.graph(DECODER).results["logits"].shape[2] for one in (self.bundle, target))
        if mine != theirs or self.bundle.task.has_encoder:
            raise Unsupported(
                "the draft has other tokens than the bundle whose tokens it is to guess",
                where=self.bundle.given,
                expected=f"a decoder with {theirs} tokens",
                found=str(mine),
            )
        reader = AdapterReader(self.bundle)
        self._adapts = _shapes(reader.layout) == _shapes(layout)
        self._runner = ModelRunner(self.bundle, reader, 1, max_length, prefix_budget)
        self._row: SequenceState | None = None
        self._of: SequenceState | None = None
        self.length = GuessLength(DRAFTED)

    def guess(self, row: SequenceState) -> list[int]:
        """Returns the likeliest tokens after a running row's next token; none where guesses have been wrong,
        or the draft cannot take back a wrong one.
        """
        if row is not self._of:
            self._begin(row)
        count, tokens = self.length.next(), [*row.tokens, row.next_token]
        mine = self._row
        if mine is None or not count:
            return []
        same = len(commonprefix([mine.tokens, tokens[:-1]]))  # noqa: RUF071 - tokens, no paths
        mine.kv_len, mine.answered = mine.virtual + same, tokens[len(mine.prompt) : same]
        unread = tokens[same:]
        if not self._runner.can_read_ahead(mine, len(unread) + count):
            return []
        mine.next_token = unread[0]
        logits = self._runner.read_ahead([mine], [unread[1:]])[0][-1]
        mine.kv_len += len(unread)
        mine.answered += unread
        guessed = [int(logits.argmax())]
        while len(guessed) < count:
            mine.next_token = guessed[-1]
            guessed.append(int(self._runner.decode()[0].argmax()))
        return guessed

    def forget(self) -> None:
        """Drops the cached prefixes."""
        self._runner.prefixes.clear()

    def _begin(self, row: SequenceState) -> None:
        """Reads the prompt of another row."""
        if self._row is not None:
            self._runner.remove(self._row)
        self._of, self.length = row, GuessLength(DRAFTED)
        self._row = SequenceState(
            prompt=row.prompt, adapter=row.adapter if self._adapts else None, salt=row.salt
        )
        self._runner.admit(self._row)
        self._runner.prefill(len(row.prompt) - self._runner.next_to_read().num_computed_tokens)


def _shapes(layout: SlotLayout) -> dict[str, object]:
    return {name: (slot.axes, slot.parts, slot.dtype) for name, slot in layout.slots.items()}
