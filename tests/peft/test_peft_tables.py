"""One in eighty of PEFT's own test cases, as the golden table of outcomes has it; ``interop/peft_tables.py``
does them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from interop.peft_cases.cases import Case, all_cases
from interop.peft_cases.outcomes import line, lines_of
from interop.peft_cases.pairs import run
from interop.peft_cases.release import version

ONE_IN = 80
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "peft_tables.tsv"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Those that the installed PEFT and the golden table have both: another release has some more and some
    less.
    """
    golden = lines_of(GOLDEN.read_text("utf-8"))
    return [case for case in all_cases() if case.name in golden]


def test_outcomes_are_those_of_the_golden_table(cases: list[Case], tmp_path: Path) -> None:
    """Where one differs, ``python tests/interop/peft_tables.py --only NAME --json`` tells why, and
    ``--write`` renews the table. Cases of another release of PEFT than the table's may have other outcomes,
    but none may be wrong.
    """
    text = GOLDEN.read_text("utf-8")
    golden = lines_of(text)
    assert len(cases) > len(golden) // 2, "the table was made for another PEFT"
    found = {case.name: line(run(case, tmp_path)) for case in cases[::ONE_IN]}
    assert not [name for name, said in found.items() if "\twrong\t" in said]
    if text.startswith(f"# PEFT {version()}:"):
        assert found == {name: golden[name] for name in found}
    assert sum("\tok\tok\tok\t" in said for said in found.values()) > len(found) // 2
