"""The figures of a demo run that come first: quality, agreement, size, time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..io.readable import number, percent, seconds, size
from . import result as r
from .result import Result


class Card(NamedTuple):
    """One key figure: what it is, its value, and half a sentence that puts it in place."""

    label: str
    value: str
    note: str = ""


def key_figures(result: Result) -> list[Card]:
    """The cards of a run, of either variant; those without figures are left out.

    Example:
        >>> [card.value for card in key_figures({"timings": {"fetch": 1.0, "train": 30.0}})]
        ['31.0 s']
    """
    return [*_quality(result), *_agreement(result), *_speed(result), *_size(result), *_time(result)]


def _quality(result: Result) -> Iterator[Card]:
    for name, values in r.accuracy(result).items():
        if "torch" in values:
            yield Card(
                f"accuracy, {name}",
                percent(values["torch"]),
                f"chance {percent(values['chance'])}" if "chance" in values else "",
            )
    for key, label in r.ANSWERS.items():
        answers = r.part(result, key)
        if number(answers.get("after")) is not None:
            yield Card(
                label, percent(answers["after"]), f"{percent(answers.get('before'))} without the adapter"
            )


def _agreement(result: Result) -> Iterator[Card]:
    agreement = number(result.get("token_agreement"))
    if agreement is not None:
        compared = number(result.get("tokens_compared"))
        yield Card(
            "same tokens as PyTorch",
            percent(agreement),
            f"{compared:,.0f} tokens compared" if compared else "",
        )
    equal = result.get("mixed_batch_equal")
    if isinstance(equal, bool):
        same = (
            ("equal", "to the rows run one adapter at a time")
            if equal
            else ("differs", "from the rows run one adapter at a time")
        )
        yield Card("mixed batch", *same)


def _speed(result: Result) -> Iterator[Card]:
    speed = number(r.part(result, "speed", "onnx").get("tokens_per_second"))
    if speed is not None:
        ratio = number(r.part(result, "speed").get("ratio"))
        yield Card(
            "tokens per second",
            f"{speed:.1f}",
            "with ONNX Runtime" + (f", {ratio:.2f} times PyTorch" if ratio else ""),
        )


def _size(result: Result) -> Iterator[Card]:
    sizes = r.measured(r.part(result, "sizes"))
    pack = next((value for name, value in sizes.items() if name.startswith("pack ")), None)
    base = sizes.get("base checkpoint") or number(r.part(result, "model").get("bytes"))
    if pack:
        yield Card("one adapter pack", size(pack), f"{percent(pack / base)} of the model" if base else "")


def _time(result: Result) -> Iterator[Card]:
    times = r.measured(r.part(result, "timings"))
    if times:
        yield Card("whole run", seconds(sum(times.values())), f"{len(times)} stages")
