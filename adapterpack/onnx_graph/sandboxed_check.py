"""Opens an untrusted graph with ONNX and ONNX Runtime in a sandbox first, so that a crash or a huge
allocation cannot hurt this process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..sandbox.limits import SandboxLimits
from ..sandbox.sandbox import Sandbox

_MEMORY = 384 << 20
_COPIES = 8
"""Address space in bytes that every graph may use to open, and the additional multiple of the size of its
files: int4 weights that become floats grow 8 times.
"""
_ROOM = 1 << 30
"""The base allowance for a graph that has to open exactly as without limits: when short of memory, ONNX
Runtime silently skips constant folding.
"""
_SECONDS = 2.0
_BYTES_A_SECOND = 2 << 20
"""Processor seconds that every graph may use, and the bytes of its files that add another second."""


def require_openable(path: Path, files: Iterable[Path]) -> None:
    """Checks that a session can open a graph, and that its shapes can be inferred, within limits; ``files``
    are all files that it reads.

    Raises:
        FormatError: ONNX Runtime refuses it.
        OutOfLimits: opening takes too much memory or time.
    """
    _sandbox("opening:open_graph", files).run(
        str(path.resolve()).encode(),
        "the graph cannot be opened",
        where=path,
        remedy="use a graph from a source that you trust",
    )


def try_opening(path: Path, size: int, *, wide: bool = False) -> None:
    """Checks that ONNX Runtime survives opening a graph whose files have ``size`` bytes, or its float32 form
    if ``wide``.

    Raises:
        OutOfLimits: opening takes too much memory or time.
        FormatError: the process crashed.
    """
    request = json.dumps([str(path.resolve()), wide]).encode()
    Sandbox("adapterpack.onnx_graph.sandbox_entry.trial:survive", _limits(size, _ROOM), kept=0).run(
        request, "the graph cannot be opened", where=path, remedy="use a bundle from a source that you trust"
    )


def problems(written: Path, source: Path, files: Iterable[Path]) -> dict[str, tuple[str | None, str | None]]:
    """Returns for each check, ``onnx.checker`` and ``onnxruntime``, the problem with ``written`` and, only if
    there is one, the problem with ``source``, which reads ``files``.

    Raises:
        OutOfLimits: a check takes too much memory or time.
    """
    request = json.dumps([str(written.resolve()), str(source.resolve())]).encode()
    answer: dict[str, tuple[str | None, str | None]] = json.loads(
        _sandbox("checking:problems", files).run(request, "the graph cannot be checked", where=source)
    )
    return answer


def _sandbox(function: str, files: Iterable[Path]) -> Sandbox:
    limits = _limits(sum(path.stat().st_size for path in files))
    return Sandbox(f"adapterpack.onnx_graph.sandbox_entry.{function}", limits, kept=0)


def _limits(size: int, memory: int = _MEMORY) -> SandboxLimits:
    return SandboxLimits(memory + _COPIES * size, _SECONDS + size / _BYTES_A_SECOND)
