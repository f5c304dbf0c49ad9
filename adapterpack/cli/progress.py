"""Shows progress on stderr: a bar on a terminal, plain lines elsewhere; stdout is for results only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..io import Progress, Say
from ..readable import size
from .logs import is_animated, is_quiet, level, log_message
from .output import escape_line

_SECONDS_BETWEEN_LINES = 2.0
_SECONDS_BETWEEN_ROWS = 10.0


@contextlib.contextmanager
def divert_stdout() -> Iterator[None]:
    """Sends what other libraries print to stderr, and logs adapterpack's messages, inside the block."""
    log = logging.getLogger("adapterpack")
    before = log.level
    log.setLevel(level())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def show_steps() -> Iterator[Say]:
    """Yields a function that shows which step begins."""
    # one thing that moves is enough, and the libraries are not imported yet
    os.environ.setdefault("TQDM_DISABLE", "1")
    with divert_stdout():
        if is_quiet() or not is_animated():
            yield log_message
            return
        from rich.console import Console  # noqa: PLC0415 - only a terminal pays for it
        from rich.text import Text  # noqa: PLC0415

        with Console(stderr=True).status(Text("start")) as status:
            yield lambda text: status.update(Text(escape_line(text)))


@contextlib.contextmanager
def show_bytes(label: str) -> Iterator[Progress]:
    """Yields a function that shows (bytes done, bytes in all)."""
    label = escape_line(label)
    with divert_stdout():
        if is_quiet() or not is_animated():
            yield _tell_bytes(label)
            return
        with _show_bar(label, lambda p: (p.DownloadColumn(), p.TransferSpeedColumn())) as update:
            yield lambda done, total: update(completed=done, total=total)


@contextlib.contextmanager
def show_training(label: str) -> Iterator[Callable[[Any], None] | None]:
    """Yields a function that shows the progress of a training on a terminal; None elsewhere, where the log
    gets a line every few steps.
    """
    # one thing that moves is enough, and the libraries are not imported yet
    os.environ.setdefault("TQDM_DISABLE", "1")
    with divert_stdout():
        if is_quiet() or not is_animated():
            yield None
            return
        with _show_bars(lambda p: (p.MofNCompleteColumn(), _text_column(p))) as add:
            bars = {"": add(label, None, "loss -, - tokens/s")}

            def show(step: Any) -> None:
                if step.name not in bars:
                    bars[""](visible=False)  # with several adapters each has its own bar
                    bars[step.name] = add(escape_line(step.name), None, "")
                bars[step.name](
                    completed=step.done,
                    total=step.total,
                    text=f"loss {step.loss:.4g}, {step.speed:,.0f} tokens/s",
                )

            yield show


def _tell_bytes(label: str) -> Progress:
    shown = started = time.monotonic()
    first = None

    def show(done: int, total: int) -> None:
        nonlocal shown, first
        now = time.monotonic()
        first = done if first is None else first  # what an earlier try did is no speed of this one
        if done == total or now - shown >= _SECONDS_BETWEEN_LINES:
            shown = now
            speed = (done - first) / max(now - started, 1e-9)
            left = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
            log_message(f"{label}: {size(done)} of {size(total)}, {size(speed)}/s{left}")

    return show


@contextlib.contextmanager
def show_rows(label: str, total: int | None) -> Iterator[Callable[[int, int, int], None]]:
    """Yields a function that shows (rows answered, their tokens, bytes of input done); the input has
    ``total`` bytes, if known.
    """
    label = escape_line(label)
    with divert_stdout():
        if is_quiet() or not is_animated():
            yield _tell_rows(label, total)
            return
        with _show_bar(label, lambda p: (_text_column(p),), total) as update:
            speed = _Speed()
            yield lambda rows, tokens, done: update(completed=done, text=speed(rows, tokens))


@contextlib.contextmanager
def _show_bar(
    label: str, columns: Callable[[Any], tuple[Any, ...]], total: int | None = None
) -> Iterator[Callable[..., None]]:
    """Yields a function that updates a bar on the terminal with these ``rich.progress`` columns besides its
    label and the time left.
    """
    with _show_bars(columns) as add:
        yield add(label, total, "")


@contextlib.contextmanager
def _show_bars(
    columns: Callable[[Any], tuple[Any, ...]],
) -> Iterator[Callable[[str, int | None, str], Callable[..., None]]]:
    """Yields a function that adds a bar with a label, a total if known, and a text, and returns the function
    that updates it.
    """
    from rich import progress as p  # noqa: PLC0415 - only a terminal pays for it
    from rich.console import Console  # noqa: PLC0415

    shown = (
        p.TextColumn("{task.description}", markup=False),
        p.BarColumn(),
        *columns(p),
        p.TimeRemainingColumn(),
    )
    with p.Progress(*shown, console=Console(stderr=True), transient=True) as bar:
        yield lambda label, total, text: partial(bar.update, bar.add_task(label, total=total, text=text))


def _text_column(progress: Any) -> Any:
    """Returns the column of a bar that shows its ``text``."""
    return progress.TextColumn("{task.fields[text]}", markup=False)


class _Speed:
    """Formats the number of rows and the tokens a second."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, rows: int, tokens: int) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{rows:,} rows" + (f", {tokens / seconds:,.0f} tokens/s" if tokens else "")


def _tell_rows(label: str, total: int | None) -> Callable[[int, int, int], None]:
    shown = started = time.monotonic()
    first = None
    speed = _Speed()

    def show(rows: int, tokens: int, done: int) -> None:
        nonlocal shown, first
        now = time.monotonic()
        first = done if first is None else first  # what an earlier run did is no speed of this one
        if now - shown < _SECONDS_BETWEEN_ROWS:
            return
        shown = now
        left = ""
        if total and done > first:
            left = f", {done / total:.0%}, {(total - done) * (now - started) / (done - first):,.0f} s left"
        log_message(f"{label}: {speed(rows, tokens)}{left}")

    return show
