"""What clients ask, here and of other servers: ``python tests/guide/other_servers_page.py > docs/other-servers.md``."""

from __future__ import annotations

import csv
import sys
from itertools import groupby
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
INTRO = """# What clients ask, case by case

{count} small requests, asked by OpenAI's and Anthropic's own clients and by plain HTTP. "Yes" is an answer whose values are right, not just one
with status 200; `tests/interop/asked` says for each case what right is. adapterpack answers {right} of them: `python tests/interop/client_cases.py`
asks them all of a server with two adapters and a template for tools, and `.ci/client-libraries` does so for every change of the server, beside LangChain,
LlamaIndex, LiteLLM, pydantic-ai and lm-evaluation-harness.

The other columns are not from this program but from a trial of the same features: vLLM 0.32 on a CPU, in bfloat16, and llama.cpp's server with
ggml 0.21, both with SmolLM2-135M-Instruct and a template for tools. Where a field is empty, it was not tried. This page is made by `make guide`.
"""


def page() -> str:
    """The cases by group, in Markdown.

    Raises:
        ValueError: a server is said to have answered a case that there is not.
    """
    cases = _rows(TESTS / "golden" / "client_cases.tsv")
    elsewhere = {row["name"]: row for row in _rows(TESTS / "interop" / "asked" / "elsewhere.tsv")}
    if unknown := elsewhere.keys() - {row["name"] for row in cases}:
        raise ValueError(f"elsewhere.tsv has cases that nobody asks: {', '.join(sorted(unknown))}")
    right = sum(row["outcome"] == "yes" for row in cases)
    lines = [INTRO.format(count=len(cases), right=right)]
    for group, rows in groupby(cases, lambda row: row["group"]):
        lines += [f"## {group}\n", "| | adapterpack | vLLM | llama.cpp |", "|---|---|---|---|"]
        lines += [_line(row, elsewhere.get(row["name"], {})) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _line(row: dict[str, str], others: dict[str, str]) -> str:
    """A case and its three answers."""
    cells = (row["case"], row["outcome"], others.get("vLLM", ""), others.get("llama.cpp", ""))
    return "| " + " | ".join(cells) + " |"


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table, by the names of its columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


if __name__ == "__main__":
    sys.stdout.write(page())
