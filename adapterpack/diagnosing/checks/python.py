"""Which Python and which system this is."""

from __future__ import annotations

import platform
import sys

from ...version import VERSION
from ..check import CHECKS, Check, Looked


def _look() -> Looked:
    libc = " ".join(filter(None, platform.libc_ver()))
    return Looked(
        {
            "adapterpack": VERSION,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "at": sys.executable,
            "environment": sys.prefix
            if sys.prefix != sys.base_prefix
            else "none: packages go into this Python itself",
            "system": platform.platform() + (f", {libc}" if libc else ""),
            "machine": platform.machine(),
        }
    )


CHECKS.register(Check(name="python", title="Python and system", rank=10, look=_look))
