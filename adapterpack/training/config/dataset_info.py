"""Reads ``dataset_info.json``, the list of data sets from which LLaMA-Factory's configurations choose by
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, nearest
from ...io import read_file, resolved_inside, strict_json
from ...resources import table
from .fields import Settings
from .other_datasets import Stop

INFO = "dataset_info.json"
_MOST = 1 << 20
_NAMES = table("training/config/dataset_info.toml", dict[str, dict[str, dict[str, str]]])
_COLUMNS, _TAGS = _NAMES["columns"], _NAMES["tags"]
_READ = frozenset({"file_name", "hf_hub_url", "columns", "formatting", "tags", "ranking", "subset", "split"})
_WHERE = frozenset({"file_name", "hf_hub_url"})
_ELSEWHERE = frozenset({"ms_hub_url", "om_hub_url"})
"""Other hubs, which are ignored if the data is also in a file or on the Hugging Face hub."""


def listed_sources(
    value: Any, folder: str | Path, most: int | None, media: str | None
) -> list[str | dict[str, Any]]:
    """Returns the data sources that names of data sets stand for in the list in a folder, with at most
    ``most`` rows of each. A name with a suffix is a file's path. Paths of pictures start from ``media``, or
    from the list's folder.

    Raises:
        ConfigError: the list is missing, lacks a data set, or is not a list of data sets.
    """
    names = [str(name).strip() for name in (value.split(",") if isinstance(value, str) else value)]
    info = None
    sources = list[str | dict[str, Any]]()
    for name in names:
        if Path(name).suffix:
            sources.append(name)
            continue
        if info is None:
            info = _info(folder)
        source = {**_source(name, info, Path(folder)), **({"max_samples": most} if most else {})}
        seen = {"media_dir": media or str(folder)} if "images" in source.get("columns", {}) else {}
        sources.append({**source, **seen})
    return sources


def _info(folder: str | Path) -> Settings:
    """Reads the list of data sets in a folder."""
    if str(folder).startswith(("REMOTE:", "ONLINE")):
        raise Stop(
            "the data sets are looked up in a local folder; download it, and name it under dataset_dir"
        )
    folder = Path(folder)
    if not (folder / INFO).exists():
        raise ConfigError(
            "the list of data sets is missing",
            where=folder / INFO,
            remedy="run the command from the folder above, as with LLaMA-Factory, or set dataset_dir",
        )
    info = strict_json.loads(read_file(folder / INFO, _MOST), folder / INFO, _MOST)
    if not isinstance(info, Mapping):
        raise ConfigError(
            "the list of data sets must be a JSON object of names and entries", where=folder / INFO
        )
    return info


def _source(name: str, info: Settings, folder: Path) -> Settings:
    """Returns the source that an entry of the list describes; raises if the entry has settings that are not
    supported.
    """
    entry = info.get(name)
    if not isinstance(entry, Mapping):
        raise ConfigError(
            "the list has no such data set",
            where=folder / INFO,
            found=repr(name),
            remedy=nearest(name, map(str, info)),
        )
    place = f"{folder / INFO}, {name}"
    named, tags = entry.get("columns") or {}, entry.get("tags") or {}
    chats = entry.get("formatting", "alpaca") != "alpaca"
    openai = _TAGS["openai"].items() <= tags.items()
    judged = "kto_tag" in named
    ranked = bool(entry.get("ranking"))
    if judged:
        ours = _COLUMNS["labelled_chats" if chats else "labelled"]
        form = "labelled-chats" if chats else "labelled-answers"
    else:
        ours = _COLUMNS["chats" if chats else "alpaca"]
        form = ("sharegpt" if chats else "alpaca") + ("-pairs" if ranked else "")
        form = "messages" if openai and not ranked else form
    read = _READ | (_ELSEWHERE if _WHERE & entry.keys() else frozenset())
    # Refuse what this package does not read, instead of training on other data than LLaMA-Factory would.
    unread = [key for key, value in entry.items() if value and key not in read]
    unread += [f"columns: {key}" for key, value in named.items() if value and key not in ours]
    known = {**_TAGS["openai"], **_TAGS["openai_too"]} if openai else _TAGS["sharegpt"]
    unread += [f"tags: {key}: {value}" for key, value in tags.items() if known.get(key) != value]
    if ranked and named.get("images"):
        unread.append("columns: images with ranking")
    if not judged and not ranked:
        unread += [f"columns: {key}" for key in ("chosen", "rejected") if named.get(key)]
    if (ranked and openai) or (judged and chats and not openai):
        what, whose = ("ranking", "OpenAI") if ranked else ("kto_tag", "ShareGPT")
        unread.append(f"{what} with messages as {whose} has them")
    if unread:
        raise ConfigError(
            "the list describes this data set by settings that are not supported",
            where=place,
            found=", ".join(unread),
            remedy="bring the data into one of the forms of docs/train.md, and name it under train_file",
        )
    columns = {
        "messages" if form == "messages" and ours[key] == "conversations" else ours[key]: column
        for key, column in named.items()
        if column
    }
    source = {
        "path": entry.get("hf_hub_url") or _below(folder, entry.get("file_name"), place),
        "form": form,
        "columns": columns,
        "name": entry.get("subset"),
        "split": entry.get("split", "train"),
    }
    return {key: value for key, value in source.items() if value}


def _below(folder: Path, name: Any, where: object) -> str | None:
    """Returns the path of a file that the list names, which must be in the list's folder: the author of the
    list may be a stranger, and other files on this machine are none of the list's.

    Raises:
        ConfigError, FormatError: it is elsewhere, or a link leads elsewhere.
    """
    if name is None:
        return None
    path = folder / str(name)
    if Path(str(name)).is_absolute() or ".." in path.relative_to(folder).parts:
        raise ConfigError(
            "the list names a file outside of its own folder",
            where=where,
            found=repr(name)[:200],
            remedy="if you trust the list, name the file under train_file",
        )
    resolved_inside(path, folder)
    return str(path)
