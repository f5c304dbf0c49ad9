"""Checks a written graph with ONNX's checker and by opening it in ONNX Runtime, in a process with limits: a
stranger may have made it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...errors import ParityError
from ...onnx_graph.sandboxed_check import problems


def check(written: Path, source: Path, files: Iterable[Path]) -> dict[str, str]:
    """The result of both checks of ``written``: ``passed``, or why there is none because ``source`` fails as
    well. ``files`` are all that ``source`` reads.

    Raises:
        ParityError: it fails where the source does not.
        OutOfLimits: it takes too much memory or time.
    """
    results = {}
    for name, (problem, of_source) in problems(written, source, files).items():
        if problem is not None and of_source is None:
            raise ParityError(
                f"{name} does not accept the folded graph",
                where=written.name,
                found=problem,
                remedy="report this graph",
            )
        results[name] = "passed" if problem is None else f"not checked: the source fails too: {problem}"
    return results
