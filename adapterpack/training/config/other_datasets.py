"""Reads how axolotl and TRL's scripts name data sets, as sources of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from .fields import Settings


class Stop(ValueError):
    """A value in another tool's file that stops the run; the text says why."""


_LEFT_OUT = frozenset(
    {
        "conversation",
        "ds_type",
        "field_thinking",
        "input_format",
        "preprocess_shards",
        "template_thinking_key",
        "temperature",
        "train_on_eot",
        "train_on_split",
        "trust_remote_code",
    }
)
"""Settings of axolotl's data sets that change no row, or that the rows themselves show here."""
_AS_THEY_ARE = ("path", "name", "split", "revision", "data_files", "roles", "shards", "shards_idx")
_COLUMNS = {"field": "text", "text_column": "text", "field_model": "answer", "field_human": "question"}
_TAUGHT = {"roles_to_train": {"assistant", "gpt", "model"}, "train_on_eos": {"turn", "all", "last"}}


class Type(Struct, forbid_unknown_fields=True):
    """What one of axolotl's types is: a form of ours, names of columns, and names in messages."""

    form: str | dict[str, str]
    columns: dict[str, str] = {}
    messages: dict[str, str] = {}


def axolotl_source(entry: str | Settings, types: Mapping[str, Type]) -> dict[str, Any]:
    """Returns the source of one of axolotl's data sets, whose type is one of ``types``.

    Raises:
        Stop: its type is none that is read here, or it has a setting that changes rows.

    Example:
        >>> entry = {"path": "a", "type": "completion", "field": "body"}
        >>> axolotl_source(entry, {"completion": Type("text")})
        {'path': 'a', 'form': 'text', 'columns': {'text': 'body'}}
    """
    given: dict[str, Any] = {"path": entry} if isinstance(entry, str) else dict(entry)
    given = {key: value for key, value in given.items() if value not in (None, "")}
    named = given.pop("type", "chat_template")
    if isinstance(named, Mapping):
        fields = {key: name for key, name in named.items() if key.startswith("field_")}
        prompt = {key: text for key, text in named.items() if key not in fields and text}
        given |= fields
        written = {"format": "{instruction} {input} ", "no_input_format": "{instruction} ", **prompt}
        kind = Type(written)
    elif named in types:
        kind = types[named]
    else:
        raise Stop(
            f"data sets of type {named!r:.80} are not supported; describe the prompt by type: {{format: ...}}"
        )
    source = {key: given.pop(key) for key in _AS_THEY_ARE if key in given}
    source |= {"form": kind.form} | (
        {"without_system": True} if given.pop("drop_system_message", False) else {}
    )
    names: dict[str, str] = given.pop("message_property_mappings", None) or {
        ours: given.pop(f"message_field_{ours}")
        for ours in ("role", "content")
        if f"message_field_{ours}" in given
    }
    columns = dict(kind.columns)
    for key in [key for key in given if key.startswith("field") or key in _COLUMNS]:
        if key not in _LEFT_OUT:
            columns[_COLUMNS.get(key, key.removeprefix("field_"))] = given.pop(key)
    for key, known in _TAUGHT.items():
        taught = given.pop(key, None) or []
        if not {*([taught] if isinstance(taught, str) else taught)} <= known:
            raise Stop(f"a data set's {key}: {taught} is not supported, only {', '.join(sorted(known))}")
    if unread := [key for key in given if key not in _LEFT_OUT]:
        raise Stop(f"a data set's {', '.join(unread)} is not supported")
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    more = {"columns": columns, "messages": dict(names or kind.messages)}
    return {**source, **{key: value for key, value in more.items() if value}}


def trl_sources(values: Settings, evaluates: bool) -> Settings:
    """Returns the data to train on and to evaluate on, as TRL's scripts name them.

    Example:
        >>> trl_sources({"dataset_name": "org/set", "dataset_config": "en"}, True)
        {'train_file': {'path': 'org/set', 'name': 'en', 'split': 'train'}}
    """
    columns = {
        ours: values[key]
        for key, ours in (("dataset_text_field", "text"), ("dataset_prompt_column", "prompt"))
        if values.get(key, ours) != ours
    }
    source = {"path": values["dataset_name"], "name": values.get("dataset_config"), "columns": columns}
    source = {key: value for key, value in source.items() if value}
    held = values.get("dataset_test_split") or values.get("eval_dataset_split")
    taken = {"train_file": {**source, "split": values.get("dataset_train_split", "train")}}
    return {**taken, "eval_file": {**source, "split": held}} if held and evaluates else taken


def split_of(names: list[Any]) -> str:
    """Returns several splits as one."""
    return "+".join(map(str, names)) or "train"
