"""Defines the sources of training data: a file, a glob pattern, a folder or a data set on the hub, with its
settings.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError, excerpt, nearest
from ...tasks.conversations.form import get_form
from ...tasks.data.report import RowReading
from ...tasks.preferences.form import PREFERENCES
from .coerce import typed_value

_ALIASES = {
    "type": "form",  # axolotl
    "formatting": "form",
    "file_name": "path",
    "hf_hub_url": "path",
    "subset": "name",  # LLaMA-Factory
}
"""Other tools' names for the settings of a source."""
_TYPES = {"alpaca": "alpaca-prompt"}
"""Values of axolotl's ``type`` that have another name here."""


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Args:
        path: a file, a pattern of files (``data/*.jsonl``), a folder, or a hub data set's name.
        form: the form of its rows, where their columns shall not tell it; or a prompt that is written out.
        name: the hub data set's configuration.
        split: its part, as ``datasets`` writes them: ``train``, ``train[:10%]``.
        revision: the hub data set's branch, tag or commit.
        data_files: of a hub data set or a folder, the files that are read.
        columns: columns by other names: the form's name -> the data's.
        messages, roles, without_system: names of the parts and roles of messages; see :class:`RowReading`.
        media_dir: the folder from which the paths of pictures in its rows start.
        max_samples: the most rows that are taken: the first, of a folder some from all over it.
        share: the share of its rows that is taken.
        shards, shards_idx: how many shards the rows are dealt into, a row to each in turn, and which of them
            is taken.
    """

    path: str
    form: str | Mapping[str, str] | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without_system: bool = False
    media_dir: str | None = None
    max_samples: int | None = None
    share: float | None = None
    shards: int = 1
    shards_idx: int = 0

    @property
    def reading(self) -> RowReading:
        """How its rows are read."""
        return RowReading(self.form, self.messages, self.roles, self.without_system)


def names_of(value: Any) -> str:
    """Returns the paths of the sources that a setting names, for messages.

    Example:
        >>> names_of(["a.jsonl", {"path": "org/set"}])
        'a.jsonl, org/set'
    """
    return ", ".join(source.path for source in sources_of(value, "the data"))


def sources_of(value: Any, where: object) -> tuple[Source, ...]:
    """Returns the sources that a setting names: one by its path, one by a mapping, or a list of these.

    Raises:
        ConfigError: a source has an unknown setting, or a value of the wrong type.

    Example:
        >>> sources_of(["a.jsonl", {"path": "org/set", "type": "alpaca"}], "here")[1].form
        'alpaca-prompt'
    """
    entries = [value] if isinstance(value, str | Mapping) else list(value)
    if not entries:
        raise ConfigError("there is no source of data", where=where)
    several = len(entries) > 1
    return tuple(
        _source(entry, f"{where}, entry {number}" if several else where)
        for number, entry in enumerate(entries, 1)
    )


def _source(entry: Any, where: object) -> Source:
    """Returns the source that one entry describes."""
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, Mapping):
        raise ConfigError(
            "a source of data is a path, or a mapping with one", where=where, found=excerpt(entry)
        )
    hints = typing.get_type_hints(Source)
    named = {_ALIASES.get(key, str(key)): value for key, value in entry.items()}
    if isinstance(kind := entry.get("type"), str):
        named["form"] = _TYPES.get(kind, kind)
    if unknown := [key for key in named if key not in hints]:
        raise ConfigError(
            "a source of data has no such setting",
            where=where,
            found=", ".join(map(repr, unknown)),
            expected=", ".join(hints),
            remedy=nearest(str(unknown[0]), hints),
        )
    if "path" not in named:
        raise ConfigError("a source of data has no path", where=where, found=", ".join(map(str, named)))
    source = Source(**{key: typed_value(key, value, hints[key], where) for key, value in named.items()})
    if source.form is not None and source.form not in PREFERENCES:
        get_form(source.form)
    return source
