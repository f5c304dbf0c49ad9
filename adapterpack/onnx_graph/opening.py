"""Opens and checks graphs in the sandbox process that :mod:`.apart` starts, which has the libraries loaded before its limits begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from .trial import start


def open_graph(request: bytes) -> bytes:
    """Opens a graph as a session does, and infers its shapes: its path in, nothing out."""
    path = request.decode()
    start(path, Path(path).parent)
    try:
        ShapeInferencePass()(ir.load(path))
    except MemoryError:
        raise
    except Exception:  # most graphs tell their shapes, and what needs those of others says what is wrong
        pass
    return b""


def problems(request: bytes) -> bytes:
    """By check of ``written`` and ``source``, two paths as JSON, what it has against the one and, only then, against the other."""
    written, source = json.loads(request)
    tests: dict[str, Callable[[str], object]] = {"onnx.checker": onnx.checker.check_model, "onnxruntime": _start}
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
    except Exception as error:  # the checker, its parser and ONNX Runtime raise what they like
        return str(error).partition("\n")[0][:200]
    return None


def _start(path: str) -> None:
    """Opens a graph as it is written, without optimizations."""
    start(path, Path(path).parent, optimized=False)
