"""The benchmarks that compare servers: their clients against a server that answers by the clock, and all of
it on a tiny model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import clients
import contestants
import peers_decode
import serve
from contestant_files import Files
from served_page import served_report


@asynccontextmanager
async def clockwork(first: float, token: float, running: list[int]) -> AsyncIterator[int]:
    """A server whose answers have their first token after so many seconds, and one more after each ``token``;
    its port. ``running`` gets the number of requests whenever one comes.
    """
    now = [0]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        body = await reader.readexactly(length)
        now[0] += 1
        running.append(now[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        await asyncio.sleep(first)
        for _ in range(3):
            writer.write(b'data: {"error": "no"}\n\n' if b'"broken"' in body else b"data: {}\n\n")
            await asyncio.sleep(token)
        now[0] -= 1
        writer.write(b"data: [DONE]\n\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.fast
def test_clients_count_and_time_what_a_server_sends() -> None:
    """Four clients of a closed loop have four requests at a time; an open loop keeps its times; an error in a
    stream is one. Times have no upper bound here, since the machine may be busy.
    """
    running = list[int]()
    wanted = clients.requests(["one", "two"], 12, 4, tokens=3)
    assert [request.adapter for request in wanted[:4]] == ["one", "two", "one", "two"]

    async def everything() -> tuple[list[clients.Answer], list[clients.Answer]]:
        async with clockwork(0.2, 0.05, running) as port:
            closed = await clients.closed_loop(port, clients.openai, wanted, 4, 600)
            assert (len(running), max(running)) == (12, 4)
            late = clients.requests(["one"], 5, 4, tokens=3, rate=20)
            opened = await clients.open_loop(port, clients.openai, late, 0.02)
            with pytest.raises(RuntimeError, match="error"):
                await clients.closed_loop(port, clients.openai, [clients.Request("broken", [1], 3)], 1, 1)
        return closed, opened

    closed, opened = asyncio.run(everything())
    figures = clients.summary(closed)
    assert figures["answers"] == 12
    assert 0 < figures["tokens_per_second"] <= 12 * 3 / (3 * 0.28)
    assert figures["first_token_ms"]["p50"] > 195
    assert figures["request_ms"]["p50"] > 290
    assert len(opened) < 5  # the last ones are given up


def test_more_adapters_than_clients_follow_zipfs_law() -> None:
    names = [str(number) for number in range(100)]
    wanted = clients.requests(names, 2000, 8, mixed=True)
    shares = [sum(request.adapter == name for request in wanted) / 2000 for name in ("0", "9")]
    assert shares == pytest.approx([0.193, 0.019], abs=0.03)
    assert {len(request.prompt) for request in wanted} <= set(range(16, 113))


@pytest.mark.long
def test_servers_are_compared_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our server, its engine alone, and PEFT in the server that stands for what one writes around it, in this
    environment.
    """
    # threads of a model as small as this one only wait for each other, and busily
    for module in (contestants, serve, peers_decode):
        monkeypatch.setattr(module, "THREADS", 1)
    monkeypatch.setattr(serve, "PATIENCE", 300.0)
    peers, files = tmp_path / "peers", Files(tmp_path / "files", "tiny")
    (peers / "peft" / "bin").mkdir(parents=True)
    program = peers / "peft" / "bin" / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    options = {
        "size": "tiny",
        "peers": peers,
        "precision": ["fp32"],
        "packs": "large",
        "clients": 4,
        "prompt": 8,
        "tokens": 8,
        "rounds": 1,
        "seconds": 0.5,
        "rate": 8.0,
    }
    ours, peft = (
        serve.measure(argparse.Namespace(**options, only=[name], adapters=counts), files)
        for name, counts in (("ours", [1, 3]), ("peft", [3]))
    )
    assert ours["missing"] == peft["missing"] == []
    results = ours["results"] + peft["results"]
    result = {**ours, "results": results, "ratios": serve.compared(results)}
    assert [(one["name"], one["adapters"]) for one in results] == [("ours", 1), ("ours", 3), ("peft", 3)]
    for one in result["results"]:
        assert one["closed"]["tokens_per_second"] > 0
        assert one["open"]["answers"] == one["open"]["sent"] == 4
    assert {"engine", "http_costs"} <= set(result["results"][0])
    assert [ratio["over"] for ratio in result["ratios"]] == ["ours fp32, 3 adapters", "peft fp32, 3 adapters"]
    serve.show(result)
    page = served_report(result)
    assert all(f"{one['closed']['tokens_per_second']:.1f}" in page for one in result["results"])
    options = {
        "size": "tiny",
        "peers": peers,
        "only": ["engine", "peft"],
        "precision": ["fp32"],
        "tokens": 8,
        "prefill": 16,
        "runs": 2,
        "batches": ["1 adapter", "8 mixed"],
    }
    result = peers_decode.measure(argparse.Namespace(**options), files)
    assert [one["name"] for one in result["results"]] == ["engine", "peft"], result["missing"]
    peers_decode.show(result)


def test_real_sizes_measures_a_process_and_its_files(tmp_path: Path) -> None:
    """A merge of a tiny checkpoint: memory of a process of its own, and the disk that its output takes."""
    script = Path(__file__).parents[1] / "benchmarks" / "real_sizes.py"
    command = [sys.executable, script, "--shape", "tiny", "--steps", "merge", "--work", tmp_path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    step = result["steps"]["merge"]
    assert 5 << 20 < step["anonymous"] < step["resident"] < 500 << 20
    assert 0.9 * result["base_bytes"] < step["bytes"] <= step["disk"] < 3 * result["base_bytes"]
    assert not (tmp_path / "merged").exists()
