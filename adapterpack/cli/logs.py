"""Logs what commands do to stderr: steps, notes and warnings, as text for people or as JSON for log
collectors.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from ..errors import ConfigError, require_among
from ..readable import size
from ..sandbox.limits import peak_memory
from .output import escape_line

VARIABLE = "ADAPTERPACK_LOG"
FORMATS = ("text", "json")
QUIET, VERBOSE = "--quiet", "--verbose"
_LOG = logging.getLogger("adapterpack.cli")


_CHATTER = ("torchao", "torch.utils._pytree", "bitsandbytes", "sigstore", "onnx_ir")
"""Loggers of other libraries that warn of what they can do without, packages or the network, or of names in a
stranger's graph, as they are.
"""
_flags: Mapping[str, Any] = {}
"""The flags of the running command, for all of its threads."""


def level() -> int:
    """Returns the lowest level to show: ``--quiet`` keeps warnings and errors, ``--verbose`` adds time and
    memory.
    """
    return logging.WARNING if _flags.get(QUIET) else logging.DEBUG if _flags.get(VERBOSE) else logging.INFO


def is_quiet() -> bool:
    """Whether to hide steps and progress bars."""
    return level() > logging.INFO


def is_animated() -> bool:
    """Whether stderr is a terminal on which progress bars can move."""
    return sys.stderr.isatty() and os.environ.get(VARIABLE) != "json"


def log_message(text: str, severity: int = logging.INFO) -> None:
    """Logs one message, unless it is below the level."""
    if severity >= level():
        _LOG.log(severity, "%s", text)


class _Text(logging.Formatter):
    """Formats a record as one line, escaped so that names in it cannot control a terminal; with ``--verbose``
    adds time and origin.
    """

    def format(self, record: logging.LogRecord) -> str:
        said = escape_line(super().format(record))
        return (
            f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower()} {record.name}: {said}"
            if level() < logging.INFO
            else said
        )


class _Json(logging.Formatter):
    """Formats a record as one JSON object on one line, ASCII only, with times in UTC to the millisecond."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Stderr(logging.StreamHandler[Any]):
    """Writes to whatever stderr is at the time of the message."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
def log_to_stderr(flags: Mapping[str, Any]) -> Iterator[None]:
    """Sends the messages of adapterpack in the block to stderr; as JSON also those of other libraries, and
    Python's warnings.

    ``flags`` is filled with the command's flags as soon as click has parsed them.

    Raises:
        ConfigError: ``ADAPTERPACK_LOG`` names an unknown format.
    """
    global _flags  # noqa: PLW0603 - threads have no context of click, and a process runs one command
    form = os.environ.get(VARIABLE) or FORMATS[0]
    require_among("unknown format of logs", form, FORMATS, ConfigError, VARIABLE)
    programs = form == "json"
    handler = _Stderr()
    handler.setFormatter(_Json() if programs else _Text())
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    log = logging.getLogger(None if programs else "adapterpack")
    before = _LOG.level
    log.addHandler(handler)
    _LOG.setLevel(logging.DEBUG)  # "tell" has asked for the level
    logging.captureWarnings(programs)
    _flags = flags
    started = time.monotonic()
    try:
        yield
    finally:
        log_message(f"took {time.monotonic() - started:.1f} s{_most_memory()}", logging.DEBUG)
        logging.captureWarnings(False)
        log.removeHandler(handler)
        _LOG.setLevel(before)
        _flags = {}


def log_failure(sentence: str) -> None:
    """Logs the sentence of an error that ends the command."""
    if os.environ.get(VARIABLE) == "json":
        _LOG.error("%s", sentence)
    else:
        click.echo(click.style("error:", fg="red", bold=True) + f" {sentence}", err=True)


def _most_memory() -> str:
    most = peak_memory()
    return "" if most is None else f", at most {size(most)} of memory"
