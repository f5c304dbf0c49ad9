"""Opens a graph in the sandbox process that :mod:`..sandboxed_check` starts, only to see whether the process
survives.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort

from ...library_errors import is_out_of_memory
from .. import computing_wide


def survive(request: bytes) -> bytes:
    """Opens a graph as a session does. Takes its path, and whether to open its float32 form, as JSON; returns
    nothing. Ignores errors that ONNX Runtime raises: the session that opens the graph next reports them.

    Raises:
        MemoryError: there is too little memory.
    """
    name, wide = json.loads(request)
    try:
        start(computing_wide(Path(name)) if wide else name, Path(name).parent)
    except MemoryError:
        raise
    except Exception:  # of any type: the session that opens the graph next reports it
        pass
    return b""


def start(graph: str | bytes, folder: Path, *, optimized: bool = True) -> None:
    """Opens a graph with external data in ``folder``, with one thread and without a second copy of its
    weights.

    Raises:
        MemoryError: there is too little memory; ONNX Runtime shows that only in the text of its error.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # ONNX Runtime also raises the errors that it would log
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from error
        raise
