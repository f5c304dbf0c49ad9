"""Replays the canaries of a stranger's bundle in a process of its own: ONNX Runtime reads and runs its graphs
there, and may take what it takes, or die, without this process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ... import errors
from ...bundle.decoder_graph import graphs_of
from ...bundle.manifest import GRAPH
from ...errors import AdapterpackError
from ...library_errors import library_errors
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox

_MEMORY, _COPIES = 4 << 30, 4
"""Bytes of address space that every replay may take, and how many times the size of the bundle's files it may
take beyond that.
"""
_ADDRESSES = 1 << 46
"""The same on a card, whose driver maps the addresses of all memory that there is, and takes none of it."""
_SECONDS, _BYTES_A_SECOND = 120.0, 10 << 20
"""Processor time that every replay may take, and how many bytes of the bundle's files add another second."""


def replay_apart(folder: Path, verify: str = "cached", provider: str = "cpu") -> dict[str, Any]:
    """What :func:`.canary.verify` says of a bundle on a provider; every graph can be opened, and all canaries
    that were replayed passed, on the engine's graph, too. ``verify`` is that of a session.

    Raises:
        AdapterpackError: the bundle cannot be opened or run, or a canary fails; the same error as in this
            process.
        OutOfLimits: it takes too much memory or time.
    """
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    limits = SandboxLimits(
        _MEMORY + _COPIES * total if provider == "cpu" else _ADDRESSES, _SECONDS + total / _BYTES_A_SECOND
    )
    sandbox = Sandbox(f"{__name__}:replay_bundle", limits, kept=0)
    request = json.dumps([str(folder.resolve()), verify, provider])
    answer: dict[str, Any] = json.loads(sandbox.run(request.encode(), "the graph cannot be run", where=GRAPH))
    if "error" in answer:
        kind = next(
            (kind for kind in _kinds(AdapterpackError) if kind.__name__ == answer["kind"]), errors.FormatError
        )
        raise kind(
            answer["error"]["what"],
            **{name: answer["error"][name] for name in ("where", "expected", "found", "remedy")},
        )
    return answer


def replay_bundle(request: bytes) -> bytes:
    """What :func:`replay_apart` has done in the other process: a folder and a way to verify it as JSON in,
    the outcome as JSON out.
    """
    from .. import canary  # noqa: PLC0415 - ONNX Runtime: what asks for a replay needs none
    from ..engine.canary_replay import replay_by_engine  # noqa: PLC0415
    from .session import Session  # noqa: PLC0415

    try:
        with library_errors("onnxruntime", "the graph cannot be run", where=GRAPH):
            folder, verify, provider = json.loads(request)
            session = Session(folder, provider, verify=verify)
            for part in graphs_of(session.bundle):
                session.graph(part)
            report = canary.verify(session)
            if session.bundle.decoder:
                replays = replay_by_engine(session, [session.packs[name] for name in report["replayed"]])
                canary.judge(session, replays, canary.get_drift(session.bundle), by_engine=True)
    except AdapterpackError as error:
        return json.dumps({"kind": type(error).__name__, "error": error.to_json()}).encode()
    return json.dumps(report).encode()


def _kinds(kind: type[AdapterpackError]) -> Iterator[type[AdapterpackError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _kinds(inner)
