"""Checks graphs in the sandbox process that :mod:`..sandboxed_check` starts, with ONNX and ONNX Runtime:
onnx_ir takes longer to import than both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx

from .trial import start


def problems(request: bytes) -> bytes:
    """Runs each check on ``written`` and, only if that fails, on ``source`` (two paths as JSON); returns the
    problems by check.
    """
    written, source = json.loads(request)
    tests: dict[str, Callable[[str], object]] = {
        "onnx.checker": onnx.checker.check_model,
        "onnxruntime": _start,
    }
    problems = {}
    for name, test in tests.items():
        problem = _problem(test, written)
        problems[name] = problem, None if problem is None else _problem(test, source)
    return json.dumps(problems).encode()


def _problem(test: Callable[[str], object], path: str) -> str | None:
    try:
        test(path)
    except MemoryError:
        raise
    except Exception as error:  # the checker, its parser and ONNX Runtime raise exceptions of any type
        return str(error).partition("\n")[0][:200]
    return None


def _start(path: str) -> None:
    """Opens a graph without optimizations."""
    start(path, Path(path).parent, optimized=False)
