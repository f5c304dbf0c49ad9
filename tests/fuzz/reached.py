"""How much of each module the kept inputs reach: lines of its functions that ran while every target read its seeds and
its part of the corpus. What no reader of strangers' bytes enters is not listed.

    python tests/fuzz/reached.py
    python tests/fuzz/reached.py --target bundle --target yaml
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import targets as t
from corpus import archive_of, inputs
from seeds import SCRATCH

import adapterpack

PACKAGE = Path(adapterpack.__file__).parent


def lines(code: CodeType) -> Iterator[int]:
    """The lines of a file's functions, without those that define them."""
    if code.co_flags & CO_OPTIMIZED:
        head = None if code.co_name.startswith("<") else code.co_firstlineno
        yield from (line for *_, line in code.co_lines() if line not in (None, head))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from lines(inner)


def reached(names: list[str], corpus: Path) -> dict[str, set[int]]:
    """The lines that ran, by file."""
    found = defaultdict[str, set[int]](set)

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            found[frame.f_code.co_filename].add(frame.f_lineno)
        return line

    def call(frame: FrameType, *_: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(str(PACKAGE)) else None

    for name in names:
        target = t.TARGETS[name]
        sys.settrace(call)
        for data in (*target.seeds, *inputs(archive_of(corpus, name))):
            t.answer(target, data)
        sys.settrace(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", choices=t.TARGETS)
    parser.add_argument("--corpus", type=Path, default=Path(__file__).parent / "corpus")
    args = parser.parse_args()
    ran = total = 0
    for file, some in sorted(reached(args.target or list(t.TARGETS), args.corpus).items()):
        every = set(lines(compile(Path(file).read_bytes(), file, "exec")))
        if some := some & every:
            ran, total = ran + len(some), total + len(every)
            share = f"{len(some):4d} of {len(every):4d} lines, {100 * len(some) // len(every):3d} %"
            sys.stdout.write(f"{Path(file).relative_to(PACKAGE.parent)!s:60}{share}\n")
    sys.stdout.write(f"{'together':60}{ran:4d} of {total:4d} lines, {100 * ran // max(total, 1):3d} %\n")
    shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
