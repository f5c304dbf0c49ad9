"""Graphs that this version of adapterpack neither made nor ever opened are opened in a sandbox first: a crash
there ends nothing here.
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
    """Checks that ONNX Runtime lives through opening the graphs of these parts, as a session on ``provider``
    opens them, and remembers it.

    Raises:
        OutOfLimits: a graph takes too much memory or time.
        FormatError: the process ended.
    """
    for part in parts:
        if not proofs.was_openable(part) and not is_inside():
            size = sum(entry.size for entry in bundle.files)
            try_opening(
                folder / graph_file(part), size, wide=bundle.dtype == BFLOAT16.name and provider == "cpu"
            )
            proofs.remember_opening(part)
