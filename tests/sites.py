"""Sites for browsers in tests: the packages of npm that run them, a plain server of files, and what a page in
Chromium answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from chromium import Page

from adapterpack.io import cache_folder
from adapterpack.io.locks import hold_lock

WEB = Path(__file__).parents[1] / "web"
npm = pytest.mark.skipif(shutil.which("npm") is None and not os.environ.get("CI"), reason="no npm here")
"""Marks a test that needs npm: it is left out where there is none, but in CI it fails."""


def fetched(source: Path = WEB) -> Path:
    """The folder ``node_modules`` of a ``package-lock.json``, whose digests npm compares; no script of a
    package runs.
    """
    lock = (source / "package-lock.json").read_bytes()
    folder = cache_folder() / "web-tests" / hashlib.sha256(lock).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / "lock", alone=True):
        if not (folder / "complete").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copyfile(source / name, folder / name)
            subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=folder,
                check=True,
                capture_output=True,
            )
            (folder / "complete").touch()
    return folder / "node_modules"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a plain server of files, as long as the block lasts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def opened(page: Page, site: Path, address: str, provider: str = "wasm") -> float:
    """Opens a site's page, and waits until it is ready; the seconds until the bundle was open."""
    page.open(f"{address}/index.html?provider={provider}")
    page.wait("globalThis.adapterpack || !document.querySelector('#trouble').hidden", 120)
    trouble = page.run("document.querySelector('#trouble').innerText")
    assert trouble == "", trouble
    assert all(one.startswith((address, "data:", "blob:", "about:")) for one in page.requests), page.requests
    return float(page.run("adapterpack.opened")) / 1000


def logits(page: Page, rows: list[tuple[str, str | None]]) -> np.ndarray:
    """Raw logits of texts with adapters, all in one batch, out of the browser."""
    texts = [{"text": text, "adapter": adapter} for text, adapter in rows]
    pass_ = f"adapterpack.bundle.pass({json.dumps(texts)}).then(({{ logits }}) => Array.from(logits.data))"
    return np.array(page.run(pass_)).reshape(len(rows), -1)


def said(page: Page, prompt: str | list[dict[str, str]], adapter: str | None, most: int) -> str:
    """The greedy answer of an open site to a prompt or to messages."""
    call = (
        f"adapterpack.bundle.generate({json.dumps(prompt)}, "
        f"{json.dumps({'adapter': adapter, 'maxNewTokens': most})})"
    )
    return str(
        page.run(
            f"(async () => {{ let text = ''; for await (const piece of {call}) text += piece; return "
            "text; })()"
        )
    )
