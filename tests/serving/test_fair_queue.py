"""The order in which rows that wait begin: by the tokens that their tenants have had."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from adapterpack.serving.scheduling.fair_queue import ANSWERED, FairQueue
from adapterpack.serving.scheduling.rows import RequestOutput, ScheduledRow
from adapterpack.serving.tenants.keys import Key

pytestmark = pytest.mark.fast


class Row(ScheduledRow):
    """A row of a tenant that will have so many tokens, and that no engine sees."""

    def __init__(
        self,
        tenant: str,
        cost: int = 10,
        share: float = 1.0,
        rank: int = 0,
        priority: int = 0,
        tokens: int = 20,
    ) -> None:
        key = Key(id=tenant, sha256="0" * 64, share=share, rank=rank)
        output = RequestOutput(1)
        super().__init__(
            make=pytest.fail, pack=None, cost=cost, place=0, output=output, key=key, priority=priority
        )
        self.tenant, self.tokens = tenant, tokens


def served(queue: FairQueue, rows: int, at_once: int = 4) -> Counter[str]:
    """Runs so many rows to their ends, some at a time; the tokens that each tenant has had."""
    had: Counter[str] = Counter()
    running: list[Row] = []
    while True:
        while rows and len(running) < at_once and isinstance(row := queue.pop(), Row):
            running.append(row)
            rows -= 1
            had[row.tenant] += row.cost
        if not running:
            break
        row = running.pop(0)
        queue.charge(row, row.tokens)
        had[row.tenant] += int(ANSWERED * row.tokens)
        queue.end(row)
    return had


def test_who_asks_for_much_keeps_nobody_waiting() -> None:
    """One tenant has a thousand rows in the queue, of ten times the tokens; the others have theirs as if it
    had as few: each has the same share of the tokens, to within the rows that run at a time.
    """
    queue = FairQueue()
    for _ in range(1000):
        queue.put(Row("greedy", cost=100, tokens=200))
    for name in ("ann", "bob"):
        for _ in range(200):
            queue.put(Row(name))
    had = served(queue, 300)
    assert max(had.values()) - min(had.values()) <= 4 * (100 + ANSWERED * 200)


@pytest.mark.parametrize("seed", range(5))
def test_shares_ranks_and_priorities(seed: int) -> None:
    """A share of three has three times the tokens; a smaller rank goes first whatever it has had; within a
    tenant the smaller priority goes first, and of equal ones the earlier.
    """
    dice, queue = random.Random(seed), FairQueue()
    rows = [
        Row(name, share=share, cost=dice.randrange(1, 30))
        for name, share in (("one", 1.0), ("three", 3.0))
        for _ in range(400)
    ]
    dice.shuffle(rows)
    for row in rows:
        queue.put(row)
    had = served(queue, 300)
    assert had["three"] / had["one"] == pytest.approx(3, rel=0.1)
    first = [Row("first", rank=-1) for _ in range(3)]
    for row in first:
        queue.put(row)
    assert [queue.pop() for _ in range(3)] == first
    own = [Row("own", rank=-2, priority=priority) for priority in (5, 0, 5, -1)]
    for row in own:
        queue.put(row)
    assert [queue.pop() for _ in range(4)] == [own[3], own[1], own[0], own[2]]


def test_nobody_saves_up_turns_and_nothing_is_left() -> None:
    """A tenant that comes late goes on from where the others are; removed rows are gone; counters of those
    who left are dropped.
    """
    queue = FairQueue()
    for _ in range(100):
        queue.put(Row("early"))
    served(queue, 50)
    for _ in range(40):
        queue.put(Row("late"))
    had = served(queue, 40)
    assert abs(had["early"] - had["late"]) <= 4 * 50
    gone = Row("gone")
    queue.put(gone)
    assert queue.remove(gone) and not queue.remove(gone)
    served(queue, 10_000)
    assert len(queue) == 0
    for others in (0, 500):  # alone, and beside one who always has something here
        for _ in range(others):
            queue.put(Row("always", cost=1, tokens=1))
        for number in range(2000):
            queue.put(Row(f"once-{number}"))
            served(queue, 2 if others else 1)
        assert len(queue._tenants) < 300
