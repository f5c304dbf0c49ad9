"""The page that ``adapterpack demo`` writes: what each part of ``templates/demo.html.jinja`` shows of a
run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ..io.readable import MISSING, count, number, percent, size
from . import result as r
from .key_figures import key_figures
from .rendering import render
from .result import Result
from .svg import Bar, Group, Reference, grouped_bars, size_bars, time_bars

_SHARES = ((0.0, "0 %"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1.0, "100 %"))
Part = Mapping[str, Any]
"""What a part of the page shows, by the names in the template; empty where the result lacks it."""


def demo_report(result: Result) -> str:
    """The result of a demo run, of either variant, as one self-contained HTML page; parts that the result
    lacks are left out.

    Example:
        >>> "88.0 %" in demo_report({"accuracy": {"tickets": {"chance": 0.167, "torch": 0.88}}})
        True
    """
    return render(
        "demo.html.jinja",
        name=r.part(result, "model").get("name"),
        version=result.get("version"),
        steps=_steps(result),
        figures=key_figures(result),
        training=_training(result),
        quality=_quality(result),
        accuracy=_accuracy(result),
        examples=_examples(result),
        composition=_composition(result),
        parity=_parity(result),
        mixed=_mixed(result),
        served=_served(result),
        speed=_speed(result),
        sizes=_sizes(result),
        times=_times(result),
        commands=_commands(result),
    )


_DONE = {
    "compose": "composed two packs into one",
    "parity": "exported model and adapters to ONNX and compared every form with PyTorch",
    "mixed_batch_equal": "ran one batch whose rows use different adapters",
    "served": "served them over HTTP",
    "speed": "measured the speed",
}
"""Key of the result -> what the run then did, in the order of the sentence."""


def _steps(result: Result) -> str:
    """What the run did, as the rest of a sentence."""
    names = r.adapters(result)
    what = (
        f"{len(names)} adapters ({', '.join(names)})"
        if len(names) > 1
        else f"an adapter ({names[0]})"
        if names
        else "adapters"
    )
    *steps, last = [
        f"trained {what} for {_model(result)}",
        *(done for key, done in _DONE.items() if result.get(key) not in (None, {}, [])),
    ]
    return f"{', '.join(steps)}{',' if len(steps) > 1 else ''} and {last}" if steps else last


def _model(result: Result) -> str:
    model = r.part(result, "model")
    parameters, taken = number(model.get("parameters")), number(model.get("bytes"))
    facts = [
        f"{count(parameters)} parameters" if parameters else "",
        size(taken) if taken else "",
        f"from {model['source']}" if model.get("source") else "",
    ]
    listed = ", ".join(filter(None, facts))
    return str(model.get("name") or "a pretrained model") + (f" ({listed})" if listed else "")


def _training(result: Result) -> Part:
    columns, rows = r.training(result)
    return {"columns": columns, "rows": rows, "numbers": range(1, len(columns))} if rows else {}


def _quality(result: Result) -> Part:
    groups = []
    for key, label in r.ANSWERS.items():
        values = r.part(result, key)
        bars = [
            Bar(name, number(values.get(when)), percent(values.get(when)), shade)
            for when, name, shade in (("before", "without adapter", "c0"), ("after", "with adapter", "c1"))
            if when in values
        ]
        groups += [Group(label, bars)] if bars else []
    if not groups:
        return {}
    return {
        "tested": number(r.part(result, "exact_match").get("n")),
        "chart": grouped_bars("Answers without and with the adapter", groups, maximum=1.0, ticks=_SHARES),
    }


def _accuracy(result: Result) -> Part:
    tasks = r.accuracy(result)
    if not tasks:
        return {}
    groups = [
        Group(
            name,
            [
                Bar(r.spoken(form), value, percent(value), r.tone(form))
                for form, value in values.items()
                if form != "chance"
            ],
            Reference(f"chance {percent(values['chance'])}", values["chance"])
            if "chance" in values
            else None,
        )
        for name, values in tasks.items()
    ]
    drops = [
        (values["torch"] - value, form, name)
        for name, values in tasks.items()
        if "torch" in values
        for form, value in values.items()
        if form.startswith(("onnx", "merged"))
    ]
    drop, form, task = max(drops, default=(None, "", ""))
    return {
        "drop": drop,
        "form": r.spoken(form),
        "task": task,
        "chart": grouped_bars("Accuracy of every form of every adapter", groups, maximum=1.0, ticks=_SHARES),
    }


def _examples(result: Result) -> list[list[tuple[str, str]]]:
    names = {"prompt": "prompt", "expected": "expected", "base": "without adapter", "adapter": "with adapter"}
    return [
        [(label, str(example[key])) for key, label in names.items() if example.get(key) is not None]
        for example in r.listed(result, "examples")
    ]


def _composition(result: Result) -> Part:
    values = r.part(result, "compose")
    bars = [
        Bar(r.spoken(key), value, percent(value), r.tone(key))
        for key, value in r.measured(values).items()
        if key in r.FORMS
    ]
    if not bars:
        return {}
    exact = values.get("exact")
    return {
        "rank": number(values.get("rank")),
        "exact": exact if isinstance(exact, bool) else None,
        "chart": grouped_bars("Accuracy of composed adapters", [Group("", bars)], maximum=1.0, ticks=_SHARES),
    }


_MEANING = {
    "max abs": "max abs: the largest difference between any two raw scores (logits)",
    "label agreement": "label agreement: the share of test rows that get the same label from both",
    "token agreement": "token agreement: the share of generated tokens that are the same in both",
}


def _parity(result: Result) -> Part:
    columns, rows = r.parity(result)
    return (
        {
            "columns": columns,
            "rows": rows,
            "numbers": range(1, len(columns)),
            "same": number(result.get("token_agreement")),
            "compared": number(result.get("tokens_compared")),
            "meaning": "; ".join(_MEANING[column] for column in columns[1:]).capitalize() + ".",
        }
        if rows
        else {}
    )


def _mixed(result: Result) -> Part:
    columns, rows = r.mixed(result)
    equal = result.get("mixed_batch_equal")
    if not rows and not isinstance(equal, bool):
        return {}
    unlabelled = "label" in columns and any(MISSING in row for row in rows)
    return {
        "columns": columns,
        "rows": rows,
        "numbers": [index for index, column in enumerate(columns) if column == "score"],
        "equal": equal,
        "difference": number(r.part(result, "mixed_batch").get("max_abs")),
        "note": f"{MISSING}: the model alone has no trained head for this task." if unlabelled else "",
    }


def _served(result: Result) -> Part:
    columns, rows = r.served(result)
    return (
        {"columns": columns, "rows": rows, "client": r.part(result, "served").get("client")} if rows else {}
    )


def _speed(result: Result) -> Part:
    speeds = {key: number(r.part(result, "speed", key).get("tokens_per_second")) for key in ("onnx", "torch")}
    entries = {key: speed for key, speed in speeds.items() if speed is not None}
    if not entries:
        return {}
    bars = [Bar(r.spoken(key), value, f"{value:.1f}", r.tone(key)) for key, value in entries.items()]
    return {
        "batch": number(r.part(result, "speed", "onnx").get("batch")),
        "ratio": number(r.part(result, "speed").get("ratio")),
        "chart": grouped_bars("Tokens per second", [Group("", bars)], maximum=max(entries.values())),
    }


def _sizes(result: Result) -> Part:
    sizes = r.measured(r.part(result, "sizes"))
    if not sizes:
        return {}
    kinds = {"pack": "c1", "bundle": "c2", "merged": "c3"}
    chart = size_bars(
        "Size on disk", list(sizes.items()), tones=[kinds.get(name.partition(" ")[0], "c0") for name in sizes]
    )
    return {"chart": chart, "logarithmic": "(logarithmic scale)" in chart}


def _times(result: Result) -> Part:
    times = r.measured(r.part(result, "timings"))
    return (
        {
            "total": sum(times.values()),
            "chart": time_bars(
                "Time of each stage", [(name.replace("_", " "), value) for name, value in times.items()]
            ),
        }
        if times
        else {}
    )


def _commands(result: Result) -> list[str]:
    """The commands that come next; ``paths`` of the result says where things lie, else the usual places under
    ``output``.
    """
    output, names = result.get("output"), r.adapters(result)
    if not output or not names:
        return []
    paths = r.part(result, "paths")
    pack, bundle = paths.get("pack", f"{output}/packs/{names[0]}"), paths.get("bundle", f"{output}/bundle")
    rows = [*r.listed(r.part(result, "mixed_batch"), "rows"), *r.listed(result, "examples")]
    prompts = [
        text
        for row in rows
        for key in ("text", "prompt")
        if isinstance(text := row.get(key), str) and text.isprintable()
    ]
    prompt = next((text for text in prompts if len(text) <= 100), "Where is my parcel?")
    lines = [
        ("validate", pack),
        ("inspect", bundle),
        ("run", bundle, "--adapter", names[0], "--prompt", prompt),
    ]
    return ["adapterpack " + shlex.join(map(str, words)) for words in lines]
