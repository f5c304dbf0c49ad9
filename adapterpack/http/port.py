"""A socket that listens at a port."""

from __future__ import annotations

import socket


def listening(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """Listens at a port of an address of IPv4 or IPv6; port 0 takes a free one. What is written to a
    connection is sent at once.

    By default TCP keeps the body of an answer back until the client has acknowledged its head, which takes a
    client that reuses its connection 40 ms. asyncio prevents that only for sockets that it has made itself.
    Connections inherit the option from this socket.

    Raises:
        OSError: the address cannot be used.

    Example:
        >>> with listening("127.0.0.1", 0) as one:
        ...     one.getsockname()[0]
        '127.0.0.1'
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.create_server((host, port), backlog=backlog, family=family)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one
