"""Generates text for a batch, each row with its own adapter: on the engine if the bundle has its graph,
otherwise by prefill and one step for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...bundle.decoder_graph import without_decoder
from ...errors import ConfigError, Unsupported
from ...pack.pack import Pack
from ...tasks.data.rows import map_rows, row_errors
from ...tasks.session import Arrays
from ...tasks.task import TASKS
from ..adapters.mix import Mix, Mixes, combine
from ..generation.answer import Answer, AnswerRequest, Ending
from ..generation.beam_search import BeamAnswer
from ..generation.sampler import SampledToken, sample
from ..generation.sampling import Sampling
from ..generation.structured import grammar_mask
from ..model_inputs import pad
from ..open_bundle import OpenBundle
from ..ort.values import array_of
from ..pipeline import run_parts
from ..prompts import Prompt, prompt_ids
from ..text.context_length import context_of, require_context
from .decoder import decoder_of
from .session_engine import SessionEngine

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
    rows = map_rows(prompts, partial(prompt_ids, session))
    count = len(rows) or next((array.shape[0] for array in others.values()), 0)
    if not count:
        return []
    options = sampling or Sampling()
    chosen, sums = _choose_adapters(session, adapters, count)
    names = [
        None if adapter is None else adapter if isinstance(adapter, str) else adapter.name
        for adapter in chosen
    ]
    if options.num_beams > 1 and emit is not None:
        raise ConfigError(
            "a beam search has no tokens to pass on before its end",
            where="emit",
            remedy="leave it out, or give num_beams=1",
        )
    if session.bundle.decoder:
        return _by_engine(session, rows, chosen, names, options, emit, others)
    if sums:
        raise Unsupported(
            "adapters are added on the engine's graph, which this bundle does not have",
            where=session.folder,
            remedy="export it with --static-cache",
        )
    if options.num_beams > 1:
        raise without_decoder(session.bundle, session.folder)
    decoder = decoder_of(session)(session, rows, names, others)
    require_context(session, decoder.lengths, decoder.virtual)
    tokenizer = session.tokenizer_of(options)
    mask = grammar_mask(tokenizer, options)
    answers = [
        Answer(
            AnswerRequest(
                tokenizer,
                options,
                prompt,
                _room(session, int(length), options.room(len(prompt))),
                row,
                mask and mask.copy(),
            )
        )
        for row, (prompt, length) in enumerate(zip(decoder.prompts, decoder.lengths, strict=True))
    ]
    outputs, last = decoder.prefill(), decoder.last
    while True:
        tokens = _sample_step(answers, array_of(outputs["logits"])[range(count), last], emit)
        if all(answer.reason for answer in answers):
            break
        outputs, last = decoder.step(tokens, outputs), np.full_like(last, -1)
    return _generations(answers, names, [len(row) for row in rows] or [0] * count)


def _generations(
    answers: Sequence[Answer | BeamAnswer], names: Sequence[str | None], lengths: Sequence[int]
) -> list[Generation]:
    return [
        Generation(
            answer.text,
            answer.ids,
            answer.reason or "length",
            name,
            length,
            answer.logprobs,
            answer.sequences,
        )
        for answer, name, length in zip(answers, names, lengths, strict=True)
    ]


def _choose_adapters(
    session: OpenBundle, adapters: Mixes, count: int
) -> tuple[list[str | Pack | Mix | None], bool]:
    """Returns the adapter of each row, as a name or a mix, and whether any row has a mix."""
    rows = (
        [adapters] * count
        if isinstance(adapters, Mapping)
        else []
        if adapters is None or isinstance(adapters, str)
        else list(adapters)
    )
    if not any(isinstance(row, Mapping) for row in rows):
        return list(session.names(adapters, count)), False  # type: ignore[arg-type]
    names = session.names([None if isinstance(row, Mapping) else row for row in rows], count)
    return [
        combine((session.pack(part), weight) for part, weight in row.items())
        if isinstance(row, Mapping)
        else name
        for row, name in zip(rows, names, strict=True)
    ], True


def _by_engine(
    session: OpenBundle,
    rows: Sequence[Sequence[int]],
    chosen: Sequence[str | Pack | Mix | None],
    names: Sequence[str | None],
    options: Sampling,
    emit: Emit | None,
    given: Arrays,
) -> list[Generation]:
    packs = [session.pack(adapter) if isinstance(adapter, str) else adapter for adapter in chosen]
    features: list[dict[str, np.ndarray]] = [{} for _ in names]
    if given and session.task.has_encoder:
        features, rows = (
            [{name: array[row : row + 1] for name, array in given.items()} for row in range(len(names))],
            [()] * len(names),
        )
    elif given:
        if any(isinstance(adapter, Mix) for adapter in chosen):
            raise Unsupported(
                "adapters cannot be added in rows with images", where=session.folder, remedy="name one a row"
            )
        batch = pad(rows, session.pad_id, left=session.pads_left)
        images = run_parts(session, {**given, **batch}, names, parts=session.task.parts[:-1])
        features = [
            {name: array[row : row + 1] for name, array in images.items()} for row in range(len(rows))
        ]
    ended = session.once("engine", SessionEngine).run(session, rows, packs, options, emit, features)
    return _generations([row.answer for row in ended], names, [len(row) for row in rows])


def _room(session: OpenBundle, length: int, most: int) -> int:
    """Returns how many tokens may follow a row: its remaining positions and one more, since the last token is
    never read.
    """
    context = context_of(session)
    return most if context is None else min(most, context - length + 1)


def _sample_step(answers: Sequence[Answer], logits: np.ndarray, emit: Emit | None) -> np.ndarray:
    """Chooses one token for every unfinished row from ``logits`` ``[rows, vocabulary]``, and returns the
    tokens of all rows, ``[rows]``.
    """
    tokens = np.zeros(len(answers), np.int64)  # finished rows run along, and get the token 0
    going = [row for row, answer in enumerate(answers) if not answer.reason]
    for row, choice in zip(
        going, sample(logits[going], [answers[row].sampler for row in going]), strict=True
    ):
        if choice.error is not None:
            with row_errors(row + 1):
                raise choice.error
        passed_on = answers[row].take(choice)
        if emit and passed_on:
            emit(row, choice.token, answers[row].text)
        tokens[row] = choice.token
    return tokens
