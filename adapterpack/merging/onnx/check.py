"""Checks a written graph with ONNX's checker and by opening it in ONNX Runtime, in a process with limits: a stranger may have made it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...errors import ParityError
from ...onnx_graph.apart import limits_of, start_ort
from ...sandbox.sandbox import Sandbox


def check(written: Path, source: Path, files: Iterable[Path]) -> dict[str, str]:
    """The result of both checks of ``written``: ``passed``, or why there is none because ``source`` fails as well. ``files`` are all that
    ``source`` reads.

    Raises:
        ParityError: it fails where the source does not.
        OutOfLimits: it takes too much memory or time.
    """
    request = json.dumps([str(written.resolve()), str(source.resolve())])
    answer = Sandbox(f"{__name__}:problems", limits_of(files), kept=0).run(request.encode(), "the graph cannot be checked", where=source)
    results = {}
    for name, (problem, of_source) in json.loads(answer).items():
        if problem is not None and of_source is None:
            raise ParityError(f"{name} does not accept the folded graph", where=written.name, found=problem, remedy="report this graph")
        results[name] = "passed" if problem is None else f"not checked: the source fails too: {problem}"
    return results


def problems(request: bytes) -> bytes:
    """What :func:`check` has done in the other process: two paths as JSON in; by check, what each has against the written graph and, if
    anything, against the source."""
    written, source = json.loads(request)
    found = {}
    for name, test in (("onnx.checker", _checker), ("onnxruntime", _runtime)):
        problem = test(written)
        found[name] = problem, None if problem is None else test(source)
    return json.dumps(found).encode()


def _checker(path: str) -> str | None:
    import onnx  # noqa: PLC0415 - only where a graph is checked

    try:
        onnx.checker.check_model(path)
    except MemoryError:
        raise
    except Exception as error:  # the checker and its parser raise what they like
        return _line(error)
    return None


def _runtime(path: str) -> str | None:
    try:
        start_ort(path, optimized=False)
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's own classes
        return _line(error)
    return None


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
