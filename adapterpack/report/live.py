"""The page of a training, while it runs and when it is done; served to this machine alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any

from .training import live_report, train_report

if TYPE_CHECKING:
    from ..training.loop.steps import Step

_RENEWAL = 2
"""Seconds after which a browser asks for the page again."""


class TrainingPage:
    """The page of a training: how far it is, or what it led to once there are ``packs``, which are as
    ``adapterpack train --json`` gives them. ``name`` is that of an adapter that is trained alone.
    """

    def __init__(self, name: str) -> None:
        self.packs: Sequence[Mapping[str, Any]] = ()
        self.progress: Callable[[Step], None] | None = None
        self._name = name
        self._steps = dict[str, "Step"]()
        self._losses: dict[str, dict[int, float]] = {name: {}}

    def __call__(self, step: Step) -> None:
        """Notes a step, and passes it on to ``progress``."""
        name = step.name or self._name
        self._losses.setdefault(name, {})[step.done] = step.loss
        self._steps[name] = step
        if self.progress is not None:
            self.progress(step)

    def write(self) -> str:
        """Renders the page."""
        # Copied at once, because another thread adds to them.
        losses = {name: list(steps.items()) for name, steps in list(self._losses.items())}
        return train_report(self.packs, losses) if self.packs else live_report(dict(self._steps), losses)


@contextmanager
def serve_page(write: Callable[[], str]) -> Iterator[str]:
    """Yields the address of a page that ``write`` renders for each request, and that renews itself in a
    browser.

    An open page gets the last state when the block ends, and no longer renews itself.

    Example:
        >>> with serve_page(lambda: "<h1>Step 1</h1>") as address:
        ...     address.startswith("http://127.0.0.1:")
        True
    """
    asked, ended = 0.0, False

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def handle(self) -> None:
            with suppress(ConnectionError):  # a page that is closed meanwhile
                super().handle()

        def do_GET(self) -> None:
            nonlocal asked
            # A page of another site that resolves its own name to this machine may not read this one. The
            # port is another one through a tunnel.
            if self.headers.get("Host", "").partition(":")[0] not in {"127.0.0.1", "localhost"}:
                self.send_error(404)
                return
            asked = time.monotonic()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            if not ended:
                self.send_header("Refresh", str(_RENEWAL))
            self.end_headers()
            self.wfile.write(write().encode())

        def log_message(self, *_: Any) -> None:
            """Logs nothing: the log is the training's."""

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            ended = True
            if time.monotonic() - asked < 2 * _RENEWAL:
                time.sleep(1.5 * _RENEWAL)
            server.shutdown()
