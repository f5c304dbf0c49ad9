"""The limits of a sandbox, what a process has used of them, and the messages between its two sides: a kind
(one byte), a length, and the data.
"""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

HEAD = struct.Struct(">cQ")
DONE = b"+"
FAILED = b"-"
LIMIT = b"x"
MEMORY = b"m"
LATE = b"t"
LARGE = b"l"
ENDED = b"e"
UNSENT = b"u"
"""The kinds of messages. The child sends the first four: a result (also: ready); an exception, with its text;
a limit of Python's or of the result's size, with its text; out of memory. The parent concludes the others: no
answer in time; an announced result above the limit; the process ended; it had ended before it read the call.
"""


OVER_MEMORY = 77
"""The exit status of a process that ends itself for lack of memory, on systems that do not enforce the limit.
"""


class SandboxLimits(NamedTuple):
    """The limits of one call: ``memory`` in bytes above those of the process at its start, ``seconds`` of CPU
    time, and ``answer``, the most bytes of a result.
    """

    memory: int = 256 << 20
    seconds: float = 5.0
    answer: int = 64 << 20

    @property
    def deadline(self) -> float:
        """The most seconds of wall-clock time, which allows for waiting and for busy machines."""
        return 4 * self.seconds + 10


def peak_memory() -> int | None:
    """Returns the most bytes that this process has had in memory; None where the system does not say."""
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
