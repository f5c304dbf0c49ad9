"""Renders the page of ``adapterpack inspect --html``: an artifact's summary as figures, facts and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..readable import count, number, show_value, size
from .page import Card, render

_KINDS = {
    "pack": "A pack: one adapter on disk.",
    "peft": "An adapter as PEFT wrote it.",
    "bundle": "A bundle: one deployable folder of graphs and adapters.",
    "config": "The settings of a training.",
    "merge": "A merge: what the base's weights kept of the adapters' change.",
    "validation": "A validation: every check that applies, and what was found.",
    "base": "A base: the pretrained model that adapters change.",
    "fleet": "A fleet: many adapters on shared bases.",
    "genai_folder": "A folder of a graph that onnxruntime-genai runs, as Olive or its builder made it.",
}
"""Kind -> the sentence under the heading."""
_COUNTS = {
    "sites": "places of the base that are changed",
    "parameters": "numbers",
    "slots": "adapters at a time, the base included",
}
_TITLES = {
    "ranks": "Ranks, and how many sites have each",
    "scales": "Scales, and how many sites have each",
    "config": "Configuration",
}
"""Headings of parts whose keys are not clear enough."""
_LISTED = 500
"""The most rows of a table, so that a page stays readable."""


def inspect_report(summary: Mapping[str, Any]) -> str:
    """Renders the result of ``adapterpack.inspect`` as one self-contained HTML page.

    Example:
        >>> "1.30 MB" in inspect_report({"kind": "pack", "path": "packs/a", "name": "a", "bytes": 1_300_000,
        ...     "sites": 4})
        True
    """
    parts = {key: value for key, value in summary.items() if isinstance(value, Mapping) and value}
    tables = {key: value for key, value in summary.items() if _is_table(value)}
    plain = {
        key: value
        for key, value in summary.items()
        if key not in parts and key not in tables and key not in ("kind", "name", "path")
    }
    modules = parts.pop("sites_by_module", {})
    return render(
        "inspect.html.jinja",
        name=str(summary.get("name") or PurePath(str(summary.get("path", "artifact"))).name),
        what=_KINDS.get(str(summary.get("kind")), "An adapter of another tool."),
        path=summary.get("path", "what was named"),
        verified=summary.get("kind") not in ("config", "merge", "validation"),
        figures=_figures(summary),
        facts=list_facts(plain),
        modules=[
            (name, f"{many:,}")
            for name, many in sorted(modules.items(), key=lambda item: (-item[1], item[0]))
            if len(modules) > 1
        ],
        sections=[
            *({"title": _title(key), "facts": list_facts(value)} for key, value in parts.items()),
            *(_table(key, value) for key, value in tables.items()),
        ],
    )


def list_facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lists names and values in readable form; the name of a nested value joins the names of its levels.

    Example:
        >>> list_facts({"graph_bytes": 2000, "parity": {"mixed": 0.5, "alone": None}})
        [('graph bytes', '2.00 kB'), ('parity, mixed', '0.5'), ('parity, alone', 'none')]
    """
    facts = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            facts += [(f"{_spoken(key)}, {inner}", text) for inner, text in list_facts(value)]
        else:
            facts.append((_spoken(key), _text(key, value)))
    return facts


def _spoken(key: object) -> str:
    return str(key).replace("_", " ")


def _text(key: object, value: Any) -> str:
    return size(value) if "bytes" in str(key).split("_") else show_value(value)


def _title(key: str) -> str:
    return _TITLES.get(key, _spoken(key).capitalize())


def _figures(summary: Mapping[str, Any]) -> list[Card]:
    cards = [
        Card(_spoken(key), count(summary[key]), note)
        for key, note in _COUNTS.items()
        if number(summary.get(key)) is not None
    ]
    if number(summary.get("bytes")) is not None:
        cards.append(Card("size", size(summary["bytes"]), "of its files"))
    return cards


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _table(key: str, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    title = _title(key) + (f", {_LISTED} of {len(rows):,}" if len(rows) > _LISTED else "")
    cells = [[_text(name, row.get(name)) for name in columns] for row in rows[:_LISTED]]
    return {"title": title, "columns": list(map(_spoken, columns)), "rows": cells}
