"""The page of a benchmark of servers: what ``benchmarks/serve.py`` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterpack.readable import MISSING, number, percent, seconds, size
from adapterpack.report.page import page_environment

_LOOPS = {"closed": "", "engine": ", engine alone", "open": ", at a given rate"}
_WAITS = {
    "first_token_ms": "the first token",
    "later_first_token_ms": "the first token, two seconds after the start",
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
    template = page_environment().from_string(
        Path(__file__).with_name("served.html.jinja").read_text("utf-8")
    )
    return template.render(
        setting=(
            f"{result['clients']} clients, prompts of {result['prompt_tokens']} tokens, answers of "
            f"{result['answer_tokens']}."
        ),
        speeds=[
            [_called(one) + about, f"{speed:.1f}"]
            for one in results
            for loop, about in _LOOPS.items()
            if loop != "open"
            and (speed := number((one.get(loop) or {}).get("tokens_per_second"))) is not None
        ],
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
