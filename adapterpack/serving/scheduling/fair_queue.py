"""Rows that wait for the engine, in a fair order: who has had the fewest tokens goes next
(https://arxiv.org/abs/2401.00588).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

ANSWERED = 2.0
"""What a token of an answer costs, where one of a prompt costs 1: an answer's tokens are made one step
each.
"""
_FEW = 64
"""Counters that are never too many."""


class Waiting(Protocol):
    """What is needed of a row. ``tenant`` has the ``share`` of the engine that it has beside others of the
    class ``rank``; smaller ranks go first, always. Among a tenant's own rows the smaller ``priority`` goes
    first.
    """

    tenant: str
    share: float
    rank: int
    priority: int

    @property
    def cost(self) -> int:
        """The tokens of its prompt."""
        ...


AnyRow = TypeVar("AnyRow", bound=Waiting)


@dataclass
class _Tenant(Generic[AnyRow]):
    used: float = 0.0
    running: int = 0
    rows: list[tuple[int, int, AnyRow]] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether a row of it waits or runs."""
        return bool(self.rows or self.running)


class FairQueue(Generic[AnyRow]):
    """A queue for each tenant, and a counter of the tokens that it has had.

    A tenant that comes back has its counter lifted to that of the one who was served last: nobody saves up
    turns while away. Counters that would be lifted are dropped now and then, and all of them when nothing
    waits or runs.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[AnyRow]] = {}
        self._level, self._numbers, self._most, self._waiting = 0.0, count(), _FEW, 0

    def __len__(self) -> int:
        return self._waiting  # other threads ask

    def put(self, row: AnyRow) -> None:
        """Adds a row behind those of its tenant with the same priority."""
        if row.tenant not in self._tenants:
            self._make_room()
        tenant = self._tenants.setdefault(row.tenant, _Tenant())
        if not tenant.busy:
            tenant.used = max(tenant.used, self._level)
        heapq.heappush(tenant.rows, (row.priority, next(self._numbers), row))
        self._waiting += 1

    def pop(self) -> AnyRow | None:
        """The next row, which runs until :meth:`ended`; its prompt is charged."""
        waiting = [
            (tenant.rows[0][2].rank, tenant.used, name)
            for name, tenant in self._tenants.items()
            if tenant.rows
        ]
        if not waiting:
            return None
        _, self._level, name = min(waiting)
        tenant = self._tenants[name]
        row = heapq.heappop(tenant.rows)[2]
        self._waiting -= 1
        tenant.running += 1
        tenant.used += row.cost / row.share
        return row

    def charge(self, row: AnyRow, tokens: int = 1) -> None:
        """Counts tokens that a running row has answered."""
        self._tenants[row.tenant].used += ANSWERED * tokens / row.share

    def end(self, row: AnyRow) -> None:
        """A row that was popped has ended."""
        self._tenants[row.tenant].running -= 1
        self._rest()

    def remove(self, row: AnyRow) -> bool:
        """Takes out a row that waits; False where it does not."""
        tenant = self._tenants.get(row.tenant)
        left = [entry for entry in tenant.rows if entry[2] is not row] if tenant is not None else []
        if tenant is None or len(left) == len(tenant.rows):
            return False
        heapq.heapify(left)
        tenant.rows = left
        self._waiting -= 1
        self._rest()
        return True

    def _rest(self) -> None:
        """Where nothing waits or runs, whoever comes next begins level with who has had the most."""
        if not any(tenant.busy for tenant in self._tenants.values()):
            self._level = max((tenant.used for tenant in self._tenants.values()), default=self._level)
            self._tenants.clear()

    def _make_room(self) -> None:
        """Drops the counters of tenants that have nothing here and would be lifted when they come back, once
        there are many.
        """
        if len(self._tenants) >= self._most:
            self._tenants = {
                name: tenant
                for name, tenant in self._tenants.items()
                if tenant.busy or tenant.used > self._level
            }
            self._most = max(_FEW, 2 * len(self._tenants))
