"""The servers that benchmarks compare: how each is started, what a request to it looks like, and at which
precision it computes.

A peer lives in an environment of its own, ``PEERS/NAME`` (docs/benchmarks/serve.md says how they are made);
one that is not there is named and left out. Each runs in a process of its own, one at a time, and ends with
its block.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients import Form, Request, openai
from contestant_files import Files

THREADS = 2
ROWS = 8
CONTEXT = 1024
"""Positions of a row."""
START_SECONDS = 400


@dataclass(frozen=True)
class Contestant:
    """A server. ``command`` starts it on files with adapters at a port; ``needs`` is the program in its
    environment, relative to those of all peers.
    """

    name: str
    precision: str
    needs: str
    command: Callable[[Files, Sequence[Path], int, str], list[Any]]
    form: Callable[[Sequence[Path]], Form] = lambda adapters: openai
    batch: Callable[[Sequence[Request]], tuple[str, Any]] | None = None
    """Where several prompts are one request: a batch of a library that has one adapter at a time."""
    most_adapters: int = 1000
    environment: dict[str, str] = field(default_factory=dict)
    packs: str = "pack"
    """The files of adapters that it reads."""

    def program(self, peers: Path | None) -> str | None:
        """Where its program is; None: it is not installed."""
        if not self.needs:
            return sys.executable
        found = None if peers is None else shutil.which(peers / self.needs)
        return found and str(Path(found).absolute())


@contextlib.contextmanager
def running(
    one: Contestant, files: Files, adapters: Sequence[Path], peers: Path | None
) -> Iterator[tuple[int, int]]:
    """The server while the block lasts: its port, and the process whose session is its own."""
    port, log = _free_port(), files.folder / f"{one.name}-{one.precision}.log"
    command = [str(part) for part in one.command(files, adapters, port, str(one.program(peers)))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **one.environment}
    if one.needs:
        environment.pop("PYTHONPATH", None)
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        ) as process,
    ):
        try:
            _wait(process, port, log)
            yield port, process.pid
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)


def memory_mb(session: int) -> int:
    """What the processes of a session have in memory, shared pages by their share."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[3]) == session:
                lines = (status.parent / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total >> 10


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with (
            contextlib.suppress(OSError, urllib.error.HTTPError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(
        (f"{' '.join(map(str, process.args))[:200]} does not answer; the end of its log:\n")  # type: ignore[arg-type]
        + log.read_text(errors="replace")[-3000:]
    )


def _ours(precision: str) -> Contestant:
    def command(files: Files, adapters: Sequence[Path], port: int, program: str) -> list[Any]:
        return [
            program,
            "-m",
            "adapterpack",
            "serve",
            files.bundle(precision),
            "--port",
            port,
            "--audit",
            "",
            "--provider",
            "cpu",
            "--threads",
            THREADS,
            "--max-rows",
            ROWS,
            "--max-length",
            CONTEXT,
            "--name",
            "base",
            *(part for pack in adapters for part in ("--adapters", pack)),
        ]

    return Contestant("ours", precision, "", command)


def vllm(precision: str, dtype: str, program: str = "vllm/bin/python", *more: object) -> Contestant:
    """vLLM's server in the environment of a Python, with ``more`` options."""

    def command(files: Files, adapters: Sequence[Path], port: int, program: str) -> list[Any]:
        options = (
            [
                "--enable-lora",
                "--max-loras",
                min(ROWS, len(adapters)),
                "--max-lora-rank",
                16,
                "--max-cpu-loras",
                len(adapters),
                "--lora-modules",
                *(f"{pack.name}={pack}" for pack in adapters),
            ]
            if adapters
            else []
        )
        # The command vllm looks for its version under a name that the CPU's wheel does not have; its server
        # is the same.
        return [
            program,
            "-P",  # the folder of this file is not vLLM's
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            files.base,
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--served-model-name",
            "base",
            "--dtype",
            dtype,
            "--max-model-len",
            CONTEXT,
            "--max-num-seqs",
            ROWS,
            *more,
            *options,
        ]

    return Contestant(
        "vllm",
        precision,
        program,
        command,
        packs="peft",
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        },
    )


def _llama(precision: str, kind: str) -> Contestant:
    def command(files: Files, adapters: Sequence[Path], port: int, program: str) -> list[Any]:
        return [
            program,
            "-m",
            files.gguf(kind),
            "--port",
            port,
            "-t",
            THREADS,
            "-tb",
            THREADS,
            "-np",
            ROWS,
            "-c",
            ROWS * CONTEXT,
            "--no-webui",
            "--lora-init-without-apply",
            *(part for pack in adapters for part in ("--lora", pack)),
        ]

    def form(adapters: Sequence[Path]) -> Form:
        numbers = {pack.stem: number for number, pack in enumerate(adapters)}

        def written(request: Request) -> tuple[str, Any]:
            # each by name: the server takes an empty list for all of them at their full scale
            chosen = [
                {"id": number, "scale": float(name == request.adapter)} for name, number in numbers.items()
            ]
            return "/completion", {
                "prompt": request.prompt,
                "n_predict": request.tokens,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "cache_prompt": False,
                "lora": chosen,
            }

        return written

    return Contestant("llama.cpp", precision, "llama/bin/llama-server", command, form, packs="gguf")


def _one_adapter(
    name: str, precision: str, model: Callable[[Files], Path], packs: str, most: int
) -> Contestant:
    script = Path(__file__).with_name("one_adapter_server.py")

    def command(files: Files, adapters: Sequence[Path], port: int, program: str) -> list[Any]:
        return [
            program,
            "-P",
            script,
            name,
            "--model",
            model(files),
            "--port",
            port,
            *(part for pack in adapters for part in ("--adapter", f"{pack.stem}={pack}")),
        ]

    def batch(wanted: Sequence[Request]) -> tuple[str, Any]:
        return "/batch", {
            "adapters": [one.adapter for one in wanted],
            "prompts": [one.prompt for one in wanted],
            "tokens": wanted[0].tokens,
        }

    return Contestant(
        name, precision, f"{name}/bin/python", command, batch=batch, most_adapters=most, packs=packs
    )


CONTESTANTS = (
    _ours("fp32"),
    _ours("int8"),
    _ours("w8a8"),
    _ours("int4"),
    vllm("fp32", "float32"),
    vllm("bf16", "bfloat16"),
    _llama("fp32", "f32"),
    _llama("int8", "q8_0"),
    _llama("int4", "q4_0"),
    _one_adapter("peft", "fp32", lambda files: files.base, "peft", 8),
    _one_adapter("genai", "fp32", lambda files: files.genai("fp32"), "onnx_adapter", 64),
    _one_adapter("genai", "int4", lambda files: files.genai("int4"), "onnx_adapter", 64),
)
COMPARED = {"fp32": ("fp32", "bf16"), "int8": ("int8",), "w8a8": ("int8", "bf16"), "int4": ("int4",)}
"""A precision of ours -> those of peers that it is compared with."""


def taking_part(precisions: Sequence[str], only: Sequence[str]) -> list[Contestant]:
    """The contestants of these precisions of ours, and what they are compared with; with ``only`` those of
    these names.
    """
    peers = {peer for precision in precisions for peer in COMPARED[precision]}
    return [
        one
        for one in CONTESTANTS
        if (not only or one.name in only) and one.precision in (precisions if one.name == "ours" else peers)
    ]
