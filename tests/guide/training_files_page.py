"""What becomes of each key of other tools' training files: ``python tests/guide/training_files_page.py >
docs/migrating/training-files.md``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from adapterpack.training.config import tool_values
from adapterpack.training.config.tools import TABLES, KeyRule, OtherTool, table_of

INTRO = """# Keys of other tools' training files

`adapterpack train FILE` recognizes by its keys which tool a file was written for, and reads it with that tool's names, defaults and meanings.
`--from axolotl` (`llamafactory`, `trl`, `adapterpack`) names the tool instead. `adapterpack train FILE --print-config` shows the result, and where
each value came from. A key without a value (`null`, `""`, `[]`, `{}`) is not set. This page is made from the tables by `make guide`.
"""


def page() -> str:
    """Each tool's tables, in Markdown."""
    return "\n".join([INTRO, *(line for name in TABLES for line in _tool(table_of(name)))]) + "\n"


def _tool(tool: OtherTool) -> Iterator[str]:
    """The tables of one tool."""
    yield f"## {tool.name}\n"
    what = f"`{tool.key}` and one of {_code(tool.others)}"
    yield f"A file of {tool.name} has {what}. What it does not set has {tool.name}'s default:\n"
    defaults = {key: value for key, value in tool.defaults.items() if key != "peft_names"}
    yield ", ".join(f"`{key}: {_value(value)}`" for key, value in defaults.items()) + ".\n"
    yield from _table(
        ("key", "what becomes of it"), ((f"`{key}`", _rule(tool.keys[key])) for key in sorted(tool.keys))
    )
    if tool.ignores_unknown_keys:
        yield f"A key unknown to {tool.name} and to adapterpack is left out with a note, as {tool.name} does.\n"
    yield "Left out, with one note for each reason:\n"
    yield from _table(
        ("because", "keys"), ((reason.why, _code(sorted(reason.keys))) for reason in tool.left_out)
    )
    yield "Stop the run, where they have a value other than `false`:\n"
    yield from _table(
        ("because", "keys"), ((reason.why, _code(sorted(reason.keys))) for reason in tool.stops)
    )
    kinds = {"texts": tool.types, "pairs of answers": tool.pairs, "answers with a verdict": tool.verdicts}
    for what, types in kinds.items():
        if types:
            yield f"Types of data sets with {what}:\n"
            yield from _table(
                ("type", "form of the rows here"),
                ((f"`{name}`", _form(kind)) for name, kind in types.items()),
            )


def _rule(rule: str | KeyRule) -> str:
    """What a rule makes of a key, in words."""
    if isinstance(rule, str):
        return f"`{rule}`"
    if rule.by:
        said = inspect.getdoc(getattr(tool_values, rule.by)) or ""
        said = " ".join(said.split("\n\n")[0].split()).removesuffix(".").removeprefix("Returns ")
        first, _, rest = said.partition(" ")
        return f"{first.lower() if first.istitle() else first} {rest}".replace("``", "`")
    values = [
        f"`{theirs}`: " + (f"`{rule.name}: {_value(ours)}`" if ours != "" else "nothing to do")
        for theirs, ours in rule.values.items()
    ]
    stops = [
        f"{'another value' if value == '*' else f'`{value}`'} stops: {why}"
        for value, why in rule.stops.items()
    ]
    return "; ".join([*values, *stops]) or f"`{rule.name}`"


def _form(kind: Any) -> str:
    """The form that a type of data has here, and its names of columns."""
    form = f"`{kind.form}`" if isinstance(kind.form, str) else "a prompt of its own"
    named = {**kind.columns, **{f"messages.{ours}": theirs for ours, theirs in kind.messages.items()}}
    return form + (f", `{_value(named)}`" if named else "")


def _value(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a table."""
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(page())
