"""Generates text for a batch, each row with its own adapter: on the engine if the bundle has its graph,
otherwise by prefill and one step for each token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...bundle import without_decoder
from ...errors import AdapterpackError, ConfigError, Unsupported
from ...pack import Pack
from ...tasks import TASKS, Arrays
from ...tasks.data import RowError, map_rows, row_errors
from ..adapters import Mix, Mixes, combine
from ..engine import DecoderEngine, Request, not_in_bank
from ..generation import Answer, AnswerRequest, BeamAnswer, Ending, SampledToken, Sampling, grammar_mask
from ..media import OFFSETS
from ..open_bundle import OpenBundle
from ..ort import array_of
from ..padding import pad
from ..pipeline import run_parts
from ..prompts import Prompt, prompt_ids, start_ids
from ..text import context_of, require_context
from .decoder import DecoderOnly, EncoderDecoder

_MOST_ROWS = 64
"""The most rows of a batch that run at once; the others wait."""
_UNBOUNDED = 1 << 14
"""The most positions of a row, for models with an unbounded context."""
_STEP = 256
"""The length of the pool's rows is a multiple of this many positions, so that the engine is rarely
replaced.
"""

Emit = Callable[[int, int, str], None]
"""A callback for streaming: called with (row, token id, text so far) for every new token. Later calls only
extend the text, and the last text is that of the answer. It is called for the end token only if that releases
text that was held back.
"""


@dataclass(frozen=True)
class Generation:
    """The answer of one row: its text, its new token ids, why it ended (``stop`` or ``length``), and its
    adapter. ``logprobs`` has the choice of each token if the call asks for log-probabilities. ``sequences``
    are the best sequences of a beam search; the first is the answer.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    adapter: str | None
    prompt_tokens: int
    logprobs: tuple[SampledToken, ...] | None = None
    sequences: tuple[Ending, ...] = ()

    @classmethod
    def of(cls, answer: Answer | BeamAnswer, adapter: str | None, prompt_tokens: int) -> Generation:
        """Returns the result of an answer that has ended."""
        reason = answer.reason or "length"
        return cls(answer.text, answer.ids, reason, adapter, prompt_tokens, answer.logprobs, answer.sequences)


def generate(
    session: OpenBundle,
    prompts: Sequence[Prompt],
    adapters: Mixes = None,
    sampling: Sampling | None = None,
    emit: Emit | None = None,
    given: Arrays | None = None,
) -> list[Generation]:
    """Generates answers to ``prompts`` in one batch, each row with its own adapter, or with a weighted sum of
    several.

    A prompt is a text (for a decoder: one user message), a list of messages, or a list of token ids.
    ``given`` are other inputs: the ``pixel_values`` of the rows' images, or the ``input_features`` of speech
    in place of prompts.

    Raises:
        Unsupported: the bundle does not generate, or has no graph for a beam search or for sums of adapters.
        NotASum: the changes of several adapters cannot be added.
        UnknownAdapter: the bundle has no adapter of a name.
        ConfigError: a prompt has no tokens or is longer than the context (the error names the row), or the
            parameters leave no token to a row.
        NonFinite: the model gives NaN or infinity for a row.
    """
    if not session.task.generates:
        raise Unsupported(
            "the bundle does not generate text",
            found=session.bundle.task,
            expected=", ".join(task.name for task in TASKS.values() if task.generates),
        )
    others = dict(given or {})
    rows: Sequence[Sequence[int]] = map_rows(prompts, partial(prompt_ids, session))
    if not rows:  # speech, for example, in place of prompts
        rows = [()] * next((len(array) for array in others.values()), 0)
    if not rows:
        return []
    options = sampling or Sampling()
    packs = _choose_adapters(session, adapters, len(rows))
    if options.num_beams > 1 and emit is not None:
        raise ConfigError(
            "a beam search has no tokens to pass on before its end",
            where="emit",
            remedy="leave it out, or give num_beams=1",
        )
    run = _by_engine if session.bundle.decoder else _without_engine
    answers = run(session, rows, packs, others, options, emit)
    return [
        Generation.of(ended, name, len(ids))
        for ended, name, ids in zip(answers, _names(packs), rows, strict=True)
    ]


def _choose_adapters(session: OpenBundle, adapters: Mixes, count: int) -> list[Pack | Mix | None]:
    """Returns the adapter of each row, None for the base."""
    if isinstance(adapters, Mapping):
        adapters = [adapters] * count
    if adapters is None or isinstance(adapters, str):
        names = session.names(adapters, count)
        mixes = {}
    else:
        mixes = {place: row for place, row in enumerate(adapters) if isinstance(row, Mapping)}
        names = session.names([None if isinstance(row, Mapping) else row for row in adapters], count)
    packs: list[Pack | Mix | None] = [None if name is None else session.pack(name) for name in names]
    for place, mix in mixes.items():
        packs[place] = combine((session.pack(name), weight) for name, weight in mix.items())
    return packs


def _by_engine(
    session: OpenBundle,
    rows: Sequence[Sequence[int]],
    packs: Sequence[Pack | Mix | None],
    given: Arrays,
    options: Sampling,
    emit: Emit | None,
) -> Sequence[Answer | BeamAnswer]:
    """Answers a batch on the engine's graph.

    Raises:
        RowError: the model has no positions for a prompt.
        AdapterpackError: a row failed while it ran.
    """
    if session.task.has_encoder:
        rows = [()] * len(rows) if given else rows
        features = _by_row(given, len(rows))
    else:
        features = encode_images(session, rows, packs, given)
    with session.once("engine", SessionEngine).take() as engines:
        beams = options.num_beams
        longest = max(positions_of(session, ids, pack) for ids, pack in zip(rows, packs, strict=True))
        engine = engines.of(
            session,
            max(min(len(rows) * beams, _MOST_ROWS), beams),
            length_for(session, longest, options.max_new_tokens),
        )
        requests: list[Request] = []
        mask = grammar_mask(session.tokenizer_of(options), options)
        try:
            for number, (ids, pack, extra) in enumerate(zip(rows, packs, features, strict=True)):
                try:
                    requests.append(engine.row(ids, pack, options, extra, number, mask and mask.copy()))
                except RowError as error:
                    raise error.moved(number + 1) from error
        except BaseException:
            for request in requests:
                engine.discard(request)
            raise
        _run_to_end(engine, requests, emit)
        return [request.answer for request in requests]


def _run_to_end(engine: DecoderEngine, requests: Sequence[Request], emit: Emit | None) -> None:
    """Submits the requests of a batch and takes steps until all have ended. An error of one ends them all."""
    places = {request.number: place for place, request in enumerate(requests)}
    for request in requests:
        engine.submit(request)
    try:
        while engine.busy:
            # In the order of the rows, so that callbacks come in the same order every time.
            for event in sorted(engine.step(), key=lambda event: places[event.request]):
                if event.error is not None:
                    with row_errors(places[event.request] + 1):
                        raise event.error
                if emit is not None and event.token is not None:
                    emit(places[event.request], event.token, event.text)
    finally:
        if engine.busy:  # an error ended the batch
            for request in requests:
                engine.cancel(request.number)
            with suppress(AdapterpackError):
                engine.step()


def encode_images(
    session: OpenBundle, rows: Sequence[Sequence[int]], packs: Sequence[Pack | Mix | None], given: Arrays
) -> list[Arrays]:
    """Runs the image encoder on the images ``given`` for rows of token ids, and returns what the decoder
    reads of them, by row.

    Raises:
        Unsupported: adapters change how images are read, and a row's is a sum of several, or was loaded into
            the engine alone.
        ConfigError: the rows have other images than their tokens say.
    """
    if not given:
        return [{} for _ in rows]
    batch = pad(rows, session.pad_id, left=True)
    parts = session.task.parts[:-1]
    names: list[str | None] | None = None
    if {part.name for part in parts} & {site.part for site in session.bundle.sites.values() if site.fields}:
        if any(pack is not None and session.packs.get(pack.name) is not pack for pack in packs):
            raise not_in_bank(session, [pack.name for pack in packs if pack])
        names = _names(packs)
    found = run_parts(session, {**given, **batch}, names, parts=parts)
    features = _by_row(found, len(rows))
    for ids, own in zip(rows, features, strict=True):
        if OFFSETS in own:  # without those of the padding, which comes first
            own[OFFSETS] = own[OFFSETS][:, -len(ids) - 1 :]
    return features


def _by_row(arrays: Arrays, count: int) -> list[Arrays]:
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]


def _without_engine(
    session: OpenBundle,
    rows: Sequence[Sequence[int]],
    packs: Sequence[Pack | Mix | None],
    given: Arrays,
    options: Sampling,
    emit: Emit | None,
) -> Sequence[Answer | BeamAnswer]:
    """Answers a batch on the ordinary graph: a prefill pass, then one step for each token."""
    if any(isinstance(adapter, Mix) for adapter in packs):
        raise Unsupported(
            "adapters are added on the engine's graph, which this bundle does not have",
            where=session.folder,
            remedy="export it with --static-cache",
        )
    beams = options.num_beams
    if beams > 1 and given and not session.task.has_encoder:  # images are not in order of the rows
        raise without_decoder(session.bundle, session.given)
    begin = Answer if beams == 1 else BeamAnswer
    # each beam is a row of its own from the start
    decoder = (EncoderDecoder if session.task.has_encoder else DecoderOnly)(
        session,
        [ids for ids in rows for _ in range(beams)],
        [name for name in _names(packs) for _ in range(beams)],
        {name: array.repeat(beams, axis=0) for name, array in given.items()},
    )
    require_context(session, decoder.lengths, decoder.virtual)
    tokenizer = session.tokenizer_of(options)
    context = context_of(session)
    mask = grammar_mask(tokenizer, options)
    answers: list[Answer | BeamAnswer] = []
    for row, (prompt, length) in enumerate(
        zip(decoder.prompts[::beams], decoder.lengths[::beams], strict=True)
    ):
        room = options.room(len(prompt))
        if context is not None:  # the last token is never read, so it needs no position
            room = min(room, context - int(length) + 1)
        answers.append(begin(AnswerRequest(tokenizer, options, prompt, room, row, mask and mask.copy())))
    outputs = decoder.prefill()
    last = decoder.last
    while True:
        logits = array_of(outputs["logits"])[range(len(last)), last]
        tokens = np.zeros(len(last), np.int64)  # rows that have ended run along, and get the token 0
        parents = np.arange(len(last))
        for row, answer in enumerate(answers):
            if answer.reason is None:
                own = slice(row * beams, (row + 1) * beams)
                with row_errors(row + 1):
                    taken = answer.advance(list(logits[own]))
                tokens[own], parents[own] = taken.tokens, own.start + np.array(taken.parents)
                if emit is not None and taken.choice is not None:
                    emit(row, taken.choice.token, answer.text)
        if all(answer.reason for answer in answers):
            return answers
        if beams > 1:
            outputs = decoder.continuing(parents, outputs)
        outputs = decoder.step(tokens, outputs)
        last = np.full_like(last, -1)


def _names(packs: Sequence[Pack | Mix | None]) -> list[str | None]:
    return [None if pack is None else pack.name for pack in packs]


class GrowingEngine:
    """An engine that is made on first use, and replaced by a larger one when a call needs more or longer
    rows.
    """

    def __init__(self, prefix_budget: int = 0) -> None:
        self._prefix_budget = prefix_budget
        self.engine: DecoderEngine | None = None

    def of(self, session: OpenBundle, rows: int, length: int) -> DecoderEngine:
        """Returns an engine with at least so many rows of so many positions. No row may be running."""
        engine = self.engine
        if engine is None or engine.max_rows < rows or engine.max_length < length:
            self.engine = None  # frees its memory before the new pool is allocated
            if engine is not None:
                rows = max(rows, engine.max_rows)
                length = max(length, engine.max_length)
            engine = self.engine = DecoderEngine(
                session,
                max_rows=rows,
                max_length=length,
                prompts_together=True,
                prefix_budget=self._prefix_budget,
            )
        return engine


class SessionEngine:
    """The engine of a session, which its calls take one at a time."""

    def __init__(self) -> None:
        self._lock, self._engine, self._taken = threading.RLock(), GrowingEngine(), False

    @contextmanager
    def take(self) -> Iterator[GrowingEngine]:
        """Yields the engine to one call. A call from within another's ``emit`` gets an engine of its own."""
        with self._lock:
            inner, self._taken = self._taken, True
            try:
                yield GrowingEngine() if inner else self._engine
            finally:
                self._taken = inner


def length_for(session: OpenBundle, positions: int, new: int) -> int:
    """Returns the length that a row of the pool needs for so many positions and ``new`` tokens after them,
    within the model's context.
    """
    length = -(-(positions + new) // _STEP) * _STEP
    return min(length, context_of(session) or max(_UNBOUNDED, positions))


def positions_of(session: OpenBundle, ids: Sequence[int], pack: Pack | Mix | None) -> int:
    """Returns how many positions of a row's cache a prompt takes, with the prompt of its adapter."""
    read = len(start_ids(session)) if session.task.has_encoder else len(ids)
    return read + virtual_tokens(session, pack)


def virtual_tokens(session: OpenBundle, pack: Pack | Mix | None) -> int:
    """Returns how many positions a pack's prompt takes in a row's cache."""
    return 0 if pack is None or (prompt := session.prompt(pack)) is None else int(prompt.shape[3])
