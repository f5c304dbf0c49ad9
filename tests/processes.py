"""Processes that a test starts end with it, also where it fails: it would wait for them for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapterpack


@contextmanager
def child(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command's process, with ``options`` of ``subprocess.Popen``; it is killed at the end unless it has
    ended.
    """
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given while the block lasts. Who sets SO_REUSEADDR, as servers do, may listen
    at it; until then whoever connects is refused.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def run_two(*command: str, python: str = sys.executable) -> None:
    """The command in two processes of ``python`` that talk over gloo."""
    # a script has its own folder on its path, and not this one
    package = str(Path(adapterpack.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": package}
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    with child(launcher, env=environment, stderr=-1, stdout=-1) as process:
        try:
            output, errors = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends the two, which are in sessions of their own
            raise AssertionError(
                f"not at an end after 600 seconds:\n{process.communicate(timeout=60)[1][-3000:]}"
            ) from None
    assert process.returncode == 0, errors[-3000:]
    lines = output.splitlines()
    assert len(set(lines)) == len(lines), output  # only one process speaks
