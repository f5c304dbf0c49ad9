"""The limits of work in a sandbox, and the messages between its two sides: a byte that says what it is, a
length, and the bytes.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEAD = struct.Struct(">cQ")
DONE, FAILED, LIMIT, MEMORY, LATE, LARGE, ENDED, UNSENT = b"+", b"-", b"x", b"m", b"t", b"l", b"e", b"u"
"""What becomes of a call: a result; an exception, whose text is the answer; one that says that a limit was
reached; too little memory; no answer in time; a result that is larger than the caller takes; the end of the
process; its end before the call.
"""


OVER_MEMORY = 77
"""The status with which a process ends itself that took too much memory, where the system does not see to
that.
"""


class SandboxLimits(NamedTuple):
    """What one call may take. ``memory``: bytes beyond those of the process when it starts; ``seconds`` of
    processor time.
    """

    memory: int = 256 << 20
    seconds: float = 5.0
    answer: int = 64 << 20

    @property
    def deadline(self) -> float:
        """Seconds of the clock, for work that waits and for machines that are busy."""
        return 4 * self.seconds + 10
