"""Processes that a test starts end with it, also where it fails: it would wait for them for ever."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapterpack

FORKED = multiprocessing.get_context("forkserver")
"""Starts processes as forks of one that has imported everything and done nothing yet: in milliseconds instead of seconds."""
_OURS = (module.name for module in pkgutil.walk_packages(adapterpack.__path__, "adapterpack."))
FORKED.set_forkserver_preload(["onnxruntime", "transformers", "torch", "mobius", *(name for name in _OURS if "__main__" not in name)])


@contextmanager
def child(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command's process, with ``options`` of ``subprocess.Popen``; it is killed at the end unless it has ended."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def run_two(*command: str, python: str = sys.executable) -> None:
    """The command in two processes of ``python`` that talk over gloo."""
    package = str(Path(adapterpack.__file__).parents[1])  # a script has its own folder on its path, and not this one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": package}
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    with child(launcher, env=environment, stderr=-1, stdout=-1) as process:
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends the two, which are in sessions of their own
            raise AssertionError(f"not at an end after 240 seconds:\n{process.communicate(timeout=60)[1][-3000:]}") from None
    assert process.returncode == 0, errors[-3000:]
    assert output.count("trained '") in (0, 2), output  # only one process speaks


def fork_two(script: Path, *arguments: str) -> None:
    """The script in two forked processes that talk over gloo, with the variables that ``torchrun`` sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    two = [FORKED.Process(target=_rank, args=({**environment, "RANK": rank, "LOCAL_RANK": rank}, [str(script), *arguments]))
           for rank in ("0", "1")]
    try:
        for process in two:
            process.start()
        for process in two:
            process.join(240)
        assert [process.exitcode for process in two] == [0, 0]
    finally:
        for process in two:
            process.kill()


def _rank(environment: dict[str, str], command: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
