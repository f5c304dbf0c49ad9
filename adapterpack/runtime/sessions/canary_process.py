"""Replays the canaries of an untrusted bundle in a sandbox process, where ONNX Runtime may exhaust its limits
or crash without harm to this process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ... import errors
from ...bundle import GRAPH, graphs_of
from ...errors import AdapterpackError
from ...io import Json
from ...library_errors import library_errors
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox

_MEMORY = 4 << 30
_COPIES = 4
"""Bytes of address space of every replay, and how many times the size of the bundle's files are added to
that.
"""
_ADDRESSES = 1 << 46
"""The bytes of address space on a GPU, whose driver reserves addresses for all memory without using it."""
_SECONDS = 120.0
_BYTES_A_SECOND = 10 << 20
"""Seconds of CPU time of every replay, and how many bytes of the bundle's files add another second."""


def replay_apart(folder: Path, verify: str = "cached", provider: str = "cpu") -> Json:
    """Replays the canaries of a bundle on a provider in a sandbox process, on the engine's graph too, and
    returns the report of :func:`.canary.verify`. It also opens every graph. ``verify`` is that of a session.

    Raises:
        AdapterpackError: the bundle cannot be opened or run, or a canary fails; the error has the type that
            it has in the sandbox.
        OutOfLimits: the replay takes too much memory or time.
    """
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    limits = SandboxLimits(
        _MEMORY + _COPIES * total if provider == "cpu" else _ADDRESSES, _SECONDS + total / _BYTES_A_SECOND
    )
    sandbox = Sandbox(f"{__name__}:replay_bundle", limits, kept=0)
    request = json.dumps([str(folder.resolve()), verify, provider])
    answer: Json = json.loads(sandbox.run(request.encode(), "the graph cannot be run", where=GRAPH))
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
    """Runs in the sandbox process for :func:`replay_apart`: takes folder, verification and provider as JSON
    and returns the outcome as JSON.
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
