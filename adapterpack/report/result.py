"""Reads the result of a demo run: whatever is missing is an empty mapping or None, so that a partial run can
still be reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..io.readable import MISSING, count, number, percent, seconds, small

Result = Mapping[str, Any]

FORMS: Mapping[str, tuple[str, str]] = {
    "base_untrained_head": ("untrained head", "c0"),
    "torch": ("PyTorch", "c1"),
    "merged": ("merged", "c3"),
    "onnx_fp32": ("ONNX fp32", "c2"),
    "onnx_int8": ("ONNX int8", "c2"),
    "onnx_int4": ("ONNX int4", "c2"),
    "onnx": ("ONNX Runtime", "c2"),
    "first_half": ("first half", "c0"),
    "second_half": ("second half", "c0"),
    "average": ("their average", "c1"),
    "both_halves": ("trained on both", "c3"),
}
"""Key in the result -> how it is called in text, and its tone in charts."""

ANSWERS: Mapping[str, str] = {"exact_match": "exact match", "valid_json": "valid JSON"}
PARITY: Mapping[str, tuple[str, Callable[[object], str]]] = {
    "max_abs": ("max abs", small),
    "label_agreement": ("label agreement", percent),
    "token_agreement": ("token agreement", percent),
}
TRAINING: Mapping[str, tuple[str, Callable[[object], str]]] = {
    "rows": ("rows", count),
    "steps": ("steps", count),
    "trainable": ("trained parameters", count),
    "seconds": ("time", seconds),
}
MIXED: Mapping[str, tuple[str, Callable[[object], str]]] = {
    "text": ("text", str),
    "prompt": ("prompt", str),
    "adapter": ("adapter", str),
    "label": ("label", str),
    "completion": ("completion", str),
    "score": ("score", percent),
}
"""Key of a row -> column name and format, in the order of the columns; a column that no row has is left
out.
"""


def part(result: Result, *keys: str) -> Mapping[str, Any]:
    """The mapping under ``keys``, empty where there is none.

    Example:
        >>> part({"a": {"b": {"c": 1}}}, "a", "b"), part({}, "a")
        ({'c': 1}, {})
    """
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def listed(result: Result, key: str) -> list[Mapping[str, Any]]:
    """The mappings in the list under ``key``."""
    value = result.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def spoken(key: str) -> str:
    """What a key is called in text.

    Example:
        >>> spoken("onnx_fp32"), spoken("some_other")
        ('ONNX fp32', 'some other')
    """
    return FORMS[key][0] if key in FORMS else key.replace("_", " ")


def tone(key: str) -> str:
    """The tone of a key in charts."""
    return FORMS[key][1] if key in FORMS else "c1"


def measured(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers, in order."""
    return {str(key): figure for key, value in values.items() if (figure := number(value)) is not None}


def accuracy(result: Result) -> dict[str, dict[str, float]]:
    """Adapter -> form -> accuracy, for adapters with at least one figure."""
    entries = (
        (str(name), entry) for name, entry in part(result, "accuracy").items() if isinstance(entry, Mapping)
    )
    return {name: values for name, entry in entries if (values := measured(entry))}


def parity(result: Result) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the parity table; the result may be nested by adapter or hold the forms directly.

    Example:
        >>> parity({"parity": {"tickets": {"onnx_fp32": {"max_abs": 1e-6}}}})
        (['form', 'max abs'], [['tickets, ONNX fp32', '1.0e-06']])
    """
    leaves = list(_leaves(part(result, "parity"), ()))
    keys = [key for key in PARITY if any(key in leaf for _, leaf in leaves)]
    rows = [
        [", ".join(map(spoken, path)) or "all", *(PARITY[key][1](leaf.get(key)) for key in keys)]
        for path, leaf in leaves
    ]
    return ["form", *(PARITY[key][0] for key in keys)], rows


def _leaves(
    values: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if any(number(values.get(key)) is not None for key in PARITY):
        yield path, values
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))


def training(result: Result) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the training table, one row an adapter; the result may be nested by adapter or hold
    one adapter's figures.
    """
    figures = part(result, "training")
    entries = (
        {"": figures}
        if measured(figures)
        else {str(name): entry for name, entry in figures.items() if isinstance(entry, Mapping)}
    )
    keys = [key for key in TRAINING if any(key in entry for entry in entries.values())]
    return ["adapter", *(TRAINING[key][0] for key in keys)], [
        [name, *(TRAINING[key][1](entry.get(key)) for key in keys)] for name, entry in entries.items()
    ]


def mixed(result: Result) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the mixed batch; a row without an adapter ran on the base alone."""
    rows = listed(part(result, "mixed_batch"), "rows")
    keys = [key for key in MIXED if any(key in row for row in rows)]
    absent = {"adapter": "none (base)"}
    cells = [
        [MIXED[key][1](row[key]) if row.get(key) is not None else absent.get(key, MISSING) for key in keys]
        for row in rows
    ]
    return [MIXED[key][0] for key in keys], cells


def served(result: Result) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what the server answered, with the beginning of the digest of what answered."""
    rows = listed(part(result, "served"), "rows")
    return ["text", "adapter", "answer", "digest"], [
        [
            str(row.get("text", MISSING)),
            str(row.get("adapter") or "none (base)"),
            str(row.get("answer", MISSING)),
            str(row.get("digest", MISSING)).removeprefix("sha256:")[:12],
        ]
        for row in rows
    ]


def adapters(result: Result) -> list[str]:
    """The names of the adapters, wherever the result mentions them first."""
    for key in ("training", "accuracy", "parity"):
        names = [
            str(name)
            for name, entry in part(result, key).items()
            if isinstance(entry, Mapping) and name not in FORMS
        ]
        if names:
            return names
    return []
