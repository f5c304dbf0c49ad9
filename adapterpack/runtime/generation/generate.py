"""Generates text: one pass over the prompts of a batch, then one step a token, each row with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...errors import Unsupported
from ...tasks.rows import map_rows, row_errors
from ...tasks.session import Arrays
from ...tasks.task import TASKS
from ..adapters.pinned import Names
from ..engine.batch import SessionEngine
from ..model_inputs import pad
from ..open_bundle import OpenBundle
from ..pipeline import run_parts
from ..text.context_length import context_of, require_context
from ..text.text_stream import TextStream
from .decoder import decoder_of
from .prompts import Prompt, prompt_ids
from .sampling import Sampling
from .structured import grammar_mask
from .token_chooser import Choice, TokenChooser, choose

Emit = Callable[[int, int, str], None]
"""Called with (row, token id, text so far) for every new token. The text is final: the next one begins with it, and the last one is the
answer's. The end token of a row is passed on, too, if there is text that was kept back until then."""


@dataclass(frozen=True)
class Generation:
    """One row's answer: its text, its new token ids, why it ended (``stop`` or ``length``), and which adapter made it; ``logprobs`` has
    the choice of each id with its log-probabilities, if the call asks for them.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    adapter: str | None
    prompt_tokens: int
    logprobs: tuple[Choice, ...] | None = None


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
        ConfigError: a prompt without a token, or for which the model has no positions; the error names the row. Or a row for which no
            token may follow.
        NonFinite: the model gives NaN or infinity for a row.
    """
    if not session.task.generates:
        raise Unsupported("the bundle does not generate text", found=session.bundle.task,
                          expected=", ".join(task.name for task in TASKS.values() if task.generates))
    others = dict(given or {})
    rows = map_rows(prompts, partial(prompt_ids, session))
    count = len(rows) or next((array.shape[0] for array in others.values()), 0)
    if not count:
        return []
    options = sampling or Sampling()
    names = session.names(adapters, count)
    if session.bundle.decoder:
        return _by_engine(session, rows, names, options, emit, others)
    decoder = decoder_of(session)(session, rows, names, others)
    require_context(session, decoder.lengths, decoder.virtual)
    ends = options.end_ids(session.tokenizer.eos_ids)
    mask = grammar_mask(session.tokenizer, options)
    choosers = [TokenChooser(options, prompt, ends, mask and mask.copy(), row)  # a row's draws do not depend on the others
                for row, prompt in enumerate(decoder.prompts)]
    batch = _Batch(session, choosers, ends, emit, _room(session, decoder.lengths, options.max_new_tokens))
    outputs, last = decoder.prefill(), decoder.last
    while True:
        tokens = batch.take(outputs["logits"].numpy()[range(count), last])
        if batch.finished:
            break
        outputs, last = decoder.step(tokens, outputs), np.zeros_like(last)
    lengths = [len(row) for row in rows] or [0] * count
    return [Generation(stream.text, tuple(stream.ids), reason or "length", name, length,
                       None if options.logprobs is None else tuple(choices[: len(stream.ids)]))
            for stream, reason, choices, name, length in zip(batch.streams, batch.reasons, batch.choices, names, lengths, strict=True)]


def _by_engine(session: OpenBundle, rows: Sequence[Sequence[int]], names: Sequence[str | None], options: Sampling, emit: Emit | None,
               given: Arrays) -> list[Generation]:
    packs = [None if name is None or session.bundle.mode == "folded" else session.pack(name) for name in names]
    features: list[dict[str, np.ndarray]] = [{} for _ in rows]
    if given:
        batch = pad(rows, session.pad_id, left=session.pads_left)
        images = run_parts(session, {**given, **batch}, names, parts=session.task.parts[:-1])
        features = [{name: array[row : row + 1] for name, array in images.items()} for row in range(len(rows))]
    ended = session.once("engine", SessionEngine).run(session, rows, packs, options, emit, features)
    return [Generation(row.stream.text, tuple(row.stream.ids), row.reason or "length", name, len(row.prompt),
                       None if options.logprobs is None else tuple(row.choices[: len(row.stream.ids)]))
            for row, name in zip(ended, names, strict=True)]


def _room(session: OpenBundle, lengths: np.ndarray, most: int) -> list[int]:
    """How many tokens may follow each row: as many as it has positions for, and one, whose position nobody needs."""
    context = context_of(session)
    return [most if context is None else min(most, context - int(length) + 1) for length in lengths]


class _Batch:
    """The answers of a batch so far; that of row ``i`` has at most ``room[i]`` tokens."""

    def __init__(self, session: OpenBundle, choosers: Sequence[TokenChooser], ends: frozenset[int], emit: Emit | None, room: Sequence[int]
                 ) -> None:
        self.choosers, self.ends, self.emit, self.room = choosers, ends, emit, room
        self.streams = [TextStream(session.tokenizer, chooser.options.stop) for chooser in choosers]
        self.reasons: list[str | None] = [None] * len(room)
        self.choices: list[list[Choice]] = [[] for _ in room]

    @property
    def finished(self) -> bool:
        return all(self.reasons)

    def take(self, logits: np.ndarray) -> np.ndarray:
        """Chooses one new token for every row that has not ended, from ``logits`` ``[rows, vocabulary]``; ``[rows]``."""
        tokens = np.zeros(len(logits), np.int64)  # a row that has ended is fed, too, and needs some token
        going = [row for row, reason in enumerate(self.reasons) if not reason]
        for row, choice in zip(going, choose(logits[going], [self.choosers[row] for row in going]), strict=True):
            if choice.error is not None:
                with row_errors(row + 1):
                    raise choice.error
            self._take(row, choice)
            tokens[row] = choice.token
        return tokens

    def _take(self, row: int, choice: Choice) -> None:
        stream, text_before = self.streams[row], self.streams[row].text
        self.choices[row].append(choice)
        ends = choice.token in self.ends
        if not ends:
            stream.push(choice.token)
        finished = ends or self.choosers[row].finished
        if finished or len(stream.ids) == self.room[row]:
            stream.finish()
            self.reasons[row] = "stop" if finished else "length"
        if stream.stopped:
            self.reasons[row] = "stop"
        if self.emit and (not ends or stream.text != text_before):
            self.emit(row, choice.token, stream.text)
