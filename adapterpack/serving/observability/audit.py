"""One line a request, as JSON: who asked, what answered, how many tokens and how long it took. Never what was
said.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ...errors import storage_errors

_LOG = logging.getLogger(__name__)


@dataclass
class Record:
    """What becomes known of a request on its way. Times are of the monotonic clock.

    ``outcome`` is the reason why its answers ended, or the code of its error, or ``disconnected``; ``trace``
    are its headers that say which trace it belongs to.
    """

    id: str
    route: str
    started: float = field(default_factory=time.monotonic)
    key: str | None = None
    adapter: str | None = None
    digest: str | None = None
    mixed: bool = False
    rows: int = 0
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    status: int = 0
    outcome: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)

    def answers(self, adapter: str | None, digest: str, mixed: bool) -> None:
        """Notes what answers; ``mixed``: several adapters, as the request has put them together."""
        self.adapter, self.digest, self.mixed = adapter, digest, mixed


class AuditLog:
    """Writes records to a file, behind those that are there; ``-`` is standard error, None nowhere. Where a
    file takes none any more, as on a full disk, requests are answered all the same: a message says so, and
    another how many are missing once it takes them again.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._file: Any = None
        self._name, self._missing, self._cut = "standard error" if path == "-" else path, 0, False
        if path == "-":
            self._file = sys.stderr.buffer
        elif path is not None:
            with storage_errors(path):
                # it is open as long as the server runs
                self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115

    def write(self, record: Record) -> None:
        """Adds a line."""
        if self._file is None:
            return
        now = time.monotonic()
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": record.id,
            "route": record.route,
            "key": record.key,
            "adapter": record.adapter,
            "digest": record.digest,
            "rows": record.rows,
            "stream": record.stream,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "first_token_seconds": round(record.first - record.started, 6) if record.first else None,
            "seconds": round(now - record.started, 6),
            "status": record.status,
            "outcome": record.outcome,
        }
        try:
            self._put(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            if not self._missing:
                _LOG.error(
                    "requests are answered, but no longer audited, until %s can be written again: %s",
                    self._name,
                    error.strerror or error,
                )
            self._missing += 1
        else:
            if self._missing:
                _LOG.warning("%s is written again; it lacks %d lines", self._name, self._missing)
            self._missing = 0

    def _put(self, line: bytes) -> None:
        """Writes a line; one that the disk took a part of is ended before the next."""
        rest = memoryview(b"\n" + line if self._cut else line)
        while rest:
            rest = rest[self._file.write(rest) :]
            self._cut = bool(rest)
        self._file.flush()
