"""Opens a graph in the sandbox process that :mod:`.apart` starts: that this process lives on is all that is asked of it."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort

from .bfloat16 import computing_wide


def survive(request: bytes) -> bytes:
    """Opens a graph with all optimizations, and without a second copy of its weights: its path, and whether it is opened in its form of
    float32, as JSON in, nothing out. What ONNX Runtime says of it is for who opens it next.
    """
    name, wide = json.loads(request)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(name).parent))
    try:
        ort.InferenceSession(computing_wide(Path(name)) if wide else name, options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from error
    return b""


def is_out_of_memory(error: Exception) -> bool:
    """Whether ONNX Runtime had too little memory, which it says in words alone."""
    return "bad_alloc" in str(error) or "Failed to allocate" in str(error)
