"""The demos' last stage: the real server in a process of its own, asked as its users ask it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AdapterpackError

_SECONDS = 60.0
"""Of one answer."""


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
