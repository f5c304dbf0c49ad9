"""Queries ONNX Runtime's build or starts a provider. ``start_provider`` runs this module as a process of its
own, which alone ends if a broken build crashes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import build_and_package_info as build

from ..errors import AdapterpackError
from ..runtime import Device
from ..runtime.providers import PROVIDERS, resolve

_GRAPH = (
    '<ir_version: 10, opset_import: ["" : 21]> doctor (float[8,8] x) => (float[8,8] y) { y = MatMul(x, x) }'
)


def _build() -> dict[str, Any]:
    return {
        "version": ort.__version__,
        "package": getattr(build, "package_name", None),
        "cuda": getattr(build, "cuda_version", None),
        "providers": [
            *ort.get_available_providers(),
            *(one.runtime_name for one in PROVIDERS.values() if one.has_plugin),
        ],
    }


def _start(name: str) -> dict[str, Any]:
    from onnx import parser  # noqa: PLC0415 - the build is queried even where onnx cannot be imported

    started = resolve(Device(provider=name))
    session = started.open(parser.parse_model(_GRAPH).SerializeToString(), started.session_options())
    running = started.require(session)
    x = np.arange(64, dtype=np.float32).reshape(8, 8) / 64
    [y] = session.run(None, {"x": x})
    # some providers multiply in half precision; a broken one deviates much more
    if not np.allclose(y, x @ x, rtol=0, atol=1e-2):
        sys.exit(f"{running} runs, and computes a wrong product")
    return {"started": running}


def main() -> None:
    """Prints one line of JSON, or fails."""
    try:
        answer = _start(sys.argv[1]) if len(sys.argv) > 1 else _build()
    except AdapterpackError as error:
        sys.exit(error.sentence)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
