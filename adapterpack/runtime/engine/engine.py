"""The engine of decoders: a decode loop with continuous batching, in which rows with different adapters join
and leave between steps.

A step decodes a token for every row whose prompt has been read, or prefills prompts, up to a budget of
tokens; where the graph can read tokens of several rows as one, running rows decode in the pass over a prompt.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from ...adapter_methods import Tensors
from ...bundle import without_decoder
from ...errors import AdapterpackError, ConfigError, Unsupported
from ...pack import Pack
from ...paths import StrPath
from ..adapters import Mix
from ..generation import (
    Answer,
    AnswerRequest,
    BeamAnswer,
    PassCosts,
    PromptLookup,
    SampledToken,
    Sampling,
    TokenMask,
    grammar_mask,
    sampling_of,
)
from ..open_bundle import OpenBundle
from ..prompts import Prompt, prompt_ids, require_no_image, start_ids
from ..providers import Device
from ..text import context_of, require_context
from .adapter_reader import AdapterReader
from .adapter_table import AdapterTable, Named
from .base import ENGINES, Engine, EngineKind
from .canary_replay import replay_resident
from .draft_model import DRAFTED, DraftModel
from .model_runner import ModelRunner
from .requests import Event, Request, SequenceState
from .sources import source_of

_LOG = logging.getLogger(__name__)
SHORT = 32
"""A step reads further prompts until it has read this many tokens."""
_MOMENT = 0.02
"""Seconds that a step waits if every row still waits for its grammar."""
LOOKUP_TOKENS = 8
"""The default for the most tokens of a row that a pass reads ahead."""
LONGEST_POOL = 4096
"""The default length of a row of the KV pool, for models with a longer context."""


class DecoderEngine(Engine):
    """Runs a bundle that has the engine's graph: up to ``max_rows`` requests at a time, of up to
    ``max_length`` positions each.

    ``prefill_budget`` is the most prompt tokens that a step reads. By default a step reads one prompt, or
    several short ones, so that no first token waits for other prompts. With ``prompts_together`` it reads as
    many as the budget allows, which finishes a full batch slightly sooner. ``adapter_budget`` is the most
    bytes of adapters that stay in memory without a running row, and ``prefix_budget`` the most bytes of keys
    and values, in host memory, that are kept for prompts with the same beginning. A row reads up to
    ``lookup_tokens`` tokens ahead (:mod:`..generation.prompt_lookup`), 0 for none; its answer is the same but
    for the noise between passes of one token and of several. What the text of a row that runs alone does not
    suggest, the ``draft`` guesses (:mod:`.draft_model`): a bundle of the same base in fewer bits, or of a
    smaller model.

    ``deterministic``: a row's logits have the same bits whatever runs beside it, since every step has the
    shape of a full batch: a step of few rows costs as much as one of ``max_rows``, and no prefix is shared
    and no token read ahead.

    Raises:
        Unsupported: the bundle has no graph for the engine; or it is to be deterministic, and its rows keep
            states, or it has an encoder.
    """

    max_length: int
    rows_a_turn = 1
    ahead = 2  # enough to refill rows that end in one step

    def __init__(
        self,
        bundle: StrPath | OpenBundle,
        provider: str | Device | None = None,
        *,
        threads: int | None = None,
        max_rows: int = 8,
        max_length: int | None = None,
        prefill_budget: int = 256,
        prompts_together: bool = False,
        adapter_budget: int = 1 << 30,
        prefix_budget: int = 256 << 20,
        lookup_tokens: int = LOOKUP_TOKENS,
        draft: StrPath | OpenBundle | None = None,
        deterministic: bool = False,
        verify: str = "cached",
    ) -> None:
        device = Device.of(provider, threads)
        if draft is not None and device.spinning is None:
            device = replace(device, spinning=False)  # idle threads of one graph would hold up the other's
        self.bundle = OpenBundle.of(bundle, device, None, verify)
        if not self.bundle.bundle.decoder:
            raise without_decoder(self.bundle.bundle, self.bundle.given)
        if max_rows < 1 or prefill_budget < 1 or (max_length is not None and max_length < 1):
            raise ConfigError(
                "an engine has at least one row, one position and one token of prompts a step",
                found=f"max_rows {max_rows}, max_length {max_length}, prefill_budget {prefill_budget}",
            )
        context = context_of(self.bundle)
        self.max_rows, self.prefill_budget, self.prompts_together = max_rows, prefill_budget, prompts_together
        self.max_length = min(max_length or LONGEST_POOL, context or max_length or LONGEST_POOL)
        reader = AdapterReader(self.bundle)
        replay = partial(replay_resident, self.bundle, reader)
        self.adapters = AdapterTable(self.bundle, reader.read, replay, adapter_budget)
        self.rows = ModelRunner(
            self.bundle,
            reader,
            max_rows,
            self.max_length,
            0 if deterministic else prefix_budget,
            deterministic,
        )
        self.lookup_tokens, self.deterministic = 0 if deterministic else lookup_tokens, deterministic
        if draft is not None and deterministic:
            raise Unsupported("a deterministic engine reads no token ahead", remedy="leave the draft out")
        self.draft = draft and DraftModel(
            draft, self.bundle, reader.layout, device, self.max_length, prefix_budget
        )
        self._start = start_ids(self.bundle) if self.bundle.task.has_encoder else None
        self._prompts_next = False
        self._costs = PassCosts()

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return super().busy or bool(len(self.rows))

    def add(
        self,
        prompt: Prompt = (),
        adapter: Named = None,
        *,
        features: Tensors | None = None,
        cache_salt: str = "",
        prompt_logprobs: int | None = None,
        **options: Any,
    ) -> int:
        """Adds a request and returns its number; any thread may call it. The row begins when one of the
        ``max_rows`` is free.

        ``prompt`` is a text (for a decoder: one user message), a list of messages, or token ids. ``adapter``
        is a name, a pack, or names with weights (``{"orders": 0.7, "formal": 0.3}``), whose changes are added
        for this row. ``features`` are other inputs ``[1, ...]``: ``image_features``, or the
        ``input_features`` of speech in place of a prompt. Rows share cached prefixes only with rows that have
        the same ``cache_salt``. ``prompt_logprobs`` N gives the log-probability of each token of the prompt,
        and the N likeliest at its place, in the events' ``scored``; such a row reads its whole prompt.
        ``options`` are the fields of :class:`.Sampling`. The adapter is read here,
        and the row keeps it, whatever is loaded or unloaded meanwhile.

        Raises:
            UnknownAdapter: no adapter has that name.
            BaseMismatch, Unsupported: the pack belongs to another base or task.
            ConfigError: the prompt has no tokens or more than the model or the engine has positions for, or
                an option is out of range.
            NotASum: the changes of several adapters cannot be added.
        """
        pack = self.adapters.of_row(adapter)
        sampling = sampling_of(options, self.bundle.generation_config, self.bundle.folder)
        ids = [] if self._start is not None and features else prompt_ids(self.bundle, prompt)
        row = self.row(ids, pack, sampling, features, cache_salt=cache_salt, prompt_logprobs=prompt_logprobs)
        self.submit(row)
        return row.number

    def row(
        self,
        ids: Sequence[int],
        pack: Pack | Mix | None,
        sampling: Sampling,
        features: Tensors | None = None,
        place: int = 0,
        mask: TokenMask | None = None,
        cache_salt: str = "",
        prompt_logprobs: int | None = None,
    ) -> Request:
        """Makes a request, which the caller then passes to :meth:`submit` or :meth:`discard`. Its adapter
        stays in memory until then.

        Rows with one seed draw different numbers if they have a different ``place``. ``mask`` is the compiled
        grammar of the sampling parameters, if the caller has it.

        Raises:
            ConfigError: see :meth:`add`.
        """
        if prompt_logprobs is not None and (features or self._start is not None):
            raise Unsupported(
                "log-probabilities of a prompt are those of texts that a decoder reads",
                where="prompt_logprobs",
            )
        if not features and "image_features" in self.bundle.task.main.inputs:
            require_no_image(self.bundle, ids)
        adapter = None if pack is None else self.adapters.acquire(pack)
        try:
            source: Tensors = {}
            if self._start is not None:
                source, features = source_of(self.bundle, list(ids), features or {}), {}
                ids = self._start
            sequence = SequenceState(
                prompt=ids,
                adapter=adapter,
                features=features or {},
                source=source,
                scores=prompt_logprobs,
                salt=hashlib.sha256(cache_salt.encode("utf-8", "surrogatepass")).digest(),
            )
            room, tokenizer = self._room(sequence, sampling), self.bundle.tokenizer_of(sampling)
            mask = mask or grammar_mask(tokenizer, sampling)
            begin = Answer if sampling.num_beams == 1 else BeamAnswer
            answer = begin(AnswerRequest(tokenizer, sampling, ids, room, place, mask))
            return Request(next(self._numbers), answer, [sequence])
        except BaseException:
            if adapter is not None:
                self.adapters.release(adapter)
            raise

    def _room(self, sequence: SequenceState, sampling: Sampling) -> int:
        """Returns the most tokens that the answer to a prompt may have.

        Raises:
            ConfigError: the prompt is too long, or the engine has too few rows for its beams.
        """
        virtual = sequence.virtual
        total = virtual + len(sequence.prompt)
        require_context(self.bundle, np.array([total]), virtual)
        if total > self.max_length:
            raise ConfigError(
                "a prompt is longer than the engine's rows",
                expected=f"at most {self.max_length} tokens",
                found=total,
                remedy="open the engine with a larger max_length",
            )
        if sampling.num_beams > self.max_rows:
            raise ConfigError(
                "a beam search needs a row for each beam",
                where="num_beams",
                found=sampling.num_beams,
                expected=f"at most {self.max_rows} in this engine",
                remedy="open the engine with more max_rows",
            )
        # the last token is returned without being read, so it needs no position
        return min(sampling.room(len(sequence.prompt)), self.max_length - total + 1)

    def _step(self) -> list[Event]:
        """Takes in messages, then either reads prompts or decodes one token for every running row.

        With both to do one pass does both where the graph can; else it alternates, so that a client whose
        answer has ended can send its next request before more prompts are read.
        """
        events: list[Event] = []
        self._take_messages(events)
        while self._waiting and self._taken + self._waiting[0].answer.width <= self.max_rows:
            self.rows.admit(self._waiting.popleft().sequences[0])
        self._prompts_next = bool(self.rows.reading) and (self._prompts_next or not self.rows.running)
        if self._prompts_next:
            self._prompts_next = self._read_prompts(events)
        else:
            self._decode(events)
            self._prompts_next = True
        return events

    def forget(self) -> None:
        """Drops the cached prefixes."""
        self.rows.prefixes.clear()
        if self.draft:
            self.draft.forget()

    @property
    def _taken(self) -> int:
        """The number of rows in use, including those that beam searches will need once their prompts have
        been read.
        """
        reading: int = sum(row.request.answer.width for row in self.rows.reading)
        return len(self.rows.running) + reading

    def _cancel(self, number: int, events: list[Event]) -> None:
        known = [*self._waiting, *(row.request for row in (*self.rows.reading, *self.rows.running))]
        for request in {request for request in known if request.number == number}:
            self._end(request, "cancelled", events)

    def _decode(self, events: list[Event]) -> None:
        """Decodes one token for every running row. A row whose grammar is not ready takes the step back and
        repeats it, so that the other rows need not wait. If the batch fails, each row runs again alone, so
        that only the row at fault ends.
        """
        rows = list(self.rows.running)
        if not rows or not _any_ready(rows):
            return
        started = perf_counter()
        guesses = self._guess(rows)
        if any(guesses) and self._read_ahead(rows, guesses, events):
            tokens = len(rows) + sum(map(len, guesses))
        else:
            try:
                answers = list(self.rows.decode())
            except AdapterpackError as error:
                answers = [error] if len(rows) == 1 else [self._alone(place) for place in range(len(rows))]
            self._take_all(rows, answers, events)
            tokens = len(rows)
        if len(rows) > 1:
            self._costs.add(tokens, perf_counter() - started)

    def _take_all(
        self,
        rows: Sequence[SequenceState],
        answers: Sequence[Any],
        events: list[Event],
    ) -> None:
        """Gives each of the rows the logits after its next token, or the error of its pass."""
        by_row = dict(zip(rows, answers, strict=True))
        for request in dict.fromkeys(row.request for row in rows):
            taken = [by_row[row] for row in request.sequences]
            failed = next((one for one in taken if isinstance(one, AdapterpackError)), None)
            if failed is not None:
                self._end(request, "error", events, failed)
            elif request.answer.pending is None:
                self._take(request, taken, events)
            else:
                self.rows.retract(request.sequences[0])

    def _guess(self, rows: Sequence[SequenceState]) -> list[list[int]]:
        """Returns for each of the running rows the tokens that are likely to follow its next token: none
        where one pass cannot read them, or where they would take longer than they save. A draft guesses for a
        row that runs alone.
        """
        single = not self.rows.reading and all(row.request.answer.width == 1 for row in rows)
        if not single or not (len(rows) == 1 or self.rows.joins(rows)):
            return []
        worth = 0.0 if len(rows) == 1 else self._costs.worth(len(rows))
        guesses = [self._guess_of(row, worth, len(rows) == 1) for row in rows]
        return guesses if sum(map(len, guesses)) + len(rows) <= self.rows.most_logits else []

    def _guess_of(self, row: SequenceState, worth: float, alone: bool) -> list[int]:
        # a row with images has none: the marks of its images would be among them
        if row.features or not (self.lookup_tokens or self.draft):
            return []
        request = row.request
        if request.lookup is None:
            request.lookup = PromptLookup(row.prompt, self.lookup_tokens)
        request.lookup.extend([*row.answered, row.next_token][len(request.lookup) - len(row.prompt) :])
        guessed: list[int] = request.lookup.guess(worth)
        request.length = request.lookup.length
        if not guessed and alone and self.draft and self.rows.can_read_ahead(row, DRAFTED):
            try:
                guessed, request.length = self.draft.guess(row), self.draft.length
            except AdapterpackError as error:  # answers need no draft
                _LOG.warning("the draft is not asked any more: %s", error)
                self.draft = None
        return guessed if self.rows.can_read_ahead(row, len(guessed)) else []

    def _read_ahead(
        self, rows: Sequence[SequenceState], guesses: Sequence[Sequence[int]], events: list[Event]
    ) -> bool:
        """Reads the rows' next tokens and guessed ones in one pass, and chooses after each token as a step
        does, for as long as the choice is what was guessed. Says whether it did: if the pass of several rows
        fails, a step has to show which row is at fault.
        """
        try:
            logits = self.rows.read_ahead(rows, guesses)
        except AdapterpackError as error:
            if len(rows) == 1:
                self._end(rows[0].request, "error", events, error)
            return len(rows) == 1
        # from the last on: a row that takes the place of one that ends brings what it has taken in
        for row, guessed, after in reversed([*zip(rows, guesses, logits, strict=True)]):
            request, right = row.request, 0
            for one, guess in zip(after, [*guessed, None], strict=True):
                self.rows.advance(row)
                if request.answer.pending is not None and (len(rows) > 1 or not _any_ready([row])):
                    self.rows.retract(row)
                    break
                self._take(request, [one], events)
                if request.answer.reason is not None or row.next_token != guess:
                    break
                right += 1
            if guessed:
                request.length.judge(len(guessed), right)
        return True

    def _alone(self, place: int) -> np.ndarray | AdapterpackError:
        try:
            logits: np.ndarray = self.rows.decode(place)[0]
            return logits
        except AdapterpackError as error:
            return error

    def _read_prompts(self, events: list[Event]) -> bool:
        """Reads prompts in the order of their arrival; a prompt longer than the budget takes
        several steps. Where the graph can, the running rows' next tokens ride along with the first; says
        whether they did.
        """
        enough = self.prefill_budget if self.prompts_together else min(SHORT, self.prefill_budget)
        read, running, rode = 0, list(self.rows.running), False
        while read < enough and self.rows.reading:
            row = self.rows.next_to_read()
            request, left = row.request, len(row.prompt) - row.num_computed_tokens
            # pieces that other prompts shorten have other shapes, and their products other bits
            piece = self.prefill_budget - (0 if self.deterministic else read)
            tokens = left if row.whole else min(piece, left)
            riders = running if self.rows.takes_riders(row) else []
            try:
                logits, *others_logits = self.rows.prefill_beside(tokens, riders)
            except AdapterpackError as error:
                if not riders:  # else it may be the fault of another row
                    self._end(request, "error", events, error)
                running = []
                continue
            read += tokens + max((array.shape[-1] for array in row.source.values()), default=0)
            if riders:
                self._take_all(riders, others_logits, events)
                running, rode = [], True
            if tokens == left:
                others = [row.fork() for _ in range(request.answer.width - 1)]
                self.rows.add_rows(others)
                request.sequences += others
                self._take(request, [logits] * request.answer.width, events)
        return rode

    def _take(self, request: Request, logits: Sequence[np.ndarray], events: list[Event]) -> None:
        """Gives the logits to a request, which chooses the next token of each of its sequences, and ends the
        request if its answer is complete.
        """
        try:
            taken = request.answer.advance(logits)
        except AdapterpackError as error:
            self._end(request, "error", events, error)
            return
        if request.answer.reason is not None:
            self._end(request, request.answer.reason, events, choice=taken.choice)
            return
        request.sequences = self.rows.rearrange(request.sequences, taken.parents)
        for sequence, token in zip(request.sequences, taken.tokens, strict=True):
            sequence.next_token = token
        if (choice := taken.choice) is not None:
            events.append(_event(request, choice))

    def _end(
        self,
        request: Request,
        reason: str,
        events: list[Event],
        error: AdapterpackError | None = None,
        choice: SampledToken | None = None,
    ) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            for place, sequence in enumerate(request.sequences):
                self.rows.remove(sequence, keep=error is None and not place)
        self.discard(request)
        request.answer.reason = reason
        events.append(_event(request, choice, reason, error))


def _event(
    request: Request,
    choice: SampledToken | None,
    reason: str | None = None,
    error: AdapterpackError | None = None,
) -> Event:
    answer, first = request.answer, request.sequences[0]
    return Event(
        request.number,
        request.digest,
        None if choice is None else choice.token,
        choice,
        answer.text,
        reason,
        error,
        sequences=answer.sequences,
        ending=answer.ending,
        stop=answer.stop,
        reused=first.reused,
        scored=first.scored,
    )


def _any_ready(rows: Sequence[SequenceState]) -> bool:
    """Returns whether some row can take its next token. If all rows wait for their grammars it waits a moment
    first, so that the loop does not spin.
    """
    pending = [one for row in rows if (one := row.request.answer.pending) is not None]
    return len(pending) < len(rows) or bool(wait(pending, _MOMENT, FIRST_COMPLETED).done)


ENGINES.register(EngineKind("decoder", lambda task: task.generates, DecoderEngine))
