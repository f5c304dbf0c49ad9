"""Runs one attack in a process of its own and holds the outcome to what is promised of every one.

Promised: within :data:`SECONDS` and :data:`MEMORY` it ends in a named error, or does what it was asked to do;
nothing of the attacker's runs, nothing is written outside the working folder, no secret and no control
character is printed. The clock gives it longer only as far as it computes: on a busy machine it waits for the
processor.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from forked import FORKED

SECONDS = 60.0
"""What an attack may take: of the processor, with the processes that it started, and of the clock where it
does not compute.
"""
WAITING = 10.0
"""How long, at most, it waits for a second of the processor."""
MEMORY = 500 << 20
"""What the process may grow by, in bytes."""
SECRET = "hf_never_shown_to_anyone"
"""The token of the user, in the environment of every attack."""
BUG = "bug in adapterpack"
_ROOM = 6 << 30
"""Bytes of address space beyond which a runaway attack fails instead of taking the machine down."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


@dataclass(frozen=True)
class Outcome:
    """How an attack ended: its exit code (None: it was still running; negative: a signal ended it), what it
    printed, and what it took: ``seconds`` of the clock, of which it ``computed`` some, and bytes of memory.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    computed: float
    grown: int
    touched: bool

    def held(self) -> Self:
        """Checks what is promised of every attack."""
        took = (
            f"exit {self.code} after {self.seconds:.1f} s, {self.computed:.1f} s of the processor, "
            f"{self.grown >> 20} MB"
        )
        shown = f"\n--- {took}\n{self.out[-1500:]}\n{self.err[-3000:]}"
        assert self.code is not None, f"it was still running{shown}"
        assert self.code >= 0, f"the process died{shown}"
        assert self.computed <= SECONDS and self.seconds <= SECONDS + WAITING * self.computed, (
            f"it took too long{shown}"
        )
        assert self.grown <= MEMORY, f"it took too much memory{shown}"
        assert BUG not in self.err and "Traceback" not in self.err, f"an error without a name{shown}"
        assert not (signs := _CONTROL.findall(self.out + self.err)), (
            f"control characters reach the terminal: {signs}{shown}"
        )
        assert SECRET not in self.out + self.err, f"a secret is printed{shown}"
        assert not self.touched, f"something outside the working folder was written{shown}"
        return self

    def refused(self, *words: str, absent: Path | None = None) -> Self:
        """Checks that it ended in a named error whose text has these words, and left nothing at
        ``absent``.
        """
        self.held()
        said = self.out + self.err  # findings of the validator are printed as results
        assert self.code in (1, 4) and "error" in said, (
            f"it was not refused: exit {self.code}\n{said[-3000:]}"
        )
        for word in words:
            assert word.lower() in said.lower(), f"{word!r} is not in\n{said[-3000:]}"
        assert absent is None or not os.path.lexists(absent), f"{absent} was left behind"
        return self

    def harmless(self, *words: str) -> Self:
        """Checks that it was done, or done as far as it could be checked, and what it printed."""
        self.held()
        assert self.code in (0, 3), f"exit {self.code}\n{self.out[-1500:]}\n{self.err[-1500:]}"
        for word in words:
            assert word.lower() in (self.out + self.err).lower(), (
                f"{word!r} is not in\n{(self.out + self.err)[-1500:]}"
            )
        return self


class Attacks:
    """Where attacks of one test run: ``work`` is the folder that they may write to; ``outside`` holds what
    none may read or change.
    """

    def __init__(self, folder: Path) -> None:
        self.work, self.outside, self._said = folder / "work", folder / "outside", folder / "said"
        for place in (self.work, self.outside, self._said):
            place.mkdir()
        (self.outside / "secret.txt").write_text(SECRET)

    def command(self, *arguments: object, stdin: str = "") -> Outcome:
        """The command line with these arguments, as a user would run it in ``work``."""
        return self.call(_command, [str(argument) for argument in arguments], stdin)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Outcome:
        """A function of a test module, with arguments that can be pickled; errors of adapterpack end it as
        they end a command.
        """
        before, start = _listing(self.outside), time.monotonic()
        process = FORKED.Process(target=_child, args=(self.work, self._said, function, arguments))
        process.start()
        process.join((1 + WAITING) * SECONDS + 5)
        if process.is_alive():
            process.kill()
            process.join()
            code = None
        else:
            code = process.exitcode
        seconds, computed, grown = time.monotonic() - start, 0.0, 0
        with contextlib.suppress(FileNotFoundError, ValueError):
            grown = int((self._said / "grown").read_text())
            seconds, computed = map(float, (self._said / "seconds").read_text().split())
        said = [
            (self._said / name).read_text(errors="replace") if (self._said / name).is_file() else ""
            for name in ("out", "err")
        ]
        shutil.rmtree(self._said)
        self._said.mkdir()
        return Outcome(code, said[0], said[1], seconds, computed, grown, _listing(self.outside) != before)


def _listing(folder: Path) -> list[tuple[str, int, int, bytes]]:
    """Everything in a folder: names, modes, times of change and bytes."""
    status = [(path, path.lstat()) for path in sorted(folder.rglob("*"))]
    return [
        (str(path), info.st_mode, info.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path, info in status
    ]


def _child(work: Path, said: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(work)
    os.environ |= {
        "HF_TOKEN": SECRET,
        "HOME": str(work),
        "XDG_CACHE_HOME": str(work / ".cache"),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    held = _memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _ROOM,) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    start = time.monotonic()
    code = 1
    try:
        code = _reported(function, arguments)
    finally:
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        children = spent[1].ru_maxrss << 10
        (said / "seconds").write_text(
            f"{time.monotonic() - start} {sum(one.ru_utime + one.ru_stime for one in spent)}"
        )
        (said / "grown").write_text(str(max(_memory("VmHWM") - held, children - held)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reported(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    import traceback

    from adapterpack.errors import AdapterpackError

    try:
        result = function(*arguments)
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except AdapterpackError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _memory(field: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _command(arguments: list[str], stdin: str) -> int:
    import io

    from adapterpack.cli.main import main

    sys.stdin = io.TextIOWrapper(
        io.BytesIO(stdin.encode("utf-8", "surrogatepass")), encoding="utf-8", errors="surrogateescape"
    )
    main(arguments, prog_name="adapterpack")
    return 0
