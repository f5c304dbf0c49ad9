"""What both demos share: timed stages, sizes, and the end of the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base.checkpoint import Checkpoint
from ..errors import FormatError
from ..io.strict_json import canonical
from ..pack.pack import Pack
from ..pack.validate.validation import validate
from ..report.demo import demo_report
from ..version import VERSION

Say = Callable[[str], None]


class Stages:
    """Says what is being done and remembers how long it took, in seconds."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.timings: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One stage."""
        self.say(name)
        started = time.perf_counter()
        yield
        self.timings[name] = round(time.perf_counter() - started, 3)


def model_facts(folder: Path, source: str) -> dict[str, Any]:
    """What the report says of the base."""
    base = Checkpoint(folder)
    size = sum(info.nbytes for info in base.tensors.values())
    count = sum(base.read(name).size for name in base.tensors)
    return {"name": base.name, "parameters": count, "bytes": size, "source": source}


def require_valid(packs: Mapping[str, Path], base: Path) -> None:
    """Validates every pack against its base.

    Raises:
        FormatError: one is not valid.
    """
    for name, path in packs.items():
        report = validate(path, base)
        if not report.valid:
            raise FormatError(f"the pack is not valid: {report.findings[0].message}", where=name)


def training_facts(pack: Pack) -> dict[str, Any]:
    """Rows, steps and trained numbers of one pack."""
    claims = pack.manifest.training
    return {
        "rows": claims["rows"],
        "steps": claims["steps"],
        "trainable": sum(value.size for value in pack.tensors.values()),
    }


def folder_size(path: Path) -> int:
    """The bytes of every file in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def finish(result: dict[str, Any], folder: Path, final: Path) -> dict[str, Any]:
    """Writes ``result.json`` and ``report.html`` into ``folder``, which will be called ``final``, and returns
    the result.
    """
    paths = {name: str(final / path) for name, path in result["paths"].items()}
    where = {"paths": paths, "output": str(final), "report": str(final / "report.html")}
    complete = {"command": "demo", "version": VERSION, **result, **where}
    (folder / "report.html").write_text(demo_report(complete), "utf-8")
    (folder / "result.json").write_bytes(canonical(complete))
    return complete
