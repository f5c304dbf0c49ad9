"""Opens a listening socket, and tells which hosts are this machine."""

from __future__ import annotations

import ipaddress
import socket


def listening(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """Listens at a port of an IPv4 or IPv6 address, without Nagle's algorithm; port 0 picks a free one.

    By default TCP holds back the body of a response until the client has acknowledged its head, which costs a
    client with a persistent connection 40 ms. asyncio disables that only for sockets that it makes itself.
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


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach a host name or address.

    Example:
        >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
