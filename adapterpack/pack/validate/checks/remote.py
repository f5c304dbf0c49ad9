"""Finds JSON keys that make other libraries import or fetch code, at any depth of any JSON file.
AP110-AP111.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....errors import FormatError
from ....io import strict_json
from .context import Budget, Subject
from .finding import Finding, check_rule
from .walk import texts_in, walk

CODE = check_rule("AP110")
PATH = check_rule("AP111")

KEYS: dict[str, tuple[Any, ...]] = {
    "auto_map": (),
    "auto_mapping": (),
    "trust_remote_code": (),
    "_attn_implementation_internal": (),
    "custom_pipelines": (),
    "megatron_core": ("megatron.core",),  # what PEFT writes into every file
    "tokenizer_kwargs": (),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
"""Key -> the values with which it does nothing, besides empty values."""
_LIBRARIES = frozenset({"diffusers", "sentence_transformers", "transformers"})
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def remote_code(
    value: Any, file: str, foreign: bool = False, budget: Budget | None = None
) -> Iterator[Finding]:
    """AP110-AP111 in one JSON value.

    ``foreign``: the file was written by PEFT, which may contain a path on its author's disk and a class of a
    library that PEFT allows.
    """
    suspect = any(text in KEYS or text.endswith("_path") for text in texts_in(value))
    for place, item in (budget or Budget()).over(walk(value), "keys that load code") if suspect else ():
        key = place.key
        if not isinstance(key, str):
            continue
        if key in KEYS and item not in _NOTHING + KEYS[key] and not (foreign and _library_class(key, item)):
            finding = CODE.at(
                f"{file}#{place.pointer}",
                f"'{key}' makes other libraries load code",
                file=file,
                pointer=place.pointer,
            )
            # PEFT writes it for every custom model; this package neither follows nor copies it
            yield finding._replace(severity="warning") if foreign and key == "auto_mapping" else finding
        if not foreign and key.endswith("_path") and isinstance(item, str) and _leaves(item):
            yield PATH.at(
                f"{file}#{place.pointer}",
                f"'{key}' leads out of the pack: {item[:80]!r}",
                file=file,
                pointer=place.pointer,
            )


def in_pack(s: Subject) -> Iterator[Finding]:
    """AP110-AP111 in every JSON file that the pack lists."""
    for name, data in s.file_bytes.items():
        if name.endswith(".json"):
            try:
                value = strict_json.loads(data, name, 4 << 20)
            except FormatError:
                continue  # the check of that file says so
            yield from remote_code(value, name, budget=s.budget)


def _library_class(key: str, item: Any) -> bool:
    library = item.get("parent_library") if isinstance(item, dict) else None
    return key == "auto_mapping" and isinstance(library, str) and library.split(".")[0] in _LIBRARIES


def _leaves(path: str) -> bool:
    return (
        "://" in path
        or path.startswith(("/", "\\", "~"))
        or path[1:2] == ":"
        or ".." in path.replace("\\", "/").split("/")
    )
