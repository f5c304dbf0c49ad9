"""Opens the sockets of a server: a TCP port, or a Unix socket that only its owner can use."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError, storage_errors
from ..http import is_loopback, listening

UNIX = "unix:"
BACKLOG = 256
"""The most connections that wait to be accepted."""


@contextmanager
def port_socket(host: str, port: int, scheme: str = "http") -> Iterator[tuple[socket.socket, str]]:
    """Listens at a port, and yields the socket with its URL, which begins with ``scheme``. Port 0 picks a
    free one.

    Raises:
        StorageError: the address cannot be used.
    """
    with storage_errors(f"{host}:{port}"):
        one = listening(host, port, BACKLOG)
    shown = f"[{host}]" if ":" in host else host
    with one:
        yield one, f"{scheme}://{shown}:{one.getsockname()[1]}"


@contextmanager
def address_socket(address: str, scheme: str = "http") -> Iterator[tuple[socket.socket, str]]:
    """Listens at ``HOST:PORT`` or ``unix:PATH``, and yields the socket with its address; a port's address
    begins with ``scheme``.

    Raises:
        ConfigError: the address has neither form.
        StorageError: the address cannot be used.
    """
    if address.startswith(UNIX):
        with _unix_socket(Path(address.removeprefix(UNIX))) as one:
            yield one, address
        return
    host, port = _parts(address)
    with port_socket(host, port, scheme) as found:
        yield found


def open_to_others(address: str) -> bool:
    """Returns whether other machines can reach an address, ``HOST:PORT`` or ``unix:PATH``.

    Example:
        >>> (open_to_others("127.0.0.1:8001"), open_to_others("[::]:8001"),
        ...     open_to_others("unix:/run/operator"))
        (False, True, False)

    Raises:
        ConfigError: the address has neither form.
    """
    return not address.startswith(UNIX) and not is_loopback(_parts(address)[0])


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ConfigError(
            "this is not an address to listen at", found=address, expected="HOST:PORT or unix:PATH"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


@contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        with storage_errors(path):
            _remove_dead(path)
            before = os.umask(0o177)  # private from the moment it exists
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
    """Removes the socket file of a server that was killed. A socket that answers, or any other file, stays,
    and binding fails.
    """
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        try:
            one.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
