"""What clients ask a server of texts, case by case, by OpenAI's and Anthropic's own clients.

    python tests/interop/client_cases.py [--write] [WORD...]

``with_servers.py`` starts the server. Whoever calls this without it has adapterpack and the clients in one environment.
Prints a line a case, and fails where an outcome is not that of ``tests/golden/client_cases.tsv``; ``--write`` renews
that table, of which ``make guide`` makes a page. With words, only the cases whose names have one of them are asked.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "client_cases.tsv"


def main(arguments: list[str]) -> int:
    """Returns 0 if every outcome is the golden one."""
    if "TOKENIZER" not in os.environ:
        starter = [sys.executable, str(TESTS / "serving" / "with_servers.py"), "--refusals"]
        return subprocess.run([*starter, sys.executable, __file__, *arguments], check=False).returncode
    from asked.case import CASES

    words = [word for word in arguments if word != "--write"]
    rows = [["group", "name", "case", "outcome"]]
    for one in CASES:
        if not words or any(word in one.name for word in words):
            rows.append([one.group, one.name, one.what, one.outcome()])
            print("\t".join(rows[-1]), flush=True)
    if "--write" in arguments:
        with GOLDEN.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, "excel-tab", lineterminator="\n").writerows(rows)
        return 0
    with GOLDEN.open(encoding="utf-8", newline="") as file:
        golden = list(csv.reader(file, "excel-tab"))
    other = [row for row in rows if row not in golden]
    other += [row for row in golden if not words and row not in rows]
    print(*(f"not in both tables: {' | '.join(row)}" for row in other), f"{len(rows) - 1} cases", sep="\n")
    return bool(other)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
