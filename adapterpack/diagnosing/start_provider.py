"""Queries ONNX Runtime in a separate process, its build or whether a provider runs a graph, since a broken
build may crash the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_SECONDS = 120.0
"""Seconds that a provider may take to start: a GPU's provider compiles kernels the first time."""
_SHOWN = 300


def ask_onnxruntime(provider: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """Queries the build, or starts the provider of that name; returns the answer, or None and the reason for
    the failure.

    Example:
        >>> ask_onnxruntime("cpu")[0]
        {'started': 'CPUExecutionProvider'}
    """
    command = [sys.executable, "-P", "-m", f"{__package__}.provider_child", *([provider] if provider else [])]
    # the child imports from the same places as this process
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {_SECONDS:g} s"
    if done.returncode < 0:
        return None, f"the process ended with signal {-done.returncode}"
    if done.returncode:
        last = next(
            (text for text in reversed(done.stderr.splitlines()) if text.strip()),
            f"exit code {done.returncode}",
        )
        return None, last.strip().rstrip(".")[-_SHOWN:]
    # libraries may have printed lines before it
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer, ""
