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
_GRAPH = (
    '<ir_version: 10, opset_import: ["" : 21]> doctor (float[8,8] x) => (float[8,8] y) { y = MatMul(x, x) }'
)


def ask_onnxruntime(provider: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """Queries the build, or starts the provider of that name; returns the answer, or None and the reason for
    the failure.

    Example:
        >>> ask_onnxruntime("cpu")[0]
        {'started': 'CPUExecutionProvider'}
    """
    command = [sys.executable, "-P", "-m", __name__, *([provider] if provider else [])]
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
        return None, last.strip()[-_SHOWN:]
    # libraries may have printed lines before it
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer, ""


def _build() -> dict[str, Any]:
    import onnxruntime as ort  # noqa: PLC0415 - this is what may fail, and only the child may fail with it
    from onnxruntime.capi import build_and_package_info as build  # noqa: PLC0415 - as above

    return {
        "version": ort.__version__,
        "package": getattr(build, "package_name", None),
        "cuda": getattr(build, "cuda_version", None),
        "providers": ort.get_available_providers(),
    }


def _start(name: str) -> dict[str, Any]:
    import numpy as np  # noqa: PLC0415 - as above
    import onnxruntime as ort  # noqa: PLC0415 - as above
    from onnx import parser  # noqa: PLC0415 - as above

    from ..runtime.providers.device import Device  # noqa: PLC0415 - as above
    from ..runtime.providers.resolved_device import resolve  # noqa: PLC0415 - as above

    started = resolve(Device(provider=name))
    session = ort.InferenceSession(
        parser.parse_model(_GRAPH).SerializeToString(),
        started.session_options(),
        providers=[kind for kind, _ in started.providers],
        provider_options=[dict(options) for _, options in started.providers],
    )
    running = started.require(session)
    x = np.arange(64, dtype=np.float32).reshape(8, 8) / 64
    [y] = session.run(None, {"x": x})
    # some providers multiply in half precision; a broken one deviates much more
    if not np.allclose(y, x @ x, rtol=0, atol=1e-2):
        sys.exit(f"{running} runs, and computes a wrong product")
    return {"started": running}


def main() -> None:
    """Prints one line of JSON, or fails."""
    from ..errors import AdapterpackError  # noqa: PLC0415 - as above

    try:
        answer = _start(sys.argv[1]) if len(sys.argv) > 1 else _build()
    except AdapterpackError as error:
        sys.exit(error.sentence)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
