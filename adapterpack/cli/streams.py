"""The three streams of a process: there in any case, and not fatal where nothing can be written to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..errors import storage_errors


def open_missing() -> None:
    """Opens those that the caller has closed, on nothing: else the next file that is opened would take their
    place, and be printed into.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="replace"))


@contextmanager
def printed() -> Iterator[None]:
    """Errors of printing inside name standard output; what is printed after one goes nowhere. A reader that
    went away is none.

    Raises:
        StorageError: it takes nothing, as where it is a file on a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        with suppress(OSError, ValueError):  # no file at all, as in tests
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # what waits in its buffer goes there too
            os.close(nowhere)
        with storage_errors("standard output"):
            raise
