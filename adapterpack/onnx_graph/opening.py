"""Opens and checks graphs in the sandbox process that :mod:`.apart` starts, which has the libraries loaded before its limits begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import ShapeInferencePass

from .trial import is_out_of_memory


def open_graph(request: bytes) -> bytes:
    """Opens a graph as a session does, and infers its shapes: its path in, nothing out."""
    path = request.decode()
    _start(path, optimized=True)
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


def _start(path: str | Path, optimized: bool = False) -> None:
    """Opens a graph in ONNX Runtime, with one thread and without a second copy of its weights."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it says of errors is raised, too
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from error
        raise
