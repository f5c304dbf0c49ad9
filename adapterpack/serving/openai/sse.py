"""Server-sent events as OpenAI's clients expect them, byte for byte."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
ALIVE = b": still working\n\n"
"""A comment that keeps proxies from closing idle connections."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
TYPE = "text/event-stream"


def event(value: Any) -> bytes:
    """Encodes one event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
