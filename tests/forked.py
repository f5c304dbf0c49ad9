"""Processes that are forks of one that has imported everything and done nothing yet: they start in
milliseconds instead of seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import runpy
import sys
from pathlib import Path

from processes import reserved_port

import adapterpack

FORKED = multiprocessing.get_context("forkserver")
_OURS = (
    module.name
    for module in pkgutil.walk_packages(adapterpack.__path__, "adapterpack.")
    if "__main__" not in module.name
)
FORKED.set_forkserver_preload(["pytest", "onnxruntime", "transformers", "torch", "mobius", *_OURS])


def fork_two(script: Path, *arguments: str) -> None:
    """The script in two forked processes that talk over gloo, with the variables that ``torchrun`` sets."""
    with reserved_port() as port:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        two = [
            FORKED.Process(
                target=_rank,
                args=({**environment, "RANK": rank, "LOCAL_RANK": rank}, [str(script), *arguments]),
            )
            for rank in ("0", "1")
        ]
        try:
            for process in two:
                process.start()
            for process in two:
                process.join(600)
            assert [process.exitcode for process in two] == [0, 0]
        finally:
            for process in two:
                process.kill()


def _rank(environment: dict[str, str], command: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
