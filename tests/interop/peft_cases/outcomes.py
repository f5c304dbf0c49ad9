"""The table of outcomes: one line a case, totals at its head; and how it differs from another one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from .trial import CRASH, NONE, OK, REFUSED, STEPS, WRONG, Outcome

_ORDER = (OK, REFUSED, CRASH, WRONG, NONE)


def line(outcome: Outcome) -> str:
    """A case: its name, the three steps, and why those that are not ok are not, each reason once."""
    if outcome.why:
        return "\t".join([outcome.name, NONE, NONE, NONE, outcome.why])
    steps = [getattr(outcome, step) for step in STEPS]
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, step in zip(STEPS, steps, strict=True):
        if step.why:
            reasons[step.why].append(name)
    said = "; ".join(
        why if len(names) == sum(step.status != OK for step in steps) else f"{'+'.join(names)}: {why}"
        for why, names in reasons.items()
    )
    return "\t".join([outcome.name, *(step.status for step in steps), said])


def totals(outcomes: Sequence[Outcome]) -> str:
    """How many cases there are, and for each step how many went how."""
    tried = [outcome for outcome in outcomes if not outcome.why]
    rows = [f"# {len(outcomes)} cases; PEFT itself can do {len(tried)}"]
    for step in STEPS:
        counts = Counter(getattr(outcome, step).status for outcome in tried)
        rows.append(f"# {step}: " + ", ".join(f"{counts[status]} {status}" for status in _ORDER))
    faults = {
        status: sum(any(getattr(outcome, step).status == status for step in STEPS) for outcome in tried)
        for status in (REFUSED, CRASH, WRONG)
    }
    rows.append(
        "# cases with a step that is "
        + ", ".join(f"{status}: {count}" for status, count in faults.items())
        + f"; largest error {max((outcome.error for outcome in tried), default=0):.0e}"
    )
    return "\n".join(rows)


def table(outcomes: Sequence[Outcome], version: str) -> str:
    """The whole table as tab-separated text, its head in lines that begin with ``#``."""
    head = (
        f"# PEFT {version}: its own test cases through this package. Renewed by: python "
        "tests/interop/peft_tables.py --write\n"
    )
    return (
        head
        + totals(outcomes)
        + "\nname\tattach\tmerge\ttrip\twhy\n"
        + "".join(f"{line(outcome)}\n" for outcome in outcomes)
    )


def lines_of(text: str) -> dict[str, str]:
    """A table's lines by the names of their cases."""
    return {
        row.split("\t")[0]: row
        for row in text.splitlines()
        if "\t" in row and not row.startswith(("#", "name\t"))
    }


def difference(golden: str, outcomes: Iterable[Outcome], whole: bool) -> list[str]:
    """What is new, gone or otherwise than in the golden table, line by line; ``whole``: every case was done,
    so that one may be gone.
    """
    before, now = lines_of(golden), {outcome.name: line(outcome) for outcome in outcomes}
    found = []
    for name, said in now.items():
        if name not in before:
            found.append(f"+ {said}")
        elif before[name] != said:
            found += [f"- {before[name]}", f"+ {said}"]
    return found + [f"- {said}" for name, said in before.items() if whole and name not in now]


def causes(outcomes: Sequence[Outcome]) -> str:
    """The outcomes grouped by cause, the most frequent first, each with three cases."""
    groups: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.why:
            groups["n/a", "", outcome.why[:70]].append(outcome)
        for step in STEPS:
            done = getattr(outcome, step)
            if done.status in (REFUSED, CRASH, WRONG):
                groups[done.status, step, done.why if done.status != WRONG else "other numbers"].append(
                    outcome
                )
    parts = []
    for (status, step, why), members in sorted(
        groups.items(), key=lambda item: (item[0][0] == "n/a", -len(item[1]))
    ):
        parts += [
            f"{len(members):4d}  {status} {step}: {why}\n",
            *(f"        {one.name} [{one.model}]\n" for one in members[:3]),
        ]
    return "".join(parts)
