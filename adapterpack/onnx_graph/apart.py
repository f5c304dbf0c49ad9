"""Opens strangers' graphs with ONNX and ONNX Runtime in a process of its own, before this one does: it may take what it takes, or die."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..sandbox.limits import Limits
from ..sandbox.sandbox import Sandbox

_MEMORY, _COPIES = 384 << 20, 8
"""Bytes of address space that every graph may take to be opened, and how many times the size of its files beyond that: weights of 4 bits
that become floats are 8 times as large."""
_SECONDS, _BYTES_A_SECOND = 3.0, 2 << 20
"""Processor time that every graph may take, and how many bytes of its files add another second."""


def limits_of(files: Iterable[Path]) -> Limits:
    """What opening a graph may take, in proportion to its files."""
    total = sum(path.stat().st_size for path in files)
    return Limits(_MEMORY + _COPIES * total, _SECONDS + total / _BYTES_A_SECOND)


def require_openable(path: Path, files: Iterable[Path]) -> None:
    """Checks that a graph can be opened as a session opens it, and its shapes be inferred, within limits; ``files`` are all that it reads.

    Raises:
        FormatError: ONNX Runtime refuses it.
        OutOfLimits: it takes too much memory or time.
    """
    sandbox = Sandbox(f"{__name__}:open_graph", limits_of(files), kept=0)
    sandbox.run(json.dumps(str(path.resolve())).encode(), "the graph cannot be opened", where=path,
                remedy="use a graph from a source that you trust")


def open_graph(request: bytes) -> bytes:
    """What :func:`require_openable` has done in the other process: the path of a graph as JSON in, nothing out."""
    import onnx_ir as ir  # noqa: PLC0415 - only the other process needs these
    from onnx_ir.passes.common import ShapeInferencePass  # noqa: PLC0415

    path = json.loads(request)
    start_ort(path, optimized=True)
    try:
        ShapeInferencePass()(ir.load(path))
    except MemoryError:
        raise
    except Exception:  # most graphs tell their shapes, and what needs those of others says what is wrong
        pass
    return b""


def start_ort(path: str | Path, *, optimized: bool) -> None:
    """Opens a graph in ONNX Runtime, with one thread and without a second copy of its weights.

    Raises:
        MemoryError: there is too little for it.
        Exception: whatever else ONNX Runtime raises.
    """
    import onnxruntime as ort  # noqa: PLC0415 - as above

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it says of errors is raised, too
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "bad_alloc" in str(error) or "Failed to allocate" in str(error):
            raise MemoryError from error
        raise
