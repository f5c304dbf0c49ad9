"""The audit log: one JSON line for each request, with its key, adapter, token counts and times. Never
contains prompts or answers.
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
    """Data about a request, collected while it is handled. Times are those of the monotonic clock.

    ``outcome`` is why its answers ended, the code of its error, or ``disconnected``; ``trace`` holds the
    headers that name its trace. ``ignored`` are notes on fields of its body that this server does not have.
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
    ignored: list[str] = field(default_factory=list)


class AuditLog:
    """Appends records to a file; ``-`` is standard error, and None writes nothing.

    If the file cannot be written, as on a full disk, requests are still answered. The log says so once, and
    later how many lines are missing.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._file: Any = None
        self._name = "standard error" if path == "-" else path
        self._missing = 0
        self._cut = False
        if path == "-":
            self._file = sys.stderr.buffer
        elif path is not None:
            with storage_errors(path):
                # stays open while the server runs
                self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115

    def write(self, record: Record) -> None:
        """Appends a line for a record."""
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
        """Writes a line. If only a part of a line was written before, ends that one first."""
        rest = memoryview(b"\n" + line if self._cut else line)
        while rest:
            rest = rest[self._file.write(rest) :]
            self._cut = bool(rest)
        self._file.flush()
