"""What HTTP costs over the bare engine, and what clients of a server see: a closed loop of clients over several adapters.

Every client sends its next request when the last token of the one before has come; who asks for which adapter follows Zipf's law. The same
requests then go to an engine in this process, as many at a time. Prompts are random token ids and every answer has all its tokens, so
both do the same work. Rounds of server and engine are run in turn, and the best of each counts, since clients, server and engine
share the machine; percentiles are those of all rounds.

    python benchmarks/serve.py                                  # SmolLM2-135M, 8 clients, 8 adapters, 64 + 64 tokens
    python benchmarks/serve.py --clients 4 --adapters 32 --quantize int8 --json
    python benchmarks/serve.py --bundle bundle --rounds 1       # one that was exported with --static-cache
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from decode import build_pack

from adapterpack.demos.models import SMOLLM2, fetch
from adapterpack.exporting.pipeline import export
from adapterpack.runtime.engine.engine import DecoderEngine

Asked = tuple[str, list[int]]


def requests(names: list[str], count: int, prompt: int, seed: int) -> list[Asked]:
    """Adapter and prompt of each request; the adapters by Zipf's law."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(names) + 1)
    chosen = rng.choice(len(names), count, p=weights / weights.sum())
    return [(names[number], [int(token) for token in rng.integers(1000, 40_000, prompt)]) for number in chosen]


async def client(address: str, asked: list[Asked], tokens: int, times: list[list[float]]) -> None:
    """Sends requests one after the other until none is left; ``times`` gets the start and the time of each token."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while asked:
        name, prompt = asked.pop()
        body = json.dumps({"model": name, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0, "stream": True,
                           "logprobs": 0, "ignore_eos": True}).encode()
        seen = [time.perf_counter()]
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                seen.append(time.perf_counter())
            elif line.startswith(b"data: [DONE]"):
                await reader.readuntil(b"0\r\n\r\n")
                break
            elif line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise RuntimeError(line)
        times.append(seen)
    writer.close()


async def loop(address: str, asked: list[Asked], clients: int, tokens: int) -> tuple[float, list[list[float]]]:
    """Seconds of all requests, and the times of their tokens."""
    left, times, start = list(reversed(asked)), list[list[float]](), time.perf_counter()
    await asyncio.gather(*(client(address, left, tokens, times) for _ in range(clients)))
    return time.perf_counter() - start, times


def bare(engine: DecoderEngine, asked: list[Asked], clients: int, tokens: int) -> float:
    """Seconds of the same requests on an engine, as many at a time."""
    left, running, start = list(reversed(asked)), 0, time.perf_counter()
    while left or running:
        while left and running < clients:
            name, prompt = left.pop()
            engine.add(prompt, name, max_new_tokens=tokens, min_new_tokens=tokens, logprobs=0, ignore_eos=True)
            running += 1
        running -= sum(event.finish_reason is not None for event in engine.step())
    return time.perf_counter() - start


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{share}": round(1e3 * float(np.percentile(values, share)), 2) for share in (50, 95, 99)}


def measure(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    options = ["--port", "0", "--json", "--audit", "", "--provider", "cpu", "--max-rows", str(args.clients)]
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    engine = DecoderEngine(bundle, "cpu", max_rows=args.clients, threads=args.threads)
    served, alone, times = list[float](), list[float](), list[list[float]]()
    command = [sys.executable, "-m", "adapterpack", "serve", str(bundle), *options, *threads]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        for number in range(args.rounds + 1):  # the first one warms up
            asked = requests(engine.adapters.names, args.requests if number else args.clients, args.prompt, number)
            seconds, some = asyncio.run(loop(address, asked, args.clients, args.tokens))
            other = bare(engine, asked, args.clients, args.tokens)
            if number:
                served.append(seconds)
                alone.append(other)
                times += some
        process.terminate()
    total = args.requests * args.tokens
    return {
        "clients": args.clients, "adapters": len(engine.adapters.names), "prompt_tokens": args.prompt, "answer_tokens": args.tokens,
        "server_tokens_per_second": round(total / min(served), 1), "engine_tokens_per_second": round(total / min(alone), 1),
        "http_costs": round(min(served) / min(alone) - 1, 3),
        "first_token_ms": percentiles([one[1] - one[0] for one in times]),
        "token_ms": percentiles([(one[-1] - one[1]) / max(args.tokens - 1, 1) for one in times]),
        "request_ms": percentiles([one[-1] - one[0] for one in times]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle in place of SmolLM2-135M with random adapters")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = args.bundle
        if bundle is None:
            base, packs = fetch(SMOLLM2), [Path(scratch) / f"pack{number}" for number in range(args.adapters)]
            for seed, pack in enumerate(packs):
                build_pack(base, pack, args.rank, seed)
            bundle = Path(scratch) / "bundle"
            export(base, packs, bundle, mode="bank", in_place=True, quantize=args.quantize)
        result = measure(bundle, args)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name.replace('_', ' '):26} {value}")


if __name__ == "__main__":
    main()
