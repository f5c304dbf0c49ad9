"""Reads ``dataset_info.json``, LLaMA-Factory's list of data sets, by whose names its configurations choose data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, nearest
from ...io import strict_json
from ...io.safe_open import read_file

INFO = "dataset_info.json"
_MOST = 1 << 20
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_CHATS = {"messages": "conversations", "system": "system", "tools": "tools"}
"""Its names of columns -> those of our forms."""
_OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
"""Its names for what stands in a message, where the messages are those of OpenAI."""


def with_sources(settings: Mapping[str, Any], notes: list[str], where: object) -> dict[str, Any]:
    """The settings with sources in the place of ``dataset`` and ``dataset_dir``; others as they are.

    Raises:
        ConfigError: the list has no data set of a name, or is none.
        StorageError: there is no list.
    """
    if "dataset_dir" not in settings:
        return dict(settings)
    folder = Path(str(settings["dataset_dir"]))
    info = strict_json.loads(read_file(folder / INFO, _MOST), folder / INFO, _MOST)
    if not isinstance(info, Mapping):
        raise ConfigError("the list of data sets is no mapping", where=folder / INFO)
    changed = {key: value for key, value in settings.items() if key != "dataset_dir"}
    for key in [key for key in ("dataset", "eval_dataset") if key in changed]:
        names = changed[key].split(",") if isinstance(changed[key], str) else list(changed[key])
        changed[key] = [_source(str(name).strip(), info, folder) for name in names]
        notes.append(f"{key} is read by {folder / INFO}")
    return changed


def _source(name: str, info: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    entry = info.get(name)
    if not isinstance(entry, Mapping):
        raise ConfigError("there is no such data set in the list", where=folder / INFO, found=repr(name),
                          remedy=nearest(name, map(str, info)))
    named, tags = entry.get("columns") or {}, entry.get("tags") or {}
    chats = entry.get("formatting", "alpaca") != "alpaca"
    form = "alpaca" if not chats else "messages" if _OPENAI.items() <= tags.items() else "sharegpt"
    ours = _CHATS if chats else _ALPACA
    columns = {"messages" if form == "messages" and ours[key] == "conversations" else ours[key]: column
               for key, column in named.items() if key in ours}
    local = entry.get("file_name")
    source = {"path": str(folder / local) if local else entry.get("hf_hub_url"), "form": form, "columns": columns,
              "name": entry.get("subset"), "split": entry.get("split", "train")}
    return {key: value for key, value in source.items() if value}
