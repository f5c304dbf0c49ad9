"""Clients of a server of texts: a closed loop, in which each sends its next request when the last one has
been answered, and an open one.

One process without a library: a connection for each request, whose events are read line by line. What the
clients themselves cost is in the results, since they share the machine with the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Request:
    """One request: its adapter (None: the base), prompt, tokens of its answer, and in an open loop the second
    in which it is sent.
    """

    adapter: str | None
    prompt: list[int]
    tokens: int
    at: float = 0.0


@dataclass(frozen=True)
class Answer:
    """When a request was sent, and when its first and its last token came."""

    sent: float
    first: float
    last: float
    tokens: int


Form = Callable[[Request], tuple[str, Any]]
"""The path and the body of a request, as one kind of server takes it."""


def requests(
    names: Sequence[str | None],
    count: int,
    clients: int,
    *,
    prompt: int = 64,
    tokens: int = 64,
    seed: int = 0,
    mixed: bool = False,
    rate: float = 0.0,
    vocabulary: int = 40_000,
) -> list[Request]:
    """Random prompts. Up to ``clients`` adapters are named in turn, so that each client has another; more of
    them by Zipf's law. With ``mixed`` prompts and answers have from a quarter to seven quarters of their
    lengths, and with ``rate`` so many requests are sent a second, at random.
    """
    rng, weights = np.random.default_rng(seed), 1 / np.arange(1, len(names) + 1)
    places = (
        [number % len(names) for number in range(count)]
        if len(names) <= clients
        else rng.choice(len(names), count, p=weights / weights.sum()).tolist()
    )
    times = np.cumsum(rng.exponential(1 / rate, count)) if rate else np.zeros(count)
    result = []
    for place, at in zip(places, times, strict=True):
        long, wide = (
            max(1, int(size * (rng.uniform(0.25, 1.75) if mixed else 1))) for size in (prompt, tokens)
        )
        result.append(
            Request(names[place], rng.integers(vocabulary // 40, vocabulary, long).tolist(), wide, float(at))
        )
    return result


def openai(request: Request) -> tuple[str, Any]:
    """As OpenAI's servers of texts take it, with vLLM's fields for an answer that has all its tokens.
    ``base`` is the base's name.
    """
    return "/v1/completions", {
        "model": request.adapter or "base",
        "prompt": request.prompt,
        "max_tokens": request.tokens,
        "min_tokens": request.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


async def answered(port: int, path: str, body: Any, tokens: int = 1) -> Answer:
    """Sends a request and reads its answer, a stream of events."""
    data = json.dumps(body).encode()
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: "
            "application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{path}: {(status + await reader.read(2000)).decode(errors='replace')}")
        first = last = 0.0
        async for line in reader:
            if line.startswith(b"data: {"):
                if line.startswith((b'data: {"error"', b'data: {"code"')):
                    raise RuntimeError(f"{path}: {line.decode(errors='replace')}")
                last = time.perf_counter()
                first = first or last
            elif line.startswith(b"data: [DONE]"):
                break
        if not first:
            raise RuntimeError(f"{path}: an answer without a token")
        return Answer(sent, first, last, tokens)
    finally:
        writer.close()


async def closed_loop(
    port: int, form: Form, wanted: Sequence[Request], clients: int, seconds: float
) -> list[Answer]:
    """So many clients send requests one after the other for so many seconds, and each of them one at
    least.
    """
    left, start, answers = iter(wanted), time.perf_counter(), list[Answer]()

    async def client() -> None:
        for request in left:
            answers.append(await answered(port, *form(request), request.tokens))
            if time.perf_counter() - start > seconds:
                return

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(port: int, form: Form, wanted: Sequence[Request], patience: float) -> list[Answer]:
    """Requests are sent at their times, whatever has been answered. Those that have no whole answer
    ``patience`` seconds after the last one was sent are given up.
    """
    start = time.perf_counter()

    async def send(request: Request) -> Answer:
        await asyncio.sleep(request.at - (time.perf_counter() - start))
        return await answered(port, *form(request), request.tokens)

    tasks = [asyncio.create_task(send(request)) for request in wanted]
    done, late = await asyncio.wait(tasks, timeout=wanted[-1].at + patience)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [task.result() for task in done]


def summary(answers: Sequence[Answer], cpu: float | None = None) -> dict[str, Any]:
    """Tokens a second and percentiles in milliseconds; ``cpu`` are the processor's seconds that the clients
    took.
    """
    if not answers:
        return {"answers": 0, "tokens_per_second": 0.0}
    span = max(one.last for one in answers) - min(one.sent for one in answers)
    result = {
        "answers": len(answers),
        "tokens_per_second": round(sum(one.tokens for one in answers) / span, 1),
        "first_token_ms": _percentiles([one.first - one.sent for one in answers]),
        "token_ms": _percentiles(
            [(one.last - one.first) / (one.tokens - 1) for one in answers if one.tokens > 1]
        ),
        "request_ms": _percentiles([one.last - one.sent for one in answers]),
    }
    return result if cpu is None else {**result, "clients_cpu": round(cpu / span, 3)}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return (
        {f"p{share}": round(1e3 * float(np.percentile(values, share)), 1) for share in (50, 95, 99)}
        if values
        else {}
    )
