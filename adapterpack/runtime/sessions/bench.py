"""Measures how fast a bundle answers on this machine, by rows and adapters, beside the floor that its memory
sets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import cpu_count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import DECODER, graph_file
from ...errors import ConfigError
from ...io import Json, Say
from ...notebook import Shown
from ...pack import Pack
from ...paths import StrPath
from ...readable import things
from ...sandbox.limits import peak_memory
from ..engine import Engine
from ..open_bundle import OpenBundle
from ..providers import Device
from ..text import context_of

MIXED = "mixed"
_LEAST_ID, _IDS = 5, 90
"""The token ids of prompts: any vocabulary has them, and the speed is that of others."""
_COPIED = 256 << 20


@dataclass(frozen=True)
class BenchLine:
    """The speed of one load.

    Args:
        rows: how many requests ran together.
        adapters: ``base``, the name of the adapter of all rows, or ``mixed``: another one for each row.
        first_token: seconds until the first token, or the answer of a task without tokens: the median of
            rows.
        prompt_speed: tokens of prompts read each second.
        speed: new tokens each second, after the first of each row; None for a task without tokens.
        step: seconds of a step, which gives a token to each row.
    """

    rows: int
    adapters: str
    first_token: float
    prompt_speed: float
    speed: float | None
    step: float | None


@dataclass(frozen=True)
class Bench(Shown):
    """What :func:`bench` measured.

    Args:
        lines: the speed of each load.
        prompt, tokens: the tokens of each prompt, and how many are generated.
        weights: bytes of the graph's weights, all of which a step may read.
        bandwidth: bytes that this machine's memory moves each second, measured by copying.
        memory: the most bytes of memory that the process had; None where the system does not say.
    """

    lines: Sequence[BenchLine]
    prompt: int
    tokens: int
    weights: int
    bandwidth: float
    memory: int | None

    def __repr__(self) -> str:
        best = max(line.speed or line.prompt_speed for line in self.lines)
        return f"<Bench: up to {best:,.0f} tokens a second>"

    @property
    def floor(self) -> float:
        """Seconds in which the weights pass through memory once: no step that reads all of them is faster."""
        return self.weights / self.bandwidth

    def to_json(self) -> Json:
        """Returns everything as JSON values."""
        return {**asdict(self), "lines": [asdict(line) for line in self.lines], "floor": self.floor}


def bench(
    bundle: StrPath,
    packs: Sequence[Pack | StrPath] = (),
    *,
    rows: Sequence[int] = (1, 4, 8),
    prompt: int = 128,
    tokens: int = 32,
    runs: int = 5,
    provider: str | Device | None = None,
    progress: Say | None = None,
) -> Bench:
    """Measures how fast a bundle answers: for each number of rows the base, one adapter, and a different one
    in each row, in turn; each figure is the median of several runs after a warm-up.

    ``runs`` are counted without the warm-up. ``packs`` are loaded besides the bundle's adapters, whose names
    may stand among them, and prompts are random token ids.

    Raises:
        ConfigError: a number is out of range, or the rows of the task are not texts.
        Unsupported: the bundle has no graph for the engine.

    Example:
        >>> bench("bundle").lines[0].speed  # doctest: +SKIP
        71.4
    """
    if min(*rows, prompt, tokens, runs) < 1:
        raise ConfigError(
            "a number of a benchmark is at least 1",
            found=f"rows {rows}, prompt {prompt}, tokens {tokens}, runs {runs}",
        )
    opened = OpenBundle.of(bundle, provider, None, "cached")
    if "input_ids" not in opened.task.inputs:
        raise ConfigError(
            "the rows of this task are no texts, and texts are what is measured", found=opened.task.name
        )
    context = context_of(opened)
    if context is not None and prompt + tokens > context:
        raise ConfigError(
            "the rows are longer than the model can read",
            expected=f"at most {context} tokens",
            found=f"{prompt} + {tokens}",
        )
    longest: dict[str, Any] = {"max_length": prompt + tokens + 1} if opened.bundle.decoder else {}
    engine = Engine(opened, max_rows=max(rows), **longest)
    held = opened.adapters
    names = [*held, *(engine.adapters.load(pack) for pack in packs if pack not in held)]
    loads = [(count, name, mix) for count in rows for name, mix in _mixes(names, count)]
    measured: dict[int, list[tuple[float, ...]]] = {number: [] for number in range(len(loads))}
    random = np.random.default_rng(0)
    for run in range(runs + 1):
        for number, (count, name, mix) in enumerate(loads):
            if progress is not None:
                progress(f"run {run} of {runs}: {things(count, 'row')}, {name}")
            prompts = random.integers(_LEAST_ID, _IDS, (count, prompt)).tolist()
            figures = _run(engine, prompts, mix, tokens)
            if run:  # the first warms up
                measured[number].append(figures)
    lines = []
    for number, (count, name, _) in enumerate(loads):
        first, read, step = map(median, zip(*measured[number], strict=True))
        decodes = opened.task.generates and tokens > 1
        lines.append(
            BenchLine(
                count,
                name,
                first,
                count * prompt / read,
                count / step if decodes else None,
                step if decodes else None,
            )
        )
    parts = [DECODER] if opened.bundle.decoder else opened.bundle.parts
    return Bench(
        lines,
        prompt,
        tokens,
        sum(_weights(opened.folder / graph_file(part)) for part in parts),
        _bandwidth(),
        peak_memory(),
    )


def _weights(path: Path) -> int:
    """Returns the bytes of a graph's constants; tensors on the same bytes of a file count once."""
    values = (value for graph in ir.load(path).graphs() for value in graph.initializers.values())
    tensors = (value.const_value for value in values if value.const_value is not None)
    return sum({getattr(one, "offset", one.name): one.nbytes for one in tensors}.values())


def _mixes(names: Sequence[str], rows: int) -> list[tuple[str, list[str | None]]]:
    """Returns the loads with so many rows: name -> the adapter of each row."""
    mixes: list[tuple[str, list[str | None]]] = [("base", [None] * rows)]
    if names:
        mixes.append((names[0], [names[0]] * rows))
    if len(names) > 1 and rows > 1:
        mixes.append((MIXED, [names[number % len(names)] for number in range(rows)]))
    return mixes


def _run(
    engine: Engine, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], tokens: int
) -> tuple[float, float, float]:
    """Returns seconds: until the first token, as the median of rows, until all have one, and of a step after
    that.
    """
    options = {"max_new_tokens": tokens, "ignore_eos": True} if engine.bundle.task.generates else {}
    began = time.perf_counter()
    first = dict[int, float]()
    end = 0.0
    for ids, adapter in zip(prompts, adapters, strict=True):
        engine.add(ids, adapter, **options)
    while engine.busy:
        events = engine.step()
        end = time.perf_counter()
        for event in events:
            if event.error is not None:
                raise event.error
            first.setdefault(event.request, end - began)
    read = max(first.values())
    return median(first.values()), read, (end - began - read) / max(tokens - 1, 1)


def _bandwidth() -> float:
    """Returns the bytes that memory moves each second: read and written by copies on all cores."""
    cores = cpu_count() or 1
    source = np.ones((cores, _COPIED // cores), np.uint8)
    target = np.empty_like(source)
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(6):
            began = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds)
