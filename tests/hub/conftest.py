"""A real hub in a real process, and this process as its client: the network is the loopback alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hubs import READ, WRITE, Hub
from processes import child


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    tokens = folder / "tokens"
    tokens.write_text(f"# who may do what\nann write {WRITE}\nbob read {READ}\n")
    tokens.chmod(0o600)
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), str(folder / "data"), str(tokens)]
    with child(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield Hub(process.stdout.readline().strip(), folder / "data")


@pytest.fixture
def hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, asked by this process with a fresh cache and a token that may write; waits between tries are
    short.
    """
    from huggingface_hub import constants

    from adapterpack.hub.transport import client

    monkeypatch.setenv("HF_ENDPOINT", served.address)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 30.0)
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)
    served.arm()
    yield served
    served.arm()


@pytest.fixture
def client_environment(served: Hub, tmp_path: Path) -> dict[str, Any]:
    """The environment of a client in another process."""
    return {
        **os.environ,
        "HF_ENDPOINT": served.address,
        "HF_TOKEN": WRITE,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "ADAPTERPACK_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
