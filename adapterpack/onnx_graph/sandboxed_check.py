"""Tries a stranger's graph with ONNX and ONNX Runtime in a sandbox first, so that a crash or a huge
allocation cannot hurt this process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..sandbox.limits import SandboxLimits
from ..sandbox.sandbox import Sandbox

_MEMORY, _COPIES = 384 << 20, 8
"""Bytes of address space that every graph may take to be opened, and how many times the size of its files
beyond that: weights of 4 bits that become floats are 8 times as large.
"""
_ROOM = 1 << 30
"""The same of a graph whose opening has to be as it is without limits: for want of memory, ONNX Runtime
leaves constants uncomputed.
"""
_SECONDS, _BYTES_A_SECOND = 2.0, 2 << 20
"""Processor time that every graph may take, and how many bytes of its files add another second."""


def require_openable(path: Path, files: Iterable[Path]) -> None:
    """Checks that a graph can be opened as a session opens it, and its shapes be inferred, within limits;
    ``files`` are all that it reads.

    Raises:
        FormatError: ONNX Runtime refuses it.
        OutOfLimits: it takes too much memory or time.
    """
    _sandbox("opening:open_graph", files).run(
        str(path.resolve()).encode(),
        "the graph cannot be opened",
        where=path,
        remedy="use a graph from a source that you trust",
    )


def try_opening(path: Path, size: int, *, wide: bool = False) -> None:
    """Checks that ONNX Runtime lives through opening a graph whose files have ``size`` bytes, or its form of
    float32 where ``wide``.

    Raises:
        OutOfLimits: it takes too much memory or time.
        FormatError: the process ended.
    """
    request = json.dumps([str(path.resolve()), wide]).encode()
    Sandbox("adapterpack.onnx_graph.sandbox_entry.trial:survive", _limits(size, _ROOM), kept=0).run(
        request, "the graph cannot be opened", where=path, remedy="use a bundle from a source that you trust"
    )


def problems(written: Path, source: Path, files: Iterable[Path]) -> dict[str, tuple[str | None, str | None]]:
    """By check, ``onnx.checker`` and ``onnxruntime``, what it has against ``written`` and, only then, against
    ``source``, whose ``files`` are given.

    Raises:
        OutOfLimits: it takes too much memory or time.
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
