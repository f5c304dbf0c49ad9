"""A server with very many adapters: when it takes requests, when it first answers, what its memory holds, and
what loading one more costs while rows run.

`adapterpack serve` is started on a folder of so many packs (2 MB each with SmolLM2), beside the same server
without any. ``used`` is after each adapter has answered once. Memory is that of all processes of the server,
less that of the server without adapters, also in proportion to the files of the packs. Then an engine alone
loads PEFT folders of 20 MB, without rows and while four rows run: processor time of a load, and the longest
time between two tokens of the rows.

    python benchmarks/thousand_adapters.py --files files --adapters 100 1000
    python benchmarks/thousand_adapters.py --size tiny --adapters 20 --json
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from clients import Request, answered, openai
from comparison import parser_of, report
from contestant_files import Files
from contestants import CONTESTANTS, CONTEXT, ROWS, THREADS, memory_mb, running

from adapterpack.manifest.manifest import FILE_NAME
from adapterpack.runtime.engine.engine import DecoderEngine

PROMPT = list(range(100, 108))


def served(files: Files, packs: list[Path]) -> dict[str, Any]:
    """The figures of one server, started with a folder of these packs."""
    folder = files.folder / f"folder-{len(packs)}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for pack in packs:
        (folder / pack.name).symlink_to(pack)
    ours = next(one for one in CONTESTANTS if one.name == "ours")

    async def first_token(port: int, name: str | None) -> float:
        answer = await answered(port, *openai(Request(name, PROMPT, 1)))
        return answer.first - answer.sent

    async def all_once(port: int) -> list[float]:
        return [await first_token(port, pack.name) for pack in packs]

    started = time.perf_counter()
    with running(ours, files, [folder] if packs else [], None) as (port, session):
        result = {"adapters": len(packs), "ready_s": time.perf_counter() - started}
        asyncio.run(first_token(port, packs[-1].name if packs else None))
        result |= {"first_answer_s": time.perf_counter() - started, "ready_mb": memory_mb(session)}
        if packs:
            times = asyncio.run(all_once(port))
            result |= {"cold_ms": 1e3 * median(times), "used_mb": memory_mb(session)}
    return result


def hot_loads(bundle: Path, folders: list[Path]) -> dict[str, Any]:
    """Loads each of these folders into an engine, first without rows and then while four rows run."""
    engine = DecoderEngine(bundle, "cpu", threads=THREADS, max_rows=ROWS, max_length=CONTEXT)
    cpu, wall = list[float](), list[float]()
    for number, folder in enumerate(folders):
        start = time.process_time(), time.perf_counter()
        engine.adapters.load(folder, f"quiet{number}")
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    for _ in range(4):
        engine.add(PROMPT, "quiet0", max_new_tokens=900, min_new_tokens=900, ignore_eos=True)
    for _ in range(8):
        engine.step()

    def load() -> None:
        for number, folder in enumerate(folders):
            engine.adapters.load(folder, f"busy{number}")

    def gaps(enough: Any) -> list[float]:
        found, before = list[float](), time.perf_counter()
        while not enough(len(found)):
            engine.step()
            now = time.perf_counter()
            found.append(now - before)
            before = now
        return found

    alone = gaps(lambda steps: steps == 100)
    loading = threading.Thread(target=load)
    loading.start()
    during = gaps(lambda steps: not loading.is_alive() and steps)
    return {
        "bytes": sum(file.stat().st_size for file in folders[0].iterdir()),
        "cpu_ms": [round(1e3 * one) for one in cpu],
        "wall_ms": [round(1e3 * one) for one in wall],
        "step_ms": 1e3 * median(alone),
        "longest_step_ms": 1e3 * max(alone),
        "step_while_loading_ms": 1e3 * median(during),
        "longest_step_while_loading_ms": 1e3 * max(during),
    }


def measure(args: Any, files: Files) -> dict[str, Any]:
    precision, results = args.precision[0], []
    none = served(files, [])
    for count in args.adapters:
        packs = files.adapters("small", count)
        size = sum(file.stat().st_size for pack in packs for file in pack.iterdir())
        one = served(files, packs)
        for when in ("ready", "used"):
            more = one[f"{when}_mb"] - none["ready_mb"]
            one |= {f"{when}_more_mb": more, f"{when}_over_files": (more << 20) / size}
        results.append(one | {"files_mb": size >> 20})
    folders = []
    for pack in files.adapters("large", args.loads):
        folders.append(files.folder / f"peft-{pack.name}")
        shutil.copytree(pack, folders[-1], ignore=shutil.ignore_patterns(FILE_NAME), dirs_exist_ok=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        loads = pool.submit(hot_loads, files.bundle(precision), folders).result()
    return {"benchmark": "thousand_adapters", "none": none, "served": results, "hot_loads": loads}


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    for one in [result["none"], *result["served"]]:
        line = f"{one['adapters']:5} adapters: ready {one['ready_s']:.2f} s, answers {one['first_answer_s']:.2f} s, "
        line += f"{one['ready_mb']} MB"
        if "used_mb" in one:
            line += (
                f" (+{one['ready_more_mb']}, {one['ready_over_files']:.2f} of their files' {one['files_mb']} MB); "
                f"used +{one['used_more_mb']} MB ({one['used_over_files']:.2f}), cold {one['cold_ms']:.0f} ms"
            )
        print(line)
    loads = result["hot_loads"]
    print(
        f"a folder of {loads['bytes'] / 1e6:.0f} MB: {loads['cpu_ms']} ms of processor, {loads['wall_ms']} ms; "
        f"a step {loads['step_ms']:.0f} ms, longest {loads['longest_step_ms']:.0f}; while loading "
        f"{loads['step_while_loading_ms']:.0f}, longest {loads['longest_step_while_loading_ms']:.0f}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1000])
    parser.add_argument("--loads", type=int, default=4, help="folders that the engine loads")
    report(parser.parse_args(), measure, show)


if __name__ == "__main__":
    main()
