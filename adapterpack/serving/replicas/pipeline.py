"""Runs one address before several servers as a process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...extras import needed_by
from ...http.tls import IN_THE_CLEAR, Certificate, trusting
from ..limits import Limits
from ..listen import is_loopback, port_socket

LOOPBACK = "127.0.0.1"
DRAIN_SECONDS = 60
_LOG = logging.getLogger("adapterpack.serving")


def route(replicas: Sequence[str], *, host: str = LOOPBACK, port: int = 8080, pause: float = 2.0, few: int = 8,
          tls_cert: str | os.PathLike[str] | None = None, tls_key: str | os.PathLike[str] | None = None,
          replica_ca: str | os.PathLike[str] | None = None, ready: Callable[[str], None] | None = None) -> None:
    """Routes requests to several servers of one bundle, those for the same adapter to the same server.

    ``replicas`` are addresses, ``http://HOST:PORT``. Where one cannot be reached, or takes no requests, its adapters' requests go to the
    others, and for ``pause`` seconds it is tried last. A replica that has more than ``few`` requests and a quarter more than the others
    gives on what is too much. Keys are the replicas' business: all of them know the same ones. ``tls_cert`` and ``tls_key`` are those of
    :func:`adapterpack.serve`; replicas at ``https://`` are trusted by what the system trusts, or by the certificates in ``replica_ca``.
    ``ready`` is called with the address once requests are taken. SIGTERM and Ctrl-C let answers end first.

    Raises:
        ConfigError: an address that is none, or one that is given twice; files that hold no certificate.
        StorageError: the address cannot be used, or a file cannot be read.
        MissingExtra: the extra ``serve`` is not installed.
    """
    with needed_by("serving"):
        import httpx  # noqa: PLC0415 - the help of the command must not pay for it

        from .forwarding import Forwarding  # noqa: PLC0415 - needs an extra
        from .rendezvous import Replicas  # noqa: PLC0415 - as above
    addresses = [_address(httpx.URL(one), one) for one in replicas]
    if not addresses or len(set(addresses)) < len(addresses):
        raise ConfigError("replicas are servers at different addresses", found=", ".join(addresses) or "none",
                          remedy="give the address of each once")
    limits, certificate = Limits(), Certificate.of(tls_cert, tls_key)
    trusted = True if replica_ca is None else trusting(Path(replica_ca))
    if certificate is None and not is_loopback(host):
        _LOG.warning(IN_THE_CLEAR)
    with port_socket(host, port, "http" if certificate is None else "https") as (listening, address):
        async def serve() -> bool:
            timeout = httpx.Timeout(connect=2.0, read=limits.request_seconds + 30, write=30.0, pool=None)
            bounds = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.0)
            async with httpx.AsyncClient(timeout=timeout, limits=bounds, verify=trusted, trust_env=False, follow_redirects=False) as client:
                app = Forwarding(Replicas(addresses, pause, few), client, limits.body_bytes, limits.body_seconds)
                server = _server(app, limits, certificate, lambda: None if ready is None else ready(address))
                await server.serve(sockets=[listening])
                return bool(server.interrupted)

        if asyncio.run(serve()):
            raise KeyboardInterrupt


def _address(url: Any, given: str) -> str:
    if url.scheme not in ("http", "https") or not url.host or url.path not in ("", "/") or url.query:
        raise ConfigError("this is no address of a server", found=given, expected="http://HOST:PORT")
    return str(url).rstrip("/")


def _server(app: Any, limits: Limits, certificate: Certificate | None, ready: Callable[[], None]) -> Any:
    import uvicorn  # noqa: PLC0415 - needs an extra

    from ..process import config_of  # noqa: PLC0415 - needs an extra

    class Server(uvicorn.Server):  # type: ignore[misc]
        """uvicorn's server, which says when it begins, and ends well on SIGTERM."""

        interrupted = False
        should_exit: bool

        async def startup(self, sockets: Any = None) -> None:
            """Begins to take requests."""
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: Any) -> None:
            """The first signal lets nobody in any more; the second ends at once."""
            self.interrupted |= sig == signal.SIGINT
            self.force_exit = self.should_exit
            self.should_exit = True

    config = config_of(app, limits, None if certificate is None else certificate.context)
    config.timeout_graceful_shutdown = DRAIN_SECONDS
    return Server(config)
