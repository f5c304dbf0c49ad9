"""The table of outcomes, ``tests/golden/families.tsv``: a line for each pair of a task and a type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

GOLDEN = Path(__file__).parent.parent / "golden" / "families.tsv"
NOT_MEASURED = "not measured"


class Outcome(NamedTuple):
    """What became of one type. ``level`` is what it reached, -1 where it was not measured; ``passed`` are its
    stages that passed, ``reason`` is the first that did not, and why. ``group`` is where the page shows it.
    """

    task: str
    kind: str
    version: str
    level: int
    passed: tuple[str, ...]
    reason: str = ""
    group: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.kind

    def line(self) -> str:
        """As the table has it."""
        passed = " ".join(self.passed) or "-"
        return "\t".join(
            (self.task, self.kind, self.group, self.version, str(self.level), passed, self.reason)
        )


HEAD = "task\ttype\tgroup\ttransformers\tlevel\tpassed\tfirst failure"


def read(path: Path = GOLDEN) -> dict[tuple[str, str], Outcome]:
    """The outcomes of a table, by task and type."""
    lines = path.read_text("utf-8").splitlines()[1:] if path.exists() else []
    found = {}
    for line in lines:
        task, kind, group, version, level, passed, reason = line.split("\t")
        stages = tuple(passed.split()) if passed != "-" else ()
        found[task, kind] = Outcome(task, kind, version, int(level), stages, reason, group)
    return found


def write(
    outcomes: Mapping[tuple[str, str], Outcome], groups: Mapping[tuple[str, str], str], path: Path = GOLDEN
) -> None:
    """Writes the table of all types that have a group, also of those that were not measured."""
    unknown = (Outcome(*key, "-", -1, (), NOT_MEASURED) for key in groups)
    rows = [outcomes.get(one.key, one)._replace(group=groups[one.key]) for one in unknown]
    path.write_text("\n".join([HEAD, *(one.line() for one in rows)]) + "\n", "utf-8")


def shortened(text: str, *folders: Path) -> str:
    """A reason without whatever another run has otherwise: places, sizes of errors, addresses."""
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(str(folder), "")
    text = re.sub(r"/[\w./+-]*/(site-packages|adapterpack)/", "", text)
    text = re.sub(r"\.\w+\.[0-9a-f]{8,}\.tmp/?", "", text)
    text = re.sub(r"off by [-+.\de]+,? of [-+.\de]+", "another number", text)
    text = re.sub(r"less by [-+.\de]+", "less", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0x", text)
    text = re.sub(r"\d+\.\d+(e[-+]?\d+)?|\d+e[-+]?\d+", "#", text)
    text = " ".join(text.split())
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


MOST = 240
"""Characters of a reason."""
