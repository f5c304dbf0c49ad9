"""Defines a format of training data (:class:`DataForm`) and the registry of formats.

Another package provides a format through an entry point of the group ``adapterpack.data_forms``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from ...errors import ConfigError, UnknownName, nearest
from ...io import without_none
from ...library_errors import library_errors
from ...registry import Registry
from ..data import OWN_COLUMNS, DataReport, Row
from .written_prompt import WrittenPrompt, written_prompt

Message = Mapping[str, Any]


class Conversation(NamedTuple):
    """A row as chat messages, of which the last one is the assistant's.

    Args:
        messages: in transformers' format, with ``role`` and ``content``.
        learned_from: index of the first message that may be learned; assistant messages before it are
            context.
        values: further variables for the chat template, such as ``tools``.
        verbatim: the texts are used as they are, without a chat template.
        segments: the texts are all of the row, and those of the assistant are learned.
    """

    messages: list[Message]
    learned_from: int = 0
    values: Mapping[str, Any] = {}
    verbatim: bool = False
    segments: bool = False


@dataclass(frozen=True)
class DataForm:
    """One format of rows: ``columns`` identify it, ``optional`` are further columns that it reads, and
    ``read`` turns a row into messages.

    ``aliases`` are other tools' names for it. ``continuous``: a row is text without turns, and a row longer
    than the model's limit becomes several. ``remark``: what to log about such rows.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[Row], Conversation]
    optional: frozenset[str] = field(default_factory=frozenset)
    continuous: bool = False
    aliases: frozenset[str] = frozenset()
    remark: str = ""

    def errors(self, place: object) -> AbstractContextManager[None]:
        """Translates errors of reading the row at that place."""
        return library_errors(
            "transformers", f"a row is not of the form {self.name}", where=place, kind=ConfigError
        )


FORMS = Registry("form of data", DataForm, "adapterpack.data_forms", __package__)
"""Name -> format."""


def read_form(rows: Any, report: DataReport) -> DataForm:
    """Returns the format that the report's configuration names, or else the first format, in the order of
    their names, whose columns are all present; and records it in the report. It reads a row as the
    configuration says: with its names of roles, and its system prompt.

    Raises:
        ConfigError: no format fits, or the named one does not.
        UnknownName: no format has that name.
    """
    columns = rows.column_names
    reading = report.reading
    wanted = report.choose()
    forms = list(FORMS.values()) if wanted is None else [get_form(wanted)]
    form = next((form for form in forms if form.columns <= set(columns)), None)
    if form is None:
        raise ConfigError(
            "no form of rows has these columns"
            if wanted is None
            else f"the rows are not of the form {forms[0].name}",
            where=report,
            expected=", or ".join(dict.fromkeys(" + ".join(sorted(form.columns)) for form in forms)),
            found=", ".join(columns),
            remedy=OWN_COLUMNS,
        )
    report.read_as(form.name, columns, form.columns | form.optional)
    read = form.read
    return replace(form, read=lambda row: _with_system(read(reading.rename(row)), reading.system_prompt))


def _with_system(conversation: Conversation, text: str | None) -> Conversation:
    """Puts a system prompt before a conversation that has none."""
    first = conversation.messages[0]["role"]
    if text is None or first == "system" or conversation.verbatim or conversation.segments:
        return conversation
    messages = [make_message("system", text), *conversation.messages]
    return conversation._replace(messages=messages, learned_from=conversation.learned_from + 1)


def get_form(named: str | Mapping[str, str]) -> DataForm:
    """Returns the format with that name or alias, or the one of a prompt that is written out.

    Raises:
        UnknownName: no format has that name.
        ConfigError: the prompt is not written as one.
    """
    if isinstance(named, Mapping):
        prompt = written_prompt(named)
        beside = frozenset({"input", "system"})
        needed = {"output", *prompt.columns} - beside
        return DataForm("a written prompt", frozenset(needed), partial(read_written, prompt), beside)
    form = next((form for form in FORMS.values() if named == form.name or named in form.aliases), None)
    if form is None:
        raise UnknownName("unknown form of data", found=repr(named), remedy=nearest(named, FORMS))
    return form


def read_written(prompt: WrittenPrompt, row: Row) -> Conversation:
    """Reads an instruction into a prompt that is written out, regardless of the chat template, as axolotl
    does for ``type: alpaca``.
    """
    before = make_message("user", prompt.prompt(row))
    return Conversation(
        [before, make_message("assistant", prompt.answer(text_of(row["output"])))], verbatim=True
    )


def text_of(value: Any) -> str:
    """Returns the value if it is a string; raises a ValueError otherwise, which the caller turns into an
    error that names the row.
    """
    if not isinstance(value, str):
        raise ValueError(f"text was expected, found {value!r}")
    return value


def turns_of(value: Any) -> Sequence[Message]:
    """Returns the value if it is a list of objects; raises a ValueError otherwise, as :func:`text_of`
    does.
    """
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"a list of messages was expected, found {value!r}")
    return value


def tools_of(row: Row) -> dict[str, Any]:
    """Returns the tools of a row for a chat template, given as a list or as JSON text."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else {}


def require_answer(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages without their empty fields, because tables give every row all fields; raises a
    ValueError if the last message is not the assistant's.
    """
    filled: list[Message] = [without_none(message) for message in turns_of(messages)]
    if not filled:
        raise ValueError("there are no messages")
    if filled[-1].get("role") != "assistant":
        raise ValueError("the last message is not the assistant's")
    return filled


def make_message(role: str, content: Any) -> Message:
    """Returns a text message."""
    return {"role": role, "content": text_of(content)}
