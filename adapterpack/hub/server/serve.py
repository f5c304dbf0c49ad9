"""Runs the hub as a process, for a folder and a file of tokens."""

from __future__ import annotations

import signal
from pathlib import Path

from ...errors import storage_errors
from ...extras import needed_by
from ...io import Say
from ...paths import StrPath
from ...signals import Ended
from .access import Access

LOOPBACK = "127.0.0.1"
_MAX_HEAD = 32 << 10
"""The most bytes of a request's head."""
_BACKLOG = 100
"""The most connections that wait to be accepted; fewer than the process may have open files."""


def serve(
    folder: StrPath,
    *,
    host: str = LOOPBACK,
    port: int = 8765,
    tokens: StrPath | None = None,
    ready: Say | None = None,
) -> None:
    """Serves a hub from a folder, until it is interrupted.

    ``tokens`` is a file of lines ``NAME read|write TOKEN``; without it everyone may read and no one may
    write. ``port`` 0 picks a free one. ``ready`` is called with the address once the hub takes requests.
    SIGTERM ends it cleanly. Put a TLS proxy in front of it if other machines can reach it.

    Raises:
        ConfigError: the file of tokens is malformed, or other users may read it.
        StorageError: the folder or the address cannot be used.
        MissingExtra: the extra ``serve`` is not installed.
    """
    with needed_by("serving a hub"):
        import uvicorn  # noqa: PLC0415 - an extra

        from ...http import Protocol, listening  # noqa: PLC0415 - an extra, too
        from .app import build  # noqa: PLC0415
    access = Access() if tokens is None else Access.from_file(Path(tokens))
    app = build(folder, access)
    with storage_errors(f"{host}:{port}"), listening(host, port) as one:
        address = f"http://{host}:{one.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=True,
            backlog=_BACKLOG,
            h11_max_incomplete_event_size=_MAX_HEAD,
        )
        if ready is not None:
            ready(address)
        try:
            uvicorn.Server(config).run(sockets=[one])
        except Ended as ended:  # uvicorn re-raises the signal after the last response
            if ended.number != signal.SIGTERM:
                raise
