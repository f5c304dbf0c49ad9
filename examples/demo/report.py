"""The page and the tables of ``adapterpack demo``: prepares the data of each part of
``templates/demo.html.jinja``. Omits whatever the result lacks, so that it can report a partial run.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from adapterpack.readable import MISSING, count, number, percent, seconds, size, small
from adapterpack.report.page import Card, render

Result = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]
"""Column names and rows."""
Fields = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Key of a row -> column name and format, in the order of the columns."""

_FORMS = {
    "base_untrained_head": "untrained head",
    "torch": "PyTorch",
    "merged": "merged",
    "onnx_fp32": "ONNX fp32",
    "onnx_int8": "ONNX int8",
    "onnx_int4": "ONNX int4",
    "onnx": "ONNX Runtime",
    "average": "their average",
    "both_halves": "trained on both",
}
"""Key in the result -> its name in text, if that is not the key itself in words."""
_COMPOSED = ("first_half", "second_half", "average", "both_halves")
_ANSWERS = {"exact_match": "exact match", "valid_json": "valid JSON"}
_PARITY: Fields = {
    "form": ("form", str),
    "max_abs": ("max abs", small),
    "label_agreement": ("label agreement", percent),
    "token_agreement": ("token agreement", percent),
}
_TRAINING: Fields = {
    "adapter": ("adapter", str),
    "rows": ("rows", count),
    "steps": ("steps", count),
    "trainable": ("trained parameters", count),
    "seconds": ("time", seconds),
}
_MIXED: Fields = {
    "text": ("text", str),
    "prompt": ("prompt", str),
    "adapter": ("adapter", str),
    "label": ("label", str),
    "completion": ("completion", str),
    "score": ("score", percent),
}
_SERVED: Fields = {
    "text": ("text", str),
    "adapter": ("adapter", str),
    "answer": ("answer", str),
    "digest": ("digest", lambda digest: str(digest).removeprefix("sha256:")[:12]),
}
_EXAMPLES = {
    "prompt": "prompt",
    "expected": "expected",
    "base": "without adapter",
    "adapter": "with adapter",
}
_DONE = {
    "compose": "composed two packs into one",
    "parity": "exported model and adapters to ONNX and compared every form with PyTorch",
    "mixed_batch_equal": "ran one batch whose rows use different adapters",
    "served": "served them over HTTP",
    "speed": "measured the speed",
}
"""Key of the result -> what the run did if it has that key, in the order of the sentence."""
_MEANING = {
    "max abs": "max abs: the largest difference between any two raw scores (logits)",
    "label agreement": "label agreement: the share of test rows that get the same label from both",
    "token agreement": "token agreement: the share of generated tokens that are the same in both",
}


def demo_report(result: Result) -> str:
    """Writes the result of a demo run, of either variant, as one self-contained HTML page.

    Example:
        >>> "88.0 %" in demo_report({"accuracy": {"tickets": {"chance": 0.167, "torch": 0.88}}})
        True
    """
    mixed, parity = _part(result, "mixed_batch"), _parity(result)
    return render(
        "demo.html.jinja",
        version=result.get("version"),
        name=_part(result, "model").get("name"),
        steps=_steps(result),
        cards=list(_cards(result)),
        training=_training(result),
        quality=_quality(result),
        tested=number(_part(result, "exact_match").get("n")),
        accuracy=_accuracy(result),
        drop=_drop(result),
        examples=[
            [(label, str(example[key])) for key, label in _EXAMPLES.items() if example.get(key) is not None]
            for example in _rows(result, "examples")
        ],
        composition=_composition(result),
        composed=_part(result, "compose"),
        rank=number(_part(result, "compose").get("rank")),
        parity=parity,
        same=number(result.get("token_agreement")),
        compared=number(result.get("tokens_compared")),
        meaning="; ".join(_MEANING[column] for column in parity[0] if column in _MEANING).capitalize(),
        equal=result.get("mixed_batch_equal"),
        mixed=_pick(_rows(mixed, "rows"), _MIXED),
        unlabelled=any(row.get("label") is None for row in _rows(mixed, "rows")),
        difference=number(mixed.get("max_abs")),
        served=_served(result),
        client=_part(result, "served").get("client"),
        speed=_speed(result),
        batch=number(_part(result, "speed", "onnx").get("batch")),
        ratio=number(_part(result, "speed").get("ratio")),
        sizes=_sizes(result),
        times=_times(result),
        commands=_commands(result),
    )


def demo_tables(result: Result) -> dict[str, Table]:
    """Makes the tables for a terminal, by their titles; those without figures are left out.

    Example:
        >>> demo_tables({"sizes": {"pack tickets": 1300000}})
        {'Sizes': (['artifact', 'on disk'], [['pack tickets', '1.30 MB']])}
    """
    columns, rows = _parity(result)
    agreement = number(result.get("token_agreement"))
    if agreement is not None:
        blank = [MISSING] * (len(columns) - 1)
        rows = [[*row, MISSING] for row in rows] + [["generated text", *blank, percent(agreement)]]
        columns = [*columns, "same tokens"]
    tables = {
        "Without and with the adapter": _quality(result),
        "Accuracy": _accuracy(result),
        "Parity with PyTorch": (columns, rows),
        "Speed": _speed(result),
        "Over HTTP": _served(result),
        "Sizes": _sizes(result),
        "Time": _times(result),
    }
    return {title: table for title, table in tables.items() if table[1]}


def _part(result: Result, *keys: str) -> Result:
    """Returns the mapping under ``keys``, or an empty one."""
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _rows(result: Result, key: str) -> list[Result]:
    """Returns the mappings in the list under ``key``."""
    value = result.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _numbers(values: Result) -> dict[str, float]:
    """Returns the numeric entries, in order."""
    return {str(key): figure for key, value in values.items() if (figure := number(value)) is not None}


def _spoken(key: str) -> str:
    return _FORMS.get(key, key.replace("_", " "))


def _pick(rows: Sequence[Result], fields: Fields) -> Table:
    """Builds a table of the fields that any row has; a row without an adapter ran on the base alone."""
    keys = [key for key in fields if any(key in row for row in rows)]
    absent = {"adapter": "none (base)"}
    return [fields[key][0] for key in keys], [
        [fields[key][1](row[key]) if row.get(key) is not None else absent.get(key, MISSING) for key in keys]
        for row in rows
    ]


def _training(result: Result) -> Table:
    """Builds a table with one row for each adapter; the result may hold the figures of a single adapter
    directly.
    """
    entries = _part(result, "training")
    named = {"": entries} if _numbers(entries) else entries
    return _pick(
        [{**row, "adapter": str(name)} for name, row in named.items() if isinstance(row, Mapping)], _TRAINING
    )


def _quality(result: Result) -> Table:
    answers = [(label, _part(result, key)) for key, label in _ANSWERS.items()]
    return ["measure", "without", "with"], [
        [label, percent(values.get("before")), percent(values.get("after"))]
        for label, values in answers
        if _numbers(values)
    ]


def _accuracies(result: Result) -> dict[str, dict[str, float]]:
    """Returns adapter -> form -> accuracy, for adapters with at least one figure."""
    entries = ((str(name), _part(result, "accuracy", name)) for name in _part(result, "accuracy"))
    return {name: values for name, entry in entries if (values := _numbers(entry))}


def _accuracy(result: Result) -> Table:
    tasks = _accuracies(result)
    forms = dict.fromkeys(form for values in tasks.values() for form in values)
    return ["form", *tasks], [
        [_spoken(form), *(percent(values.get(form)) for values in tasks.values())] for form in forms
    ]


def _drop(result: Result) -> tuple[float, str, str] | None:
    """Returns the largest loss of accuracy from PyTorch to another form, with the form and the adapter."""
    return max(
        (
            (values["torch"] - value, _spoken(form), name)
            for name, values in _accuracies(result).items()
            if "torch" in values
            for form, value in values.items()
            if form.startswith(("onnx", "merged"))
        ),
        default=None,
    )


def _composition(result: Result) -> Table:
    values = _numbers(_part(result, "compose"))
    return ["trained on", "accuracy"], [
        [_spoken(key), percent(values[key])] for key in _COMPOSED if key in values
    ]


def _parity(result: Result) -> Table:
    """Builds a table with one row for each form; the result may be nested by adapter or hold the forms
    directly.
    """

    def rows(values: Result, path: tuple[str, ...]) -> Iterator[Result]:
        if any(number(values.get(key)) is not None for key in _PARITY):
            yield {**values, "form": ", ".join(map(_spoken, path)) or "all"}
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from rows(value, (*path, str(key)))

    return _pick(list(rows(_part(result, "parity"), ())), _PARITY)


def _served(result: Result) -> Table:
    return _pick(_rows(_part(result, "served"), "rows"), _SERVED)


def _speed(result: Result) -> Table:
    speeds = {key: number(_part(result, "speed", key).get("tokens_per_second")) for key in ("onnx", "torch")}
    return ["runtime", "tokens/s"], [
        [_spoken(key), f"{speed:.1f}"] for key, speed in speeds.items() if speed is not None
    ]


def _sizes(result: Result) -> Table:
    sizes = _numbers(_part(result, "sizes"))
    return ["artifact", "on disk"], [[name, size(value)] for name, value in sizes.items()]


def _times(result: Result) -> Table:
    times = _numbers(_part(result, "timings"))
    total = sum(times.values())
    rows = [
        [name.replace("_", " "), seconds(value), percent(value / total if total else 0.0)]
        for name, value in times.items()
    ]
    return ["stage", "time", "of the run"], [*rows, ["together", seconds(total), ""]] if rows else []


def _cards(result: Result) -> Iterator[Card]:
    """Yields the key figures: quality, agreement, speed, size, time."""
    for name, values in _accuracies(result).items():
        if "torch" in values:
            chance = f"chance {percent(values['chance'])}" if "chance" in values else ""
            yield Card(f"accuracy, {name}", percent(values["torch"]), chance)
    for key, label in _ANSWERS.items():
        answers = _part(result, key)
        if number(answers.get("after")) is not None:
            before = f"{percent(answers.get('before'))} without the adapter"
            yield Card(label, percent(answers["after"]), before)
    if (agreement := number(result.get("token_agreement"))) is not None:
        compared = number(result.get("tokens_compared"))
        yield Card(
            "same tokens as PyTorch",
            percent(agreement),
            f"{compared:,.0f} tokens compared" if compared else "",
        )
    if isinstance(equal := result.get("mixed_batch_equal"), bool):
        yield Card(
            "mixed batch",
            "equal" if equal else "differs",
            f"{'to' if equal else 'from'} the rows run one adapter at a time",
        )
    if (speed := number(_part(result, "speed", "onnx").get("tokens_per_second"))) is not None:
        ratio = number(_part(result, "speed").get("ratio"))
        yield Card(
            "tokens per second",
            f"{speed:.1f}",
            "with ONNX Runtime" + (f", {ratio:.2f} times PyTorch" if ratio else ""),
        )
    sizes = _numbers(_part(result, "sizes"))
    base = sizes.get("base checkpoint") or number(_part(result, "model").get("bytes"))
    if pack := next((value for name, value in sizes.items() if name.startswith("pack ")), None):
        yield Card("one adapter pack", size(pack), f"{percent(pack / base)} of the model" if base else "")
    if times := _numbers(_part(result, "timings")):
        yield Card("the whole run", seconds(sum(times.values())), f"{len(times)} stages")


def _adapters(result: Result) -> list[str]:
    """Returns the names of the adapters from the first part of the result that has them."""
    for key in ("training", "accuracy", "parity"):
        entries = _part(result, key)
        names = [str(name) for name in entries if isinstance(entries[name], Mapping) and name not in _FORMS]
        if names:
            return names
    return []


def _steps(result: Result) -> str:
    """Describes what the run did, as the rest of a sentence."""
    names = _adapters(result)
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
    model = _part(result, "model")
    parameters, stored = number(model.get("parameters")), number(model.get("bytes"))
    facts = [
        f"{count(parameters)} parameters" if parameters else "",
        size(stored) if stored else "",
        f"from {model['source']}" if model.get("source") else "",
    ]
    listed = ", ".join(filter(None, facts))
    return str(model.get("name") or "a pretrained model") + (f" ({listed})" if listed else "")


def _commands(result: Result) -> list[str]:
    """Returns suggested next commands; their paths come from ``paths`` of the result, or default to the usual
    places under ``output``.
    """
    output, names = result.get("output"), _adapters(result)
    if not output or not names:
        return []
    paths = _part(result, "paths")
    pack, bundle = paths.get("pack", f"{output}/packs/{names[0]}"), paths.get("bundle", f"{output}/bundle")
    rows = [*_rows(_part(result, "mixed_batch"), "rows"), *_rows(result, "examples")]
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
