"""Runs rows through a bundle in batches, each row with its own adapter, and yields a result for each."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ..errors import AdapterpackError, ConfigError
from ..tasks.one_pass import OnePass
from ..tasks.rows import COLUMNS, Row, RowError, among, row_errors
from ..tasks.task import Answer
from .engine.encoder_engine import EncoderEngine
from .engine.requests import Event
from .providers.device import Device
from .session import Session

_AHEAD = 8
"""How many batches of rows are read ahead, where rows of about one length run together."""


def run(
    bundle: str | os.PathLike[str],
    rows: Iterable[Row],
    *,
    adapters: Sequence[str] = (),
    provider: str | Device | None = None,
    batch_size: int = 16,
    **sampling: Any,
) -> Iterator[dict[str, Any]]:
    """Runs rows through a bundle and yields one result for each, in order.

    A row is a mapping with ``text``, ``prompt`` or ``messages``, with ``question`` and ``context``, with ``image`` (the path of a PNG, a
    JPEG or a ``.npy`` file, ``data:image/...``, the bytes of a picture, or an array) or ``audio`` (the path of a file, see
    :mod:`~adapterpack.runtime.media.inputs`), and an optional ``adapter`` (null: the base). Rows that name none are run with each of
    ``adapters`` in turn; if there are none, with the base, or with what is folded into the bundle.

    Raises:
        ConfigError: a row of no known form, or one that cannot be run, with its number (:class:`~adapterpack.tasks.rows.RowError`); or
            sampling parameters that do not exist or that this task does not have.
        UnknownAdapter: a name that the bundle does not hold; found before the row is run.

    Example:
        >>> list(run("bundle", [{"text": "hi", "adapter": "tickets"}]))  # doctest: +SKIP
        [{'text': 'hi', 'adapter': 'tickets', 'pack': 'sha256:...', 'label': 'product', 'scores': {...}}]
    """
    if batch_size < 1:
        raise ConfigError("batch_size must be at least 1", found=batch_size)
    session = Session(bundle, provider)
    if sampling and not session.task.generates:
        raise ConfigError("this bundle does not generate text, so it takes no sampling parameters", found=", ".join(sampling),
                          where=session.bundle.task)
    for name in adapters:
        session.require_adapter(name)
    numbered = _expanded(rows, adapters or [session.default], {**COLUMNS, **session.task.columns})
    if isinstance(session.task.answer, OnePass):
        yield from _run_one_by_one(EncoderEngine(session, max_rows=batch_size), numbered, 1 + _AHEAD * (batch_size - 1))
        return
    while batch := list(islice(numbered, batch_size)):
        yield from _run_batch(session, session.task.answer, batch, sampling)


def _expanded(rows: Iterable[Row], adapters: Sequence[str | None], columns: Mapping[str, Any]) -> Iterator[tuple[int, Row]]:
    """The rows with their numbers, each with an adapter; every row has one of the ``columns``."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise RowError("a row is a mapping", row=number, expected=", ".join(columns), found=type(row).__name__)
        if not any(isinstance(row.get(column), kind) for column, kind in columns.items()):
            raise RowError(f"a row needs {', '.join((*columns,)[:-1])} or {[*columns][-1]}", row=number,
                           found=", ".join(map(str, row)) or "an empty row")
        if "adapter" in row:
            yield number, row
        else:
            yield from ((number, {**row, "adapter": name}) for name in adapters)


def _run_batch(session: Session, answer: Answer, numbered: list[tuple[int, Row]], sampling: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    rows, session = [row for _, row in numbered], session.frozen()
    names = session.names([row["adapter"] for row in rows], len(rows))
    with among([number for number, _ in numbered]):
        results = answer(session, rows, names, sampling)
    for row, name, result in zip(rows, names, results, strict=True):
        yield {**row, "adapter": name, "pack": None if name is None else session.packs[name].id, **result}


def _run_one_by_one(engine: EncoderEngine, numbered: Iterator[tuple[int, Row]], ahead: int) -> Iterator[dict[str, Any]]:
    """The results of rows of which up to ``ahead`` are read before the first of them is answered, so that rows of about one length can
    run together. What stops the reading of rows is raised behind the results of those before.
    """
    requests, ended, failure = deque[tuple[int, int, Row]](), dict[int, Event](), None
    while True:
        while failure is None and len(requests) < ahead:
            try:
                number, row = next(numbered)
                requests.append((_request(engine, number, row), number, row))
            except (StopIteration, AdapterpackError) as reason:
                failure = reason
        if not requests:
            break
        ended |= {event.request: event for event in engine.step()}
        while requests and requests[0][0] in ended:
            request, number, row = requests.popleft()
            event = ended.pop(request)
            if event.error is not None:
                with row_errors(number):
                    raise event.error
            yield {**row, "pack": event.adapter, **(event.result or {})}
    if isinstance(failure, AdapterpackError):
        raise failure


def _request(engine: EncoderEngine, number: int, row: Row) -> int:
    (name,) = engine.bundle.names([row["adapter"]], 1)
    engine.bundle.pin([name])  # a row that names the base has it, or an error: a request without an adapter has what is folded in
    with among([number]), row_errors(1):
        return engine.add(row, name)
