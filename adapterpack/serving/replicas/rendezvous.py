"""Which replica a name goes to: by rendezvous hashing (Thaler and Ravishankar 1998), among those that are there and have room.

Each replica has a number for each name, and the largest wins. When one goes, only its names move, and to all others; when it is back,
they are its again.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

CROWDED = 1.25
"""Times the requests of the others on average that a replica may have; the rest of its names' requests go on to the next
(https://arxiv.org/abs/1608.01350)."""


class Replica:
    """A server: its address, the requests that it is answering, and until when it counts as gone."""

    def __init__(self, address: str) -> None:
        self.address, self.running, self.gone_until = address, 0, 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """It has one request more for as long as the block lasts."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def score(self, name: str) -> bytes:
        """Its number for a name."""
        return hashlib.sha256(f"{self.address}\0{name}".encode("utf-8", "surrogatepass")).digest()


class Replicas:
    """Servers that answer alike. One that failed is tried after all others for ``pause`` seconds. A replica is crowded where it
    has more than ``few`` requests and more than :data:`CROWDED` times its share of all.
    """

    def __init__(self, addresses: Sequence[str], pause: float, few: int) -> None:
        self.all = [Replica(address) for address in addresses]
        self._pause, self._few = pause, few

    def order(self, name: str) -> list[Replica]:
        """Where a request for a name goes: to the first of these, or where that is not there, to the next."""
        most = max(self._few, math.ceil(CROWDED * (sum(one.running for one in self.all) + 1) / len(self.all)))
        now = time.monotonic()
        ranked = sorted(self.all, key=lambda one: one.score(name), reverse=True)
        return sorted(ranked, key=lambda one: (one.gone_until > now, one.running >= most))

    def failed(self, replica: Replica) -> None:
        """A replica did not answer."""
        replica.gone_until = time.monotonic() + self._pause
