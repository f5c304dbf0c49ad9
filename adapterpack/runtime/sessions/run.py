"""Runs rows through a bundle, each with its own adapter and starting as soon as another ends, and yields
results in the order of the rows.

Rows run in blocks that never overlap. The last digits of a result depend on the other rows of its batch, so a
job that is stopped after a block and continued later gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any

from ...errors import AdapterpackError, ConfigError
from ...pack import AUTO, Pack
from ...paths import StrPath
from ...tasks import OnePass, describe
from ...tasks.data import COLUMNS, PROMPTS, Row, RowError, among, map_rows, row_errors
from ..engine import DecoderEngine, EncoderEngine, Engine, Event, Request
from ..generation import Sampling, grammar_mask, sampling_of
from ..prompts import prompt_ids
from ..providers import Device
from .generate import Generation, GrowingEngine, length_for, positions_of
from .session import Session

BLOCK = 16
"""Batches in a block. At the end of a block batches run partly empty, so short blocks waste time."""
_AHEAD = 8
"""How many batches of rows are read ahead, so that rows of similar length can run together."""
_LENGTH = 512
"""The initial length of the engine's rows, in positions."""
_PREFIXES = 256 << 20
"""The bytes of the prefix cache, which the rows of a block share."""


_TEXTS = (*PROMPTS, "text_pair", "question", "context")
"""The columns whose texts choose an adapter."""


@dataclass
class RowOutcome:
    """The outcome of a row: its ``result`` or its ``error``. ``number`` counts rows from 1; ``tokens`` is the
    number of tokens that it took; ``pack`` is the id of the adapter with which it began.
    """

    number: int
    row: Row
    result: dict[str, Any] | None = None
    error: AdapterpackError | None = None
    pack: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    request: Request | None = field(default=None, repr=False)


def row_runner(
    bundle: StrPath,
    *,
    adapters: Sequence[str | Pack] = (),
    provider: str | Device | None = None,
    batch_size: int = 16,
    raw: bool = False,
    **sampling: Any,
) -> RowRunner:
    """Makes the runner of :func:`run`, for callers that keep earlier results themselves.

    Raises:
        ConfigError, UnknownAdapter: see :func:`run`.
    """
    if batch_size < 1:
        raise ConfigError("batch_size must be at least 1", found=batch_size)
    session = Session(bundle, provider)
    names = [one if isinstance(one, str) else session.load(one) for one in adapters]
    return RowRunner(session, names, batch_size, sampling, raw)


def run(
    bundle: StrPath,
    rows: Iterable[Row],
    *,
    adapters: Sequence[str | Pack] = (),
    provider: str | Device | None = None,
    batch_size: int = 16,
    raw: bool = False,
    **sampling: Any,
) -> Iterator[dict[str, Any]]:
    """Runs rows through a bundle, and gives a result for each, in order.

    A row is a mapping with ``text``, ``prompt`` or ``messages``, with ``question`` and ``context``, with
    ``image`` (the path of a PNG, a JPEG or a ``.npy`` file, ``data:image/...``, the bytes of an encoded
    image, or an array) or ``audio`` (the path of a file, see :mod:`~adapterpack.runtime.media.inputs`), and
    an optional ``adapter`` (null: the base; ``auto``: the one that :meth:`.Session.choose` finds, and
    ``sure`` in the result says how sure). A row that names no adapter runs with each of ``adapters`` in turn
    (names, or packs, which are loaded), or without these with the base, or with the adapter that is folded
    into the bundle. A language model with a chat template reads a text as a user's message, or with ``raw``
    without the template.

    ``sampling`` are the parameters of generated answers, or the options of a task that answers in one pass,
    such as the ``threshold`` of a detector.

    Raises:
        ConfigError: a row has no known form or cannot be run (:class:`~adapterpack.tasks.data.rows.RowError`,
            with its number), or a sampling parameter does not exist, or not for this task.
        UnknownAdapter: the bundle has no adapter of a name; raised before the row runs.

    Example:
        >>> list(run("bundle", [{"text": "hi", "adapter": "tickets"}]))  # doctest: +SKIP
        [{'text': 'hi', 'adapter': 'tickets', 'pack': 'sha256:...', 'label': 'product', 'scores': {...}}]
    """
    runner = row_runner(
        bundle, adapters=adapters, provider=provider, batch_size=batch_size, raw=raw, **sampling
    )
    for _, block in groupby(_number_rows(rows), lambda pair: (pair[0] - 1) // runner.block):
        for outcome in runner.outcomes(block):
            if outcome.error is not None:
                raise outcome.error
            yield outcome.result or {}


def _number_rows(rows: Iterable[Row]) -> Iterator[tuple[int, Row | AdapterpackError]]:
    """Yields the rows with their numbers. If reading them fails, yields the error as the next row, so that
    earlier results still come out.
    """
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except AdapterpackError as error:
        yield number + 1, error


class RowRunner:
    """Runs blocks of rows through a bundle, each row with its own adapter. A row that names no adapter runs
    with each of ``adapters``. With ``raw`` texts are read without the chat template.

    Raises:
        ConfigError: a sampling parameter does not exist, or not for this task.
        UnknownAdapter: the bundle has no adapter of a name.
    """

    def __init__(
        self,
        session: Session,
        adapters: Sequence[str],
        batch_size: int,
        sampling: Mapping[str, Any],
        raw: bool = False,
    ) -> None:
        answer = session.task.answer
        if raw and (session.task.prompt is None or not session.task.generates):
            raise ConfigError(
                "this bundle does not read prompts in a chat template",
                where=session.bundle.task,
                found="raw",
                remedy="leave --raw (raw=True) out: its texts are read as they are",
            )
        own = [one.name for one in dataclasses.fields(answer.options)] if isinstance(answer, OnePass) else []
        if not session.task.generates and not {*sampling} <= {*own}:
            raise ConfigError(
                "this bundle does not generate text, so it takes no sampling parameters",
                found=", ".join(sampling),
                where=session.bundle.task,
            )
        self.provider = session.provider
        self._session = session
        self._sampling = sampling
        self._raw = raw
        if any(map(self._chooses, adapters)):
            session.choose()
            adapters = [AUTO]
        else:
            for name in adapters:
                session.pack(name)
        self._adapters = tuple(dict.fromkeys(adapters)) or (session.default,)
        self._columns: Mapping[str, Any] = {**COLUMNS, **session.task.columns}
        self._batch_size = batch_size
        self.block = BLOCK * batch_size
        self._executor: _Executor | None = None
        """None for tasks that only run in batches."""
        if isinstance(session.task.answer, OnePass):
            self._executor = _OnePasses(session, batch_size, sampling)
        elif session.bundle.decoder and session.task.prompt is not None:
            options = sampling_of(sampling, session.generation_config, session.folder)
            self._executor = _Texts(session, batch_size, options, raw)

    def require_answers(self) -> None:
        """Checks that rows which name no adapter can be answered.

        Raises:
            ConfigError: neither the base nor one of ``adapters`` has a trained head for the task.
        """
        session, task = self._session, self._session.task
        names = session.adapters if self._chooses(self._adapters[0]) else self._adapters
        heads = [session.head(None if name is None else session.pack(name)) for name in names]
        if not task.heads or any(
            head.trained and not (task.labelled and head.labels is None) for head in heads
        ):
            return
        raise ConfigError(
            "the base has no trained head for this task",
            where=task.name,
            remedy=(
                "name an adapter that has one with --adapter: "
                f"{', '.join(session.adapters[:20]) or 'the bundle holds none'}"
            ),
        )

    def outcomes(self, rows: Iterable[tuple[int, Row | AdapterpackError]]) -> Iterator[RowOutcome]:
        """Yields the outcomes of the rows of a block, in order. An error in place of a row becomes its
        outcome.
        """
        begun = (outcome for number, row in rows for outcome in self._expand(number, row))
        if self._executor is not None:
            yield from _in_order(self._executor, begun)
            return
        while batch := list(islice(begun, self._batch_size)):
            yield from self._answer_batch(batch)

    def _expand(self, number: int, row: Row | AdapterpackError) -> Iterator[RowOutcome]:
        """Yields a row with its own adapter, or once for each of the runner's adapters."""
        if isinstance(row, AdapterpackError):
            yield RowOutcome(number, {}, error=row)
        elif not isinstance(row, Mapping):
            yield RowOutcome(
                number,
                {},
                error=RowError(
                    "a row is a mapping",
                    row=number,
                    expected=", ".join(self._columns),
                    found=type(row).__name__,
                ),
            )
        elif not any(isinstance(row.get(column), kind) for column, kind in self._columns.items()):
            yield RowOutcome(
                number,
                row,
                error=RowError(
                    f"a row needs {', '.join((*self._columns,)[:-1])} or {[*self._columns][-1]}",
                    row=number,
                    found=", ".join(map(str, row)) or "an empty row",
                ),
            )
        else:
            for name in [row["adapter"]] if "adapter" in row else self._adapters:
                yield self._begin(number, {**row, "adapter": name})

    def _chooses(self, name: object) -> bool:
        return name == AUTO and AUTO not in self._session.adapters

    def _begin(self, number: int, row: Row) -> RowOutcome:
        """Returns a row's outcome, with the adapter that its text chooses if it leaves that open."""
        if not self._chooses(row["adapter"]):
            return RowOutcome(number, row)
        try:
            name, sure = self._session.choose(*(row.get(column) for column in _TEXTS))
        except AdapterpackError as error:
            return RowOutcome(number, row, error=error)
        return RowOutcome(number, {**row, "adapter": name, "sure": round(sure, 3)})

    def _answer_batch(self, batch: Sequence[RowOutcome]) -> Iterator[RowOutcome]:
        """Runs rows as one batch. If a row is at fault, the rows before and after it run without it."""
        rows = [outcome for outcome in batch if outcome.error is None]
        try:
            self._answer(rows)
        except AdapterpackError as error:
            place = error.row - 1 if isinstance(error, RowError) else 0
            # the error does not say which row is at fault
            if not isinstance(error, RowError) and len(rows) > 1:
                for outcome in batch:
                    yield from self._answer_batch([outcome])
                return
            at = batch.index(rows[place])
            yield from self._answer_batch(batch[:at])
            rows[place].error = error.moved(rows[place].number) if isinstance(error, RowError) else error
            yield rows[place]
            yield from self._answer_batch(batch[at + 1 :])
            return
        yield from batch

    def _answer(self, batch: Sequence[RowOutcome]) -> None:
        if not batch:
            return
        session = self._session.freeze()
        names = session.names([outcome.row["adapter"] for outcome in batch], len(batch))
        rows = [outcome.row for outcome in batch]
        if self._raw and session.task.prompt is not None:
            prompts = map_rows(rows, session.task.prompt)
            ids = map_rows(prompts, partial(prompt_ids, session, raw=True))
            rows = [{**row, PROMPTS[0]: own} for row, own in zip(rows, ids, strict=True)]
        assert not isinstance(session.task.answer, OnePass)
        results = session.task.answer(session, rows, names, self._sampling)
        for outcome, name, result in zip(batch, names, results, strict=True):
            outcome.result = {
                **outcome.row,
                "adapter": name,
                "pack": None if name is None else session.packs[name].id,
                **result,
            }
            outcome.tokens = result.get("completion_tokens", 0)


class _Executor:
    """Runs the rows of one kind of bundle on an ``engine``. ``ahead`` is the most rows that may have begun
    without having ended.
    """

    engine: Engine
    ahead: int

    def begin(self) -> None:
        """Drops state of an earlier block, such as cached prefixes, so that blocks do not depend on each
        other.
        """

    def add(self, outcome: RowOutcome) -> int | None:
        """Begins a row and returns the number of its request, or None if the running rows must end first.

        Raises:
            AdapterpackError: the row cannot be run.
        """
        raise NotImplementedError

    def take(self, outcome: RowOutcome, event: Event) -> None:
        """Records the last event of a row in its outcome."""
        raise NotImplementedError


class _OnePasses(_Executor):
    """Executes rows of one pass each on the encoder engine. It reads enough rows ahead to combine those of
    similar length.
    """

    def __init__(self, session: Session, batch_size: int, options: Mapping[str, Any]) -> None:
        self._options = options
        self._session, self.engine = session, EncoderEngine(session, max_rows=batch_size)
        self.ahead = 1 + _AHEAD * (batch_size - 1)

    def add(self, outcome: RowOutcome) -> int:
        """Adds the row to the engine. A row that names the base raises here if the bundle is folded, since
        the engine would give it the folded adapter.
        """
        (name,) = self._session.names([outcome.row["adapter"]], 1)
        self._session.pin([name])
        return self.engine.add(outcome.row, name, **self._options)

    def take(self, outcome: RowOutcome, event: Event) -> None:
        """Stores the result of the row's pass."""
        outcome.result = {**outcome.row, "pack": event.adapter, **(event.result or {})}
        outcome.tokens = event.prompt_tokens or 0


class _Texts(_Executor):
    """Executes rows with generated answers on the decoder engine. The engine is as long as its rows need; a
    longer row waits until the running rows have ended and then gets a larger engine.
    """

    def __init__(self, session: Session, batch_size: int, sampling: Sampling, raw: bool) -> None:
        self._session = session
        self._sampling = sampling
        self._raw = raw
        self._engines = GrowingEngine(_PREFIXES)
        self._mask = grammar_mask(session.tokenizer, sampling)
        self._rows = max(batch_size, sampling.num_beams)
        self.ahead = self._rows + DecoderEngine.ahead
        self.begin()

    def begin(self) -> None:
        """Resets the length of rows and drops cached prefixes."""
        self._length = length_for(self._session, 0, _LENGTH)
        if self._engines.engine is not None:
            self._engines.engine.forget()

    def add(self, outcome: RowOutcome) -> int | None:
        """Submits the row, unless it needs a longer engine while others run."""
        # name and pack stay consistent, whatever is loaded meanwhile
        session = self._session.freeze()
        task = self._session.task
        assert task.prompt is not None
        (name,) = session.names([outcome.row["adapter"]], 1)
        session.pin([name])
        named = None if name is None else session.pack(name)
        outcome.pack = None if named is None else named.id
        pack = None if session.bundle.mode == "folded" else named
        ids = prompt_ids(session, task.prompt(outcome.row), raw=self._raw)
        length = length_for(session, positions_of(session, ids, pack), self._sampling.max_new_tokens)
        if length > self._length:
            if self._engines.engine is not None and self._engines.engine.busy:
                return None
            self._length = length
        self.engine = engine = self._engines.of(self._session, self._rows, self._length)
        request = engine.row(
            ids, pack, self._sampling, None, outcome.number - 1, self._mask and self._mask.copy()
        )
        outcome.request, outcome.prompt_tokens = request, len(ids)
        engine.submit(request)
        return request.number

    def take(self, outcome: RowOutcome, event: Event) -> None:
        """Stores the answer of the row."""
        request, name = outcome.request, outcome.row["adapter"]
        assert request is not None
        completion = Generation.of(request.answer, name, outcome.prompt_tokens)
        outcome.result = {
            **outcome.row,
            "adapter": name,
            "pack": outcome.pack,
            **describe(completion, self._session),
        }
        outcome.tokens = len(completion.ids)
        outcome.request = None


def _in_order(executor: _Executor, rows: Iterator[RowOutcome]) -> Iterator[RowOutcome]:
    """Yields the rows in order, each as soon as it and all earlier ones have ended. It reads no more rows
    than it can begin.
    """
    executor.begin()
    queue = deque[RowOutcome]()
    running = dict[int, RowOutcome]()
    held = list[RowOutcome]()
    more = True
    while more or queue:
        while more and len(running) < executor.ahead:
            row = held.pop() if held else next(rows, None)
            if row is None:
                more = False
                break
            if row.error is None:
                try:
                    with among([row.number]), row_errors(1):
                        request = executor.add(row)
                except AdapterpackError as error:
                    row.error = error
                else:
                    if request is None:
                        # The row needs a larger engine, which can replace this one only when its rows have
                        # ended.
                        held.append(row)
                        break
                    running[request] = row
            queue.append(row)
        for event in executor.engine.step() if running else ():
            if event.finish_reason is None:
                continue
            outcome = running.pop(event.request)
            if event.error is None:
                executor.take(outcome, event)
                continue
            try:
                with row_errors(outcome.number):
                    raise event.error
            except AdapterpackError as error:
                outcome.error = error
        while queue and (queue[0].result is not None or queue[0].error is not None):
            yield queue.popleft()
