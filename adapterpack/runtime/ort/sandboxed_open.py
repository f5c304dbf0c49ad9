"""Opens graphs of unknown origin in a sandbox process first, so that a crash of ONNX Runtime does not end
this process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...bundle.manifest import Bundle, graph_file
from ...bundle.proofs import VerificationCache
from ...onnx_graph.sandboxed_check import try_opening
from ...sandbox.child import is_inside
from .values import BFLOAT16


def require_openable(
    folder: Path, bundle: Bundle, proofs: VerificationCache, parts: Iterable[str], provider: str = "cpu"
) -> None:
    """Checks that ONNX Runtime survives opening the graphs of these parts, as a session on ``provider`` would
    open them, and remembers the result for the next time.

    Raises:
        OutOfLimits: a graph takes too much memory or time.
        FormatError: the sandbox process crashed.
    """
    for part in parts:
        if not proofs.was_openable(part) and not is_inside():
            size = sum(entry.size for entry in bundle.files)
            try_opening(
                folder / graph_file(part), size, wide=bundle.dtype == BFLOAT16.name and provider == "cpu"
            )
            proofs.remember_opening(part)
