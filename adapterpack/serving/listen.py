"""The sockets at which a server listens: a port, or a socket in the file system that only its owner may use."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError, storage_errors

UNIX = "unix:"
BACKLOG = 256
"""Connections that wait to be taken."""


@contextmanager
def port_socket(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Listens at a port, and says by which address; 0 takes a free one.

    Raises:
        StorageError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with storage_errors(f"{host}:{port}"):
        listening = socket.create_server((host, port), backlog=BACKLOG, family=family)
    shown = f"[{host}]" if ":" in host else host
    with listening:
        yield listening, f"http://{shown}:{listening.getsockname()[1]}"


@contextmanager
def address_socket(address: str) -> Iterator[tuple[socket.socket, str]]:
    """Listens at ``HOST:PORT`` or ``unix:PATH``, and says by which address.

    Raises:
        ConfigError: it is neither.
        StorageError: it cannot be used.
    """
    if address.startswith(UNIX):
        with _unix_socket(Path(address.removeprefix(UNIX))) as listening:
            yield listening, address
        return
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ConfigError("this is no address to listen at", found=address, expected="HOST:PORT or unix:PATH")
    with port_socket(host.removeprefix("[").removesuffix("]"), int(port)) as found:
        yield found


@contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        with storage_errors(path):
            _remove_dead(path)
            before = os.umask(0o177)  # from its first moment on nobody else may use it
            try:
                listening.bind(os.fspath(path))
            finally:
                os.umask(before)
            listening.listen(BACKLOG)
        try:
            yield listening
        finally:
            path.unlink(missing_ok=True)


def _remove_dead(path: Path) -> None:
    """Removes a socket that a server left behind when it was killed; one that answers, and any other file, stays and is in the way."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        try:
            one.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
