"""The engine without a server, in a process of its own: the same requests as clients send, to see what HTTP
costs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from clients import Answer, Request

from adapterpack.runtime.engine.engine import DecoderEngine

_engine: DecoderEngine


class BareEngine:
    """The process of an engine."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool, self.pid = pool, pool.submit(os.getpid).result()

    def closed_loop(self, wanted: Sequence[Request], clients: int, seconds: float) -> list[Answer]:
        """As :func:`clients.closed_loop`, without clients."""
        return self._pool.submit(_closed_loop, wanted, clients, seconds).result()

    def memory_mb(self) -> int:
        """What the process has in memory."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) >> 10


@contextmanager
def opened(bundle: Path, adapters: Sequence[Path], **options: Any) -> Iterator[BareEngine]:
    """The engine of a bundle, with these packs by their names, on the CPU unless ``provider`` is among the
    options; it ends with the block.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _open, (bundle, adapters, options)) as pool:
        yield BareEngine(pool)


def _open(bundle: Path, adapters: Sequence[Path], options: dict[str, Any]) -> None:
    global _engine  # noqa: PLW0603 - the process has one
    _engine = DecoderEngine(bundle, **{"provider": "cpu", **options})
    for pack in adapters:
        _engine.adapters.load(pack)


def _closed_loop(wanted: Sequence[Request], clients: int, seconds: float) -> list[Answer]:
    start, left, answers = time.perf_counter(), iter(wanted), list[Answer]()
    running = dict[int, Request]()
    times = dict[int, list[float]]()

    def begin() -> None:
        request = next(left, None)
        if request is not None:
            sent = time.perf_counter()
            number = _engine.add(
                request.prompt,
                request.adapter,
                max_new_tokens=request.tokens,
                min_new_tokens=request.tokens,
                ignore_eos=True,
            )
            running[number], times[number] = request, [sent]

    for _ in range(clients):
        begin()
    while running:
        events = _engine.step()
        now = time.perf_counter()
        for event in events:
            times[event.request].append(now)
            if event.finish_reason is not None:
                if event.error is not None:
                    raise event.error
                sent, first, *_ = times.pop(event.request)
                answers.append(Answer(sent, first, now, running.pop(event.request).tokens))
                if now - start <= seconds:
                    begin()
    return answers
