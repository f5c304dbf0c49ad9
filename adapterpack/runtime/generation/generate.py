"""Generates text: one pass over the prompts of a batch, then one step a token, each row with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...errors import ConfigError, Unsupported
from ...tasks.rows import map_rows
from ...tasks.session import Arrays
from ...tasks.task import TASKS
from ..adapters.pinned import Names
from ..open_bundle import OpenBundle
from ..text.context_length import context_of, require_context, text_part
from ..text.model_files import MAX_ID
from ..text.text_stream import TextStream
from .decoder import decoder_of
from .sampling import Sampling, choose

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
Emit = Callable[[int, int, str], None]
"""Called with (row, token id, text so far) for every new token. The text is final: the next one begins with it, and the last one is the
answer's. The end token of a row is passed on, too, if there is text that was kept back until then."""


@dataclass(frozen=True)
class Generation:
    """One row's answer: its text, its new token ids, why it ended (``stop`` or ``length``), and which adapter made it."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    adapter: str | None
    prompt_tokens: int


def generate(
    session: OpenBundle, prompts: Sequence[Prompt], adapters: Names = None, sampling: Sampling | None = None, emit: Emit | None = None,
    given: Arrays | None = None,
) -> list[Generation]:
    """Answers to ``prompts``, all in one batch, each row with its own adapter.

    A prompt is a text (of a decoder: one user message), a list of messages, or a list of token ids. ``given`` are other inputs:
    ``pixel_values`` of the rows' images, or in place of prompts ``input_features`` of speech.

    Raises:
        Unsupported: the bundle does not generate.
        UnknownAdapter: a name that the bundle does not hold.
        ConfigError: a prompt without a token, or for which the model has no positions; the error names the row.
    """
    if not session.task.generates:
        raise Unsupported("the bundle does not generate text", found=session.bundle.task,
                          expected=", ".join(task.name for task in TASKS.values() if task.generates))
    others = dict(given or {})
    rows = map_rows(prompts, partial(_prompt_ids, session))
    count = len(rows) or next((array.shape[0] for array in others.values()), 0)
    if not count:
        return []
    options = sampling or Sampling()
    names = session.names(adapters, count)
    decoder = decoder_of(session)(session, rows, names, others)
    draws = [np.random.default_rng([options.seed, row]) for row in range(count)]  # a row's draws do not depend on the others
    require_context(session, decoder.lengths, decoder.virtual)
    batch = _Batch(session, options, emit, _room(session, decoder.lengths, options.max_new_tokens))
    outputs, last = decoder.prefill(), decoder.last
    while True:
        tokens = choose(outputs["logits"].numpy()[range(count), last], options, draws)
        batch.take(tokens)
        if batch.finished:
            break
        outputs, last = decoder.step(tokens, outputs), np.zeros_like(last)
    lengths = [len(row) for row in rows] or [0] * count
    return [Generation(stream.text, tuple(stream.ids), reason or "length", name, length)
            for stream, reason, name, length in zip(batch.streams, batch.reasons, names, lengths, strict=True)]


def _room(session: OpenBundle, lengths: np.ndarray, most: int) -> list[int]:
    """How many tokens may follow each row: as many as it has positions for, and one, whose position nobody needs."""
    context = context_of(session)
    return [most if context is None else min(most, context - int(length) + 1) for length in lengths]


class _Batch:
    """The answers of a batch so far; that of row ``i`` has at most ``room[i]`` tokens."""

    def __init__(self, session: OpenBundle, options: Sampling, emit: Emit | None, room: Sequence[int]) -> None:
        self.eos, self.emit, self.room = session.tokenizer.eos_ids, emit, room
        self.streams = [TextStream(session.tokenizer, options.stop) for _ in room]
        self.reasons: list[str | None] = [None] * len(room)

    @property
    def finished(self) -> bool:
        return all(self.reasons)

    def take(self, tokens: np.ndarray) -> None:
        """Adds one new token to every row that has not ended."""
        for row, token in enumerate(map(int, tokens)):
            if not self.reasons[row]:
                self._take(row, token)

    def _take(self, row: int, token: int) -> None:
        stream, text_before = self.streams[row], self.streams[row].text
        ends = token in self.eos
        if not ends:
            stream.push(token)
        if ends or len(stream.ids) == self.room[row]:
            stream.finish()
            self.reasons[row] = "stop" if ends else "length"
        if stream.stopped:
            self.reasons[row] = "stop"
        if self.emit and (not ends or stream.text != text_before):
            self.emit(row, token, stream.text)


def _prompt_ids(session: OpenBundle, prompt: Prompt) -> list[int]:
    items = [prompt] if isinstance(prompt, str) else list(prompt)
    if items and all(type(item) is int for item in items):
        return _checked_ids(session, items)  # type: ignore[arg-type]
    if not isinstance(prompt, str) and not all(isinstance(item, Mapping) and "content" in item for item in items):
        raise ConfigError("a prompt is a text, a list of messages with role and content, or a list of token ids", found=repr(prompt)[:80])
    if isinstance(prompt, str) and not session.task.pads_left:  # an encoder reads the text as it is
        ids = session.tokenizer.encode(prompt)
    else:
        ids = session.tokenizer.prompt(prompt) if items else []  # type: ignore[arg-type]
    if not ids:
        raise ConfigError("a prompt has no tokens", found=repr(prompt)[:80])
    return ids


def _checked_ids(session: OpenBundle, ids: list[int]) -> list[int]:
    """Ids of a caller, if the model has them."""
    vocabulary = text_part(session.config, "vocab_size").get("vocab_size")
    most = vocabulary - 1 if type(vocabulary) is int else MAX_ID
    wrong = next((token for token in ids if not 0 <= token <= most), None)
    if wrong is not None:
        raise ConfigError("a prompt has a token that the model does not have", expected=f"0 to {most}", found=str(wrong)[:40])
    return ids
