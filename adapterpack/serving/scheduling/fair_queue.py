"""A fair queue of rows: the tenant that has received the fewest tokens goes next (virtual token counters,
https://arxiv.org/abs/2401.00588).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count

from .rows import ScheduledRow

ANSWERED = 2.0
"""The cost of an answer token relative to a prompt token, since each answer token takes a step of its own.
"""
_FEW = 64
"""Up to this many counters are never cleaned up."""


@dataclass
class _Tenant:
    used: float = 0.0
    running: int = 0
    rows: list[tuple[int, int, ScheduledRow]] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether a row of the tenant waits or runs."""
        return bool(self.rows or self.running)


class FairQueue:
    """A queue for each tenant, with a counter of the tokens that the tenant has received, divided by the
    ``share`` of its key. Smaller ranks of keys always go first; among a tenant's own rows the smaller
    ``priority`` does.

    When an idle tenant returns, its counter is lifted to that of the tenant served last, so that nobody saves
    up turns. Counters that would be lifted anyway are dropped now and then, and all of them when nothing
    waits or runs.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._level, self._numbers, self._most, self._waiting = 0.0, count(), _FEW, 0

    def __len__(self) -> int:
        return self._waiting  # a plain number, because other threads read it

    def put(self, row: ScheduledRow) -> None:
        """Adds a row after those of its tenant with the same priority."""
        if row.key.id not in self._tenants:
            self._make_room()
        tenant = self._tenants.setdefault(row.key.id, _Tenant())
        if not tenant.busy:
            # A returning tenant starts level with the tenant served last, and cannot use up saved turns.
            tenant.used = max(tenant.used, self._level)
        heapq.heappush(tenant.rows, (row.priority, next(self._numbers), row))
        self._waiting += 1

    def pop(self) -> ScheduledRow | None:
        """Removes and returns the next row, and charges its prompt to its tenant. The row counts as running
        until :meth:`end`.
        """
        waiting = [
            (tenant.rows[0][2].key.rank, tenant.used, name)
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
        tenant.used += row.cost / row.key.share
        return row

    def charge(self, row: ScheduledRow, tokens: int) -> None:
        """Charges answer tokens of a running row to its tenant."""
        self._tenants[row.key.id].used += ANSWERED * tokens / row.key.share

    def end(self, row: ScheduledRow) -> None:
        """Records that a running row has ended."""
        self._tenants[row.key.id].running -= 1
        self._rest()

    def remove(self, row: ScheduledRow) -> bool:
        """Removes a waiting row, and returns whether it was waiting."""
        tenant = self._tenants.get(row.key.id)
        left = [entry for entry in tenant.rows if entry[2] is not row] if tenant is not None else []
        if tenant is None or len(left) == len(tenant.rows):
            return False
        heapq.heapify(left)
        tenant.rows = left
        self._waiting -= 1
        self._rest()
        return True

    def _rest(self) -> None:
        """Clears the counters if nothing waits or runs: the next tenants all start at the highest level."""
        if not any(tenant.busy for tenant in self._tenants.values()):
            self._level = max((tenant.used for tenant in self._tenants.values()), default=self._level)
            self._tenants.clear()

    def _make_room(self) -> None:
        """If there are many counters, drops those of idle tenants that would be lifted on their return
        anyway.
        """
        if len(self._tenants) >= self._most:
            self._tenants = {
                name: tenant
                for name, tenant in self._tenants.items()
                if tenant.busy or tenant.used > self._level
            }
            self._most = max(_FEW, 2 * len(self._tenants))
