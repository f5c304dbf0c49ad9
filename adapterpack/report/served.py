"""The page of a benchmark of servers: what ``benchmarks/serve.py`` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..io.readable import MISSING, number, percent, seconds, size
from .rendering import render
from .svg import Bar, Group, grouped_bars, steps_below

_LOOPS = {"closed": "", "engine": ", engine alone", "open": ", at a given rate"}
_WAITS = {
    "first_token_ms": "the first token",
    "token_ms": "each further token",
    "request_ms": "the whole answer",
}


def served_report(result: Mapping[str, Any]) -> str:
    """The result of a benchmark of servers as one self-contained HTML page.

    Example:
        >>> one = {"name": "ours", "precision": "fp32", "adapters": 8, "closed": {"answers": 9,
        ...     "tokens_per_second": 50.0}}
        >>> "50.0" in served_report({"clients": 8, "prompt_tokens": 64, "answer_tokens": 64,
        ...     "results": [one]})
        True
    """
    results = result["results"]
    return render(
        "served.html.jinja",
        setting=(
            f"{result['clients']} clients, prompts of {result['prompt_tokens']} tokens, answers of "
            f"{result['answer_tokens']}."
        ),
        speed=_speed(results) if results else None,
        waits=[row for one in results for row in _waits(one)],
        costs=[
            [
                _called(one),
                size(1e6 * megabytes) if (megabytes := number(one.get("memory_mb"))) is not None else MISSING,
                seconds(one.get("start_seconds")),
                percent(one.get("http_costs")),
            ]
            for one in results
        ],
        ratios=[
            [one["of"], one["over"], f"{one['tokens_per_second']:.2f} times"]
            for one in result.get("ratios", ())
        ],
        missing=list(result.get("missing", ())),
    )


def _called(one: Mapping[str, Any]) -> str:
    return f"{one['name']} {one['precision']}, {_adapters(one['adapters'])}"


def _adapters(count: int) -> str:
    return f"{count:,} adapter{'' if count == 1 else 's'}"


def _speed(results: Any) -> Any:
    groups: dict[int, list[Bar]] = {}
    for one in results:
        for loop, about in (("closed", ""), ("engine", ", engine")):
            if (speed := number((one.get(loop) or {}).get("tokens_per_second"))) is not None:
                bar = Bar(
                    f"{one['name']} {one['precision']}{about}",
                    speed,
                    f"{speed:.1f}",
                    "c1" if one["name"] == "ours" else "c0",
                )
                groups.setdefault(one["adapters"], []).append(bar)
    most = max((bar.value or 0.0 for bars in groups.values() for bar in bars), default=0.0)
    return grouped_bars(
        "Tokens per second",
        [Group(_adapters(count), bars) for count, bars in sorted(groups.items())],
        maximum=most,
        ticks=[(value, f"{value:g}") for value in steps_below(most)],
    )


def _waits(one: Mapping[str, Any]) -> Iterator[list[str]]:
    for loop, about in _LOOPS.items():
        figures = one.get(loop) or {}
        for key, what in _WAITS.items():
            if spread := figures.get(key):
                yield [
                    _called(one) + about,
                    f"{figures['answers']:,}",
                    what,
                    *(f"{value:,.0f}" for value in spread.values()),
                ]
