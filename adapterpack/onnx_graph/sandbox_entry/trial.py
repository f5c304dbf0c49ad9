"""Opens a graph in the sandbox process that :mod:`..sandboxed_check` starts. The only question is whether the
process survives.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort

from ..bfloat16 import computing_wide


def survive(request: bytes) -> bytes:
    """Opens a graph as a session does: its path, and whether it is opened in its form of float32, as JSON in,
    nothing out. Errors that ONNX Runtime raises are ignored: the session that opens the graph next reports
    them.

    Raises:
        MemoryError: there is too little memory.
    """
    name, wide = json.loads(request)
    try:
        start(computing_wide(Path(name)) if wide else name, Path(name).parent)
    except MemoryError:
        raise
    except Exception:  # of any kind: the session that opens the graph next says what is wrong
        pass
    return b""


def start(graph: str | bytes, folder: Path, *, optimized: bool = True) -> None:
    """Opens a graph, whose external data is in ``folder``, with one thread and without a second copy of its
    weights.

    Raises:
        MemoryError: there is too little memory, which ONNX Runtime says in words alone.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it says of errors is raised, too
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "bad_alloc" in str(error) or "Failed to allocate" in str(error):
            raise MemoryError from error
        raise
