"""What a form of preferences is, and the forms by name: a file of this folder registers the one that it
defines.

Another package brings a form by an entry point of the group ``adapterpack.preference_forms``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...registry import Registry
from ..conversations.form import Message, make_message
from ..data.report import DataReport
from ..data.rows import Row


@dataclass(frozen=True)
class PreferenceForm:
    """One form of rows: ``columns`` are those that it is known by, ``optional`` what it reads besides.

    ``read`` makes of a row what TRL's trainers take: ``chosen`` and ``rejected``, with ``prompt`` where they
    do not begin with it, if answers are ``paired``; else ``prompt``, ``completion`` and whether that is good,
    ``label``. Each is a text, or a list of messages.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[Row], dict[str, Any]]
    optional: frozenset[str] = frozenset()
    paired: bool = True


PREFERENCES: Registry[PreferenceForm] = Registry(
    "form of preferences", PreferenceForm, "adapterpack.preference_forms", __package__
)
"""Name -> the form."""


def pairs_of_answers(rows: Any, report: DataReport) -> list[dict[str, Any]]:
    """Two answers to each prompt, as TRL's trainers take them.

    Raises:
        ConfigError: the columns are of no such form, or a row is not.
    """
    return _read(rows, report, paired=True)


def labelled_answers(rows: Any, report: DataReport) -> list[dict[str, Any]]:
    """Single answers, each with a verdict, as TRL's trainers take them.

    Raises:
        ConfigError: the columns are of no such form, or a row is not.
    """
    return _read(rows, report, paired=False)


def _read(rows: Any, report: DataReport, paired: bool) -> list[dict[str, Any]]:
    form = _form_of(rows.column_names, report, paired)
    report.read_as(form.name, rows.column_names, form.columns | form.optional)
    read = []
    for number, row in enumerate(rows):
        with report.row(number) as place:
            try:
                read.append(form.read(row))
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"a row is not of the form {form.name}: {error}", where=place) from error
    return read


def _form_of(columns: Sequence[str], report: DataReport, paired: bool) -> PreferenceForm:
    """The form that is wanted, else the one that has the most of its columns among these."""
    wanted = report.choose()
    forms = [form for form in PREFERENCES.values() if form.paired is paired and wanted in (None, form.name)]
    fitting = [form for form in forms if form.columns <= set(columns)]
    if not fitting:
        raise ConfigError(
            "these columns are of no known form of preferences",
            where=report,
            found=", ".join(columns),
            expected="; ".join(" + ".join(sorted(form.columns)) for form in forms),
        )
    return max(fitting, key=lambda form: len(form.columns))


def answer(value: Any) -> list[Message]:
    """An answer as messages: a text, one message, or several."""
    if isinstance(value, str):
        return [make_message("assistant", value)]
    if value is None:
        raise ValueError("an answer is missing")
    return [dict(value)] if isinstance(value, dict) else list(value)
