"""The pages of the guide as tests read them: their links, their commands and their code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^\n|\A)((?:^ {4}.*\n)+)", re.MULTILINE)
_PROGRAMS = (
    "adapterpack",
    "pip",
    "python",
    "openssl",
    "curl",
    "pytest",
    "tritonserver",
    "serve",
    "mkdocs",
    "hf",
    "export",
    "jq",
)


class Block(NamedTuple):
    """Something on a page that a reader copies: ``language`` is ``sh`` or ``python``."""

    language: str
    text: str

    def commands(self) -> list[str]:
        """The commands of a shell block without comments, one after the other; output and files that are
        shown are none.
        """
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        stripped = [
            command for line in lines for command in re.sub(r"\s+#.*$", "", line.strip()).split(" && ")
        ]
        return [command for command in stripped if command.split(" ")[0] in _PROGRAMS]


def pages() -> list[Path]:
    """The README and the pages of the guide, without decisions and measurements."""
    return [
        ROOT / "README.md",
        *(path for path in sorted(DOCS.rglob("*.md")) if path.parent.name not in ("decisions", "benchmarks")),
    ]


def name_of(page: Path) -> str:
    """Its path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in order: fenced ones, and indented ones with commands."""
    text = page.read_text("utf-8")
    found: list[tuple[int, Block]] = []
    for match in _FENCE.finditer(text):
        body = "\n".join(line.removeprefix(match[1]) for line in match[3].splitlines())
        if match[2] in ("sh", "python"):
            found.append((match.start(), Block(match[2], body)))
    plain = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    spans = [match.span() for match in _FENCE.finditer(text)]
    for match in _INDENTED.finditer(plain):
        body = "\n".join(line[4:] for line in match[1].splitlines())
        at = text.find(match[1])
        if not any(start <= at < end for start, end in spans) and Block("sh", body).commands():
            found.append((at, Block("sh", body)))
    return (block for _, block in sorted(found, key=lambda pair: pair[0]))


def words(command: str) -> list[str]:
    """The words of a command, as a shell splits them."""
    return shlex.split(command)


def anchors(page: Path) -> set[str]:
    """What a link can lead to on a page: its headings as MkDocs names them, and those that are named on
    purpose.
    """
    text = _FENCE.sub("", page.read_text("utf-8"))
    found = set(re.findall(r"\{ #([\w-]+) \}", text))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.partition(" {")[0]).lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found
