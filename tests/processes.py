"""Processes that a test starts end with it, also where it fails: it would wait for them for ever."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def child(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command's process, with ``options`` of ``subprocess.Popen``; it is killed at the end unless it has ended."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()
