"""The command of a comparison with peers: its common options, and how it ends."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from contestant_files import Files
from contestants import COMPARED, CONTESTANTS
from decode import SIZES


def parser_of(description: str | None, others: Iterable[str] = ()) -> argparse.ArgumentParser:
    """A parser with the options of every comparison; ``others`` are contestants besides the servers."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="135m", help="135m is SmolLM2, the others random Llamas"
    )
    parser.add_argument(
        "--peers", type=Path, help="the folder of the peers' environments: docs/benchmarks/serve.md"
    )
    parser.add_argument("--files", type=Path, help="where models and adapters are kept for the next time")
    parser.add_argument("--only", nargs="+", choices=[*others, *sorted({one.name for one in CONTESTANTS})])
    parser.add_argument("--precision", nargs="+", choices=tuple(COMPARED), default=["fp32"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--html", type=Path, help="write a page, too, where there is one of this comparison")
    return parser


def report(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Files], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    page: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Measures, and prints the result as JSON or as a table; ``page`` makes a page of it."""
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(args, Files(args.files or Path(scratch), args.size, args.peers))
    if args.html and page is not None:
        args.html.write_text(page(result), "utf-8")
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
