"""Reads training files of other tools by tables: ``tools/NAME.toml`` says what becomes of each key of that
tool.

A key leads to a setting of ours (``"max_length"``), to one whose values have other names
(``{is = ..., values = {theirs = ours}, stops = {theirs = why}}``, where ``"*"`` is every other value, and
``""`` as ours leaves the setting unset), or to a function of :mod:`.tool_values` that works it out (``{by =
...}``). What changes no number is ``left_out``, what cannot be trained here ``stops`` the run, each with its
reason.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

import msgspec

from ...errors import ConfigError, closest
from ...resources import table
from . import tool_values
from .fields import Settings
from .other_datasets import Stop, Type
from .tool_values import File

TABLES = ("axolotl", "llamafactory", "trl")
"""The tools whose files are read, by the names of their tables."""
_UNSET: tuple[Any, ...] = (None, "", [], {})


class KeyRule(msgspec.Struct, forbid_unknown_fields=True, rename={"name": "is"}):
    """What becomes of one key."""

    name: str = ""
    by: str = ""
    into: str = ""
    values: dict[str, Any] = {}
    stops: dict[str, str] = {}


class Reason(msgspec.Struct, forbid_unknown_fields=True):
    """Keys with the same outcome, and why they have it."""

    why: str
    keys: list[str]


class OtherTool(msgspec.Struct, forbid_unknown_fields=True):
    """One tool's table. A file is the tool's if it has ``key`` and one of ``others``, and trains the whole
    model unless it has a value under ``trains_an_adapter``. ``types``, ``pairs`` and ``verdicts`` are its
    forms of data.
    """

    name: str
    key: str = ""
    others: list[str] = []
    trains_an_adapter: str = ""
    whole_model: list[str] = []
    instead: Any = ""
    ignores_unknown_keys: bool = False
    defaults: dict[str, Any] = {}
    keys: dict[str, str | KeyRule] = {}
    left_out: list[Reason] = []
    stops: list[Reason] = []
    types: dict[str, Type] = {}
    pairs: dict[str, Type] = {}
    verdicts: dict[str, Type] = {}
    templates: str = ""

    def why(self, key: str, reasons: list[Reason]) -> str | None:
        """Returns the reason that a list has for a key, or None."""
        return next((reason.why for reason in reasons if key in reason.keys), None)


class Translation(NamedTuple):
    """Settings under our names, the keys that they came from, and what was left out: reason -> keys."""

    settings: dict[str, Any]
    origins: dict[str, str]
    left_out: dict[str, list[str]]


@cache
def table_of(name: str) -> OtherTool:
    """Returns the table of the tool whose file has that name."""
    return table(f"training/config/tools/{name}.toml", OtherTool)


@cache
def ours() -> OtherTool:
    """Returns the table of our own files: PEFT's names, and all plain renamings of other tools."""
    renamed = {
        key: rule
        for name in TABLES
        for key, rule in table_of(name).keys.items()
        if isinstance(rule, str) and key != rule
    }
    return msgspec.structs.replace(
        table_of("peft"), name="adapterpack", keys={**renamed, **table_of("peft").keys}
    )


def tool_of(settings: Collection[str], named: str | None = None) -> OtherTool:
    """Returns the tool that a file was written for: the ``named`` one, or the one that its keys show.

    Raises:
        ConfigError: there is no tool of that name.

    Example:
        >>> tool_of({"base_model", "datasets"}).name, tool_of({"model_name_or_path"}).name
        ('axolotl', 'adapterpack')
    """
    tools = [table_of(name) for name in TABLES]
    if named is not None:
        known = {**dict(zip(TABLES, tools, strict=True)), "adapterpack": ours()}
        if named not in known:
            raise ConfigError("unknown tool", found=repr(named), expected=", ".join(known))
        return known[named]
    found = (tool for tool in tools if tool.key in settings and not settings_of(tool).isdisjoint(settings))
    return next(found, ours())


def settings_of(tool: OtherTool) -> frozenset[str]:
    """Returns the keys that tell a tool's files from ours."""
    return frozenset(tool.others)


def is_set(value: Any) -> bool:
    """Whether a value sets anything: null, empty text and empty lists and mappings do not.

    Example:
        >>> [is_set(value) for value in (None, "", [], {}, False, 0)]
        [False, False, False, False, True, True]
    """
    return not any(value is unset or (value == unset and type(value) is type(unset)) for unset in _UNSET)


def translate(
    values: Settings, tool: OtherTool, notes: list[str], where: object, known: Collection[str] = ()
) -> Translation:
    """Returns the values under this package's names, by a tool's table; appends what it worked out to
    ``notes``.

    ``known`` are our own settings: a tool that ignores unknown keys ignores the others.

    Raises:
        ConfigError: a setting appears under two names, or one stops the run; all that stop it are named.

    Example:
        >>> notes = []
        >>> translate({"lora_target": "q_proj,v_proj"}, ours(), notes, "here").settings, notes
        ({'targets': ['q_proj', 'v_proj']}, [])
    """
    done = Translation({}, {}, {})
    stopped = {}
    for key, value in values.items():
        rule = tool.keys.get(key)
        if (why := tool.why(key, tool.stops)) and value is not False:
            stopped[key] = why
        elif why := why or tool.why(key, tool.left_out):
            done.left_out.setdefault(why, []).append(key)
        elif rule is None and tool.ignores_unknown_keys and key not in known:
            close = closest(key, sorted({*tool.keys, *tool.others}))
            meant = f"; did you mean '{close}'?" if close else ""
            done.left_out.setdefault(f"unknown to {tool.name} and to adapterpack{meant}", []).append(key)
        else:
            try:
                found = _apply(rule, File(values, key, value, notes, where, tool))
            except Stop as stop:
                stopped[key] = str(stop)
                continue
            for name, translated in found.items():
                _add(done, name, translated, key, where, agree=isinstance(rule, KeyRule) and bool(rule.by))
    if stopped:
        raise ConfigError(
            f"some settings of this {tool.name} file are not supported",
            where=where,
            found="; ".join(f"{key}: {why}" for key, why in stopped.items()),
            remedy=f"change or remove them; without them the run may differ from {tool.name}'s",
        )
    return done


def _apply(rule: str | KeyRule | None, file: File) -> Settings:
    """Returns the settings of ours that one key leads to."""
    if rule is None:
        return {file.key: file.value}
    if isinstance(rule, str):
        return {rule: file.value}
    word = str(file.value).lower()
    if why := rule.stops.get(word, None if word in rule.values else rule.stops.get("*")):
        raise Stop(why)
    if rule.by:
        found: Settings = getattr(tool_values, rule.by)(file._replace(into=rule.into))
        return found
    value = rule.values.get(word, rule.values.get("*", file.value))
    return {} if value == "" or not rule.name else {rule.name: value}


def _add(done: Translation, name: str, value: Any, key: str, where: object, agree: bool) -> None:
    """Adds a translated setting; where keys are read together, they may ``agree``."""
    if name in done.settings and not (agree and done.settings[name] == value):
        raise ConfigError(
            "a setting is given under two names", where=where, found=name, remedy="keep one of them"
        )
    done.settings[name] = value
    done.origins.setdefault(name, key)
