"""Reads and copies the small files of a base's folder, and refuses bases that would make a library run or
fetch code.

Everything that opens a base calls :func:`require_harmless` first, since transformers follows links and
imports what a configuration names.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError, Unsupported, storage_errors
from ..io import (
    Config,
    Identity,
    copy_file,
    identity,
    open_inside,
    read_at_most,
    resolved_inside,
    strict_json,
)
from .renamings import is_known

CONFIG = "config.json"
MAX_JSON = 64 << 20
CARRIED = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Files that define a model's inputs, tokenizer and templates."""
RUNS_CODE = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "use_pretrained_backbone",
        "_attn_implementation_internal",
        "auto_mapping",
    }
)
"""Configuration keys that name code, or weights elsewhere, for a library to fetch and import."""
_CHOOSES_KERNELS = "_implementation"
"""The ending of keys that choose an implementation of attention or experts: one of transformers' own, or a
repository of compiled code.
"""
_REMEDY = (
    "convert the checkpoint to a class that transformers has, with transformers, or register its class in "
    "Python before you call adapterpack; then delete that key from a copy of the file"
)
_HARMLESS: set[tuple[Identity, ...]] = set()
"""Configurations that this process has already checked, by the identity of their files."""


def read_json(path: Path, folder: Path | None = None) -> Any:
    """Returns a JSON file of the base in ``folder`` (default: the file's own folder), parsed strictly.

    Raises:
        FormatError: it is not a regular file of that folder, or not strict JSON.
    """
    with open_inside(path, folder) as file:
        data = read_at_most(file, MAX_JSON + 1)
    # Tokenizers write 10^30 where they mean "no limit".
    return strict_json.loads(data, path, MAX_JSON, max_integer=float("inf"))


def write_json(path: Path, value: Any) -> None:
    """Writes a configuration as transformers lays it out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def carried_files(folder: Path, names: Iterable[str] = ()) -> list[Path]:
    """Returns the files of a base that are copied into a merged checkpoint or a bundle: config, tokenizer,
    templates; never weights or code.
    """
    wanted = CARRIED.union(names)
    return sorted(path for path in folder.iterdir() if path.name in wanted and path.is_file())


def copy_carried(source: Path, target: Path, names: Iterable[str] = ()) -> None:
    """Copies the files of :func:`carried_files` into another folder, where it replaces leftovers of a killed
    process.

    The copied config lacks ``auto_map`` where transformers has its own class and would not read it.

    Raises:
        FormatError: a link leads out of the folder.
        StorageError: the file system refuses.
    """
    for path in carried_files(source, names):
        (target / path.name).unlink(missing_ok=True)
        if path.name == CONFIG and (plain := without_code(config := read_json(path))) != config:
            write_json(target / path.name, plain)
        else:
            copy_file(path, target / path.name)


def require_harmless(folder: Path) -> None:
    """Raises if a file of a base is not a regular file of its folder, or if a configuration names code.

    Raises:
        FormatError: there is a pipe, a device, a link that leads out, or a configuration that is not JSON.
        Unsupported: a configuration names code.
    """
    with storage_errors(folder):
        configs = [
            path for path in sorted(folder.iterdir()) if _is_plain(path) and path.name.endswith("config.json")
        ]
    identities = tuple(map(identity, configs))
    if identities in _HARMLESS:
        return
    for path in configs:
        for holder in objects(read_json(path)):
            for key, value in holder.items():
                if not _runs_code(key, value) or (path.name == CONFIG and _is_unread(key, holder)):
                    continue
                raise Unsupported(
                    "the base names code of its own or of somebody else, which is never run",
                    where=path,
                    found=f"{key}: {value!r:.100}",
                    expected="a class that transformers has",
                    remedy=_REMEDY,
                )
    if all(one.settled for one in identities):
        _HARMLESS.add(identities)


def _is_plain(path: Path) -> bool:
    """Whether a path is a file and not a folder; raises if it is neither."""
    mode = resolved_inside(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FormatError("only regular files may lie in a base", where=path, remedy="remove it")
    return stat.S_ISREG(mode)


def named_values(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key at any depth, with its value."""
    for holder in objects(value):
        yield from holder.items()


def objects(value: Any) -> Iterator[Config]:
    """Yields every object at any depth, including the value itself."""
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        yield value
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    for item in inner:
        yield from objects(item)


def without_code(value: Any) -> Any:
    """Returns a configuration without keys that name code where transformers has a class of its own, so that
    nothing reads them.

    Example:
        >>> without_code({"model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}})
        {'model_type': 'phi3'}
    """
    if isinstance(value, list):
        return [without_code(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {key: without_code(item) for key, item in value.items() if not _is_unread(key, value)}


def _is_unread(key: str, holder: Config) -> bool:
    """Whether a key names code that never runs: transformers prefers its own class, unless
    ``trust_remote_code`` is set, which this package never does.
    """
    return key == "auto_map" and is_known(holder.get("model_type"))


def _runs_code(key: str, value: Any) -> bool:
    """Whether a key with this value makes a library run or fetch code."""
    if key.removesuffix("_internal").endswith(_CHOOSES_KERNELS):
        chosen = value.values() if isinstance(value, Mapping) else [value]
        return any(not isinstance(one, str | None) or "/" in (one or "") for one in chosen)
    return key in RUNS_CODE and bool(value)
