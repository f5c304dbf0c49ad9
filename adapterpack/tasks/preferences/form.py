"""Defines a format of preferences (:class:`PreferenceForm`) and the registry of formats.

Another package provides a format through an entry point of the group ``adapterpack.preference_forms``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...registry import Registry
from ..conversations.written_prompt import WrittenPrompt, written_prompt
from ..data import OWN_COLUMNS, DataReport, Encoded, Row


@dataclass(frozen=True)
class PreferenceForm:
    """One format of rows: ``columns`` identify it, ``optional`` are further columns that it reads.

    ``read`` turns a row into what TRL's trainers expect. For ``paired`` answers that is ``chosen`` and
    ``rejected``, and ``prompt`` unless both begin with it; otherwise it is ``prompt``, ``completion`` and
    ``label``, whether the completion is good. Each is a text or a list of messages.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[Row], Encoded]
    optional: frozenset[str] = frozenset()
    paired: bool = True


PREFERENCES = Registry("form of preferences", PreferenceForm, "adapterpack.preference_forms", __package__)
"""Name -> format."""


def pairs_of_answers(rows: Any, report: DataReport) -> list[Encoded]:
    """Returns two answers to each prompt, in the form that TRL's trainers expect.

    Raises:
        ConfigError: no such format has these columns, or a row does not fit the format.
    """
    return report.encode(rows, read_answers(rows, report, paired=True))


def labelled_answers(rows: Any, report: DataReport) -> list[Encoded]:
    """Returns single answers with a verdict each, in the form that TRL's trainers expect.

    Raises:
        ConfigError: no such format has these columns, or a row does not fit the format.
    """
    return report.encode(rows, read_answers(rows, report, paired=False))


def read_answers(rows: Any, report: DataReport, paired: bool) -> Callable[[Row, object], Encoded]:
    """Returns what reads a row, at its place, of two answers or of one with a verdict.

    Raises:
        ConfigError: no such format has these columns.
    """
    form = _form_of(rows.column_names, report, paired)
    report.read_as(form.name, rows.column_names, form.columns | form.optional)

    def read(row: Row, place: object) -> Encoded:
        try:
            return form.read(report.reading.rename(row))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"a row is not of the form {form.name}: {error}", where=place) from error

    return read


def _form_of(columns: Sequence[str], report: DataReport, paired: bool) -> PreferenceForm:
    """Returns the requested format, or else the matching format with the most columns."""
    wanted = report.choose()
    if isinstance(wanted, Mapping):
        return _written(written_prompt(wanted), paired)
    forms = [form for form in PREFERENCES.values() if form.paired is paired and wanted in (None, form.name)]
    fitting = [form for form in forms if form.columns <= set(columns)]
    if not fitting:
        raise ConfigError(
            "no form of preferences has these columns",
            where=report,
            found=", ".join(columns),
            expected=", or ".join(dict.fromkeys(" + ".join(sorted(form.columns)) for form in forms)),
            remedy=OWN_COLUMNS,
        )
    return max(fitting, key=lambda form: len(form.columns))


def _written(prompt: WrittenPrompt, paired: bool) -> PreferenceForm:
    """Returns the format of rows whose prompt and answers are put into texts that the configuration writes
    out.
    """
    answers = ("chosen", "rejected") if paired else ("completion",)

    def read(row: Row) -> Encoded:
        texts = {
            name: row[name][-1]["content"] if isinstance(row[name], list) else row[name] for name in answers
        }
        whole = {name: prompt.answer(text) for name, text in texts.items()}
        return {"prompt": prompt.prompt(row), **whole, **({} if paired else {"label": bool(row["label"])})}

    needed = {*answers, *prompt.columns, *(() if paired else ("label",))}
    return PreferenceForm("a written prompt", frozenset(needed), read, frozenset({"system"}), paired)
