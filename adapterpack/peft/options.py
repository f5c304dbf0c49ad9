"""Reads PEFT's ``adapter_config.json`` within limits, and refuses it if it contains options that this package
does not understand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapter_methods import METHODS, Method, PeftConfig
from ..errors import FormatError, Unsupported, excerpt, printable
from ..io import FrozenStruct, read_file, strict_json
from ..manifest import manifest as m
from ..resources import table

_MAX_CONFIG = 4 << 20


class KnownOptions(FrozenStruct):
    """The contents of ``options.toml``."""

    said_by_tensors: frozenset[str]
    decisive: dict[str, list[Any]]
    of_some_methods: dict[str, list[Any]]


_KNOWN = table("peft/options.toml", KnownOptions)
_OFF: tuple[Any, ...] = (None, False, "", [], {})
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = ("adapter_model.bin", "adapter_model.pt")
SHARD = re.compile(r"adapter_model-[0-9]{5}-of-[0-9]{5}\.(?:safetensors|bin)")
"""Names of the files that replace PEFT's single tensor file: what PEFT wrote before safetensors, and the
shards of other tools.
"""
TORCHTUNE = re.compile(r"adapter_[0-9]{1,6}\.pt")
"""Names of torchtune's own adapter files."""
_CONVERT = "adapterpack convert SRC --to pack -o OUT"
PICKLED = f"make a pack of it: {_CONVERT} takes the tensors out of it and runs nothing"
"""What to do with an adapter in a pickle."""


_NOT_READ: dict[str, tuple[str, str]] = {
    "XLORA": (
        "its experts are folders elsewhere, which a configuration names and nobody here opens",
        f"copy the experts' folders into it, as experts/0, experts/1, ..., and convert it: {_CONVERT}",
    ),
    "SHADOW": (
        "a package of its own brings it, which is not installed here",
        "install examples/shadow_peft of adapterpack's sources, or use PEFT",
    ),
}
"""Types of PEFT that are not read -> why, and what to do instead."""


def not_read(config: PeftConfig, known: Sequence[Method], where: Path) -> Unsupported:
    """Returns the error for a configuration that no method reads."""
    kind = config.get("peft_type")
    if "peft_type" not in config:
        return Unsupported(
            "this is not a folder of PEFT's: its configuration names no peft_type",
            where=where,
            expected="peft_type",
            found=printable(", ".join(sorted(config))[:200]),
            remedy=f"{_CONVERT} reads what other tools wrote (docs/formats.md)",
        )
    why, remedy = _NOT_READ.get(str(kind), ("", ""))
    return Unsupported(
        f"this PEFT method is not supported{': ' if why else ''}{why}",
        where=where,
        found=kind,
        expected=", ".join(sorted({method.peft.peft_type for method in known if method.peft})),
        remedy=remedy or "merge this adapter with the library that made it",
    )


def likely(config: PeftConfig) -> list[Method]:
    """Returns the method with the config's own name, if it understands every option that is on, so that no
    other method needs to be tried.
    """
    method = METHODS.find(str(config.get("peft_type")).lower())
    if method is None or method.peft is None:
        return []
    written = method.peft.to_config({"": method.examples[0]}) or {}
    on = {key for key, value in config.items() if value not in _OFF and not _is_harmless(key, value)}
    return [method] if on <= written.keys() else []


def _is_harmless(key: str, value: Any) -> bool:
    """Whether an option is known to change nothing with this value."""
    off = _KNOWN.decisive.get(key, _KNOWN.of_some_methods.get(key))
    return key in _KNOWN.said_by_tensors or (off is not None and (value is None or value in off))


def read_config(path: Path) -> dict[str, Any]:
    """Reads the configuration from a file, up to a size limit."""
    data = read_file(path, _MAX_CONFIG + 1)
    if len(data) > _MAX_CONFIG:
        raise FormatError(
            "the PEFT configuration is too large", where=path, expected=f"at most {_MAX_CONFIG} bytes"
        )
    return parse_config(data, path)


def parse_config(data: bytes, path: Path) -> dict[str, Any]:
    """Parses the configuration in the bytes of a file.

    Raises:
        FormatError: the bytes are not a JSON object.
    """
    config = strict_json.loads(data, path, _MAX_CONFIG)
    if not isinstance(config, dict):
        raise FormatError("this is not a PEFT configuration", where=path, expected="an object with peft_type")
    return config


def unknown_options(
    config: PeftConfig, written: PeftConfig, layers: Sequence[PeftConfig], where: Path
) -> dict[str, Any]:
    """Returns the options, with their values, that this package does not know and that are off (None, False,
    0 or empty).

    A newer PEFT has options that this package does not know. Nearly all options added so far are off unless a
    user enables them, so a folder in which they are off most likely means what it always did, and is read.
    But an option that is on by default would change the result by being off, and nothing in the folder shows
    that; callers must therefore report the returned options to the user.

    An option that the method writes itself is understood; ``layers`` are the options that say what kind of
    layer the tensors belong to.

    Raises:
        Unsupported: an unknown option is on, and would change the result silently.
    """
    unknown = {}
    for key, value in config.items():
        understood = key in written and (key not in _KNOWN.decisive or value == written[key])
        if understood or _is_harmless(key, value):
            continue
        if any(key in options and options[key] == value for options in layers):
            continue
        if key in _KNOWN.decisive or key in _KNOWN.of_some_methods or value not in _OFF:
            raise Unsupported(
                f"this PEFT option is not supported: {key}",
                where=f"{where}#/{key}",
                found=excerpt(value),
                remedy="merge this adapter with the library that made it, or train it without that option",
            )
        unknown[key] = value
    return unknown


def unknown_sentence(unknown: PeftConfig) -> str:
    """Returns what to tell a user about options that are off and unknown.

    Example:
        >>> unknown_sentence({"use_warp": False})  # doctest: +ELLIPSIS
        'options of PEFT that are not known here, and off: use_warp=False; one that is on by default ...'
    """
    listed = ", ".join(f"{printable(key[:60])}={value!r}" for key, value in list(unknown.items())[:10])
    return (
        f"options of PEFT that are not known here, and off: {listed}; one that is on by default would make "
        "this another adapter"
    )


def require_tensors(file: Path) -> None:
    """Checks that the tensors of an adapter are in the expected ``file``, or that there are none at all.

    Raises:
        Unsupported: the tensors are in a pickle, in several files, or in torchtune's own format; the error
            says what reads them.
    """
    if file.exists() or not file.parent.is_dir():
        return
    paths = sorted(file.parent.iterdir())
    for names, what, remedy in _OTHER_FILES:
        if found := next((path for path in paths if names.fullmatch(path.name)), None):
            raise Unsupported(what, where=found, expected=file.name, remedy=remedy)


_OTHER_FILES = (
    (
        re.compile("|".join(map(re.escape, PICKLES))),
        "the adapter is stored as a pickle, which can run code and is not opened here",
        PICKLED,
    ),
    (
        SHARD,
        "the adapter's tensors are in several files, of which PEFT reads none",
        f"make a pack of them: {_CONVERT}",
    ),
    (
        TORCHTUNE,
        "the adapter is stored in torchtune's own form, a pickle with torchtune's names",
        f"make a pack of it: {_CONVERT} --base BASE takes the tensors out of it and runs nothing",
    ),
)
"""Names of files that hold an adapter's tensors in another form, the problem, and the remedy."""


def base_hint(config: PeftConfig) -> m.Base:
    """Returns the base by its hub name, if it has one. A local path means nothing on other machines and is
    not written to the manifest.
    """
    hint = config.get("base_model_name_or_path")
    revision = config.get("revision")
    if not isinstance(hint, str) or len(hint) > 200 or not _HUB_ID.fullmatch(hint):
        return m.Base()
    return m.Base(hint, revision if isinstance(revision, str) and _COMMIT.fullmatch(revision) else None)
