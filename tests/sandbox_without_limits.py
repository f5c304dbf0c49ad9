"""What a sandbox imports first makes it one on a system that holds to no limit of memory, as macOS is."""

from __future__ import annotations

from pathlib import Path

from test_sandbox import misbehave

from adapterpack.sandbox import child

child._STATM = Path("/absent")

__all__ = ["misbehave"]
