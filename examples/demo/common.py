"""What both demos share: timed stages, sizes, a real server in a process of its own, the end of the work."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import AdapterpackError, FormatError
from adapterpack.io.strict_json import canonical
from adapterpack.pack.pack import Pack
from adapterpack.pack.validate.validation import validate
from adapterpack.resources import resource
from adapterpack.version import VERSION

from .report import demo_report

Say = Callable[[str], None]
_SECONDS = 60.0
"""Of one answer of the server."""


class Stages:
    """Says what is being done and remembers how long it took, in seconds."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.timings: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One stage."""
        self.say(name)
        started = time.perf_counter()
        yield
        self.timings[name] = round(time.perf_counter() - started, 3)


def data_file(name: str, split: str) -> Path:
    """One of the demo's data files."""
    return resource(f"examples/data/{name}.{split}.jsonl")


def rows_of(name: str, split: str) -> list[dict[str, str]]:
    """The rows of one of the demo's data files."""
    return [json.loads(line) for line in data_file(name, split).read_text("utf-8").splitlines()]


def model_facts(folder: Path, source: str) -> dict[str, Any]:
    """What the report says of the base."""
    base = Checkpoint(folder)
    size = sum(info.nbytes for info in base.tensors.values())
    count = sum(base.read(name).size for name in base.tensors)
    return {"name": base.name, "parameters": count, "bytes": size, "source": source}


def require_valid(packs: Mapping[str, Path], base: Path) -> None:
    """Validates every pack against its base.

    Raises:
        FormatError: one is not valid.
    """
    for name, path in packs.items():
        report = validate(path, base)
        if not report.valid:
            raise FormatError(f"the pack is not valid: {report.findings[0].message}", where=name)


def training_facts(pack: Pack) -> dict[str, Any]:
    """Rows, steps and trained numbers of one pack."""
    claims = pack.manifest.training
    return {
        "rows": claims["rows"],
        "steps": claims["steps"],
        "trainable": sum(value.size for value in pack.tensors.values()),
    }


def folder_size(path: Path) -> int:
    """The bytes of every file in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def finish(result: dict[str, Any], folder: Path, final: Path) -> dict[str, Any]:
    """Writes ``result.json`` and ``report.html`` into ``folder``, which will be called ``final``, and returns
    the result.
    """
    paths = {name: str(final / path) for name, path in result["paths"].items()}
    where = {"paths": paths, "output": str(final), "report": str(final / "report.html")}
    complete = {"command": "demo", "version": VERSION, **result, **where}
    (folder / "report.html").write_text(demo_report(complete), "utf-8")
    (folder / "result.json").write_bytes(canonical(complete))
    return complete


class Client(NamedTuple):
    """What asks: its name, and a call that takes a path and a body and gives the answer's JSON."""

    name: str
    post: Callable[[str, dict[str, Any]], Any]


@contextmanager
def served(bundle: Path, adapters: Sequence[Path] = (), options: Sequence[str] = ()) -> Iterator[Client]:
    """A client of ``adapterpack serve`` with a bundle, further packs and ``options``, while the block lasts:
    OpenAI's own if there is one.

    Raises:
        AdapterpackError: the server does not begin.
    """
    key = secrets.token_urlsafe(32)
    command = [
        sys.executable,
        "-m",
        "adapterpack",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--audit",
        "",
        "--json",
        *options,
    ]
    command += [word for pack in adapters for word in ("--adapters", str(pack))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "ADAPTERPACK_API_KEY": key}
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            said = json.loads(line) if line.startswith("{") else {}
            if "address" not in said:
                raise AdapterpackError(
                    "the demo's server does not begin",
                    where=bundle,
                    found=line.strip()[:300] or "no word",
                    remedy=f"see what it says: adapterpack serve {bundle}",
                )
            yield _client(said["address"], key)
        finally:
            process.terminate()


def _client(address: str, key: str) -> Client:
    try:
        import openai  # noqa: PLC0415 - not needed, and shown where it is there
    except ModuleNotFoundError:
        return Client("HTTP", lambda path, body: _plain(f"{address}{path}", key, body))
    client = openai.OpenAI(base_url=address, api_key=key, timeout=_SECONDS)
    return Client(
        f"openai {openai.__version__}", lambda path, body: client.post(path, body=body, cast_to=object)
    )


def _plain(url: str, key: str, body: dict[str, Any]) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=_SECONDS
    ) as answer:
        return json.load(answer)
