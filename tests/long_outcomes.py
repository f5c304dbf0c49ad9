"""Keeps what the long tests gave when they last ran: ``python tests/long_outcomes.py JUNIT.xml`` puts the
outcomes of its files into ``tests/golden/long.tsv``.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "golden" / "long.tsv"
HEAD = ("file", "commit", "passed", "skipped", "failed", "minutes")


def outcomes(report: Path, commit: str) -> dict[str, str]:
    """File -> its line of the table, for the files of a report of pytest."""
    counts, seconds = defaultdict[str, Counter[str]](Counter), defaultdict[str, float](float)
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["file"]
        ended = {child.tag for child in case}
        kind = "failed" if ended & {"failure", "error"} else "skipped" if "skipped" in ended else "passed"
        counts[file][kind] += 1
        seconds[file] += float(case.attrib["time"])
    return {
        file: "\t".join(
            (
                file,
                commit,
                *(str(count[kind]) for kind in ("passed", "skipped", "failed")),
                f"{seconds[file] / 60:.1f}",
            )
        )
        for file, count in counts.items()
    }


def main() -> None:
    """Merges, and drops files that are no more."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = TABLE.read_text("utf-8").splitlines()[1:] if TABLE.exists() else []
    known = {file: line for line in lines if (ROOT / (file := line.partition("\t")[0])).is_file()}
    known |= outcomes(Path(sys.argv[1]), commit)
    TABLE.write_text("\n".join(["\t".join(HEAD), *(known[file] for file in sorted(known))]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
