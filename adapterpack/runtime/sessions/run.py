"""Runs rows through a bundle, each with its own adapter, and yields a result for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from ...errors import AdapterpackError, ConfigError
from ...tasks.data.rows import Row
from ..providers.device import Device
from .row_runner import RowRunner
from .session import Session


def row_runner(
    bundle: str | os.PathLike[str],
    *,
    adapters: Sequence[str] = (),
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
    if raw and (session.task.prompt is None or not session.task.generates):
        raise ConfigError(
            "this bundle does not read prompts in a chat template",
            where=session.bundle.task,
            found="raw",
            remedy="leave --raw (raw=True) out: its texts are read as they are",
        )
    if sampling and not session.task.generates:
        raise ConfigError(
            "this bundle does not generate text, so it takes no sampling parameters",
            found=", ".join(sampling),
            where=session.bundle.task,
        )
    return RowRunner(session, adapters, batch_size, sampling, raw)


def run(
    bundle: str | os.PathLike[str],
    rows: Iterable[Row],
    *,
    adapters: Sequence[str] = (),
    provider: str | Device | None = None,
    batch_size: int = 16,
    raw: bool = False,
    **sampling: Any,
) -> Iterator[dict[str, Any]]:
    """Runs rows through a bundle, and gives a result for each, in order.

    A row is a mapping with ``text``, ``prompt`` or ``messages``, with ``question`` and ``context``, with
    ``image`` (the path of a PNG, a JPEG or a ``.npy`` file, ``data:image/...``, the bytes of an encoded
    image, or an array) or ``audio`` (the path of a file, see :mod:`~adapterpack.runtime.media.inputs`), and
    an optional ``adapter`` (null: the base). A row that names no adapter runs with each of ``adapters`` in
    turn, or without these with the base, or with the adapter that is folded into the bundle. A language model
    with a chat template reads a text as a user's message, or with ``raw`` without the template.

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
