"""The user's configuration: a small TOML file that gives defaults to environment variables, and thereby to
options.

What counts is, in this order: the option, the environment variable, the file, the default. The library reads
the environment alone.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, nearest, storage_errors
from ..io.safe_open import read_at_most

VARIABLE = "ADAPTERPACK_CONFIG"
PROVIDER, THREADS = "ADAPTERPACK_PROVIDER", "ADAPTERPACK_THREADS"
_MAX_BYTES = 1 << 16
_LONGEST = 4096


class ConfigKey(NamedTuple):
    """A key of the file: the variable that it gives a default to, the values that it takes, and what it is,
    in words.
    """

    variable: str
    fits: Callable[[Any], bool]
    expected: str
    about: str


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and "\0" not in value


SETTINGS = {
    "cache": ConfigKey("ADAPTERPACK_CACHE", _is_text, "a path", "the folder of caches"),
    "hub": ConfigKey("HF_ENDPOINT", _is_text, "an address", "the hub in place of the public one"),
    "log": ConfigKey("ADAPTERPACK_LOG", _is_text, "text or json", "the form of messages on stderr"),
    "provider": ConfigKey(PROVIDER, _is_text, "a name", "where bundles run, as --provider"),
    "threads": ConfigKey(
        THREADS,
        lambda value: type(value) is int and 1 <= value <= 4096,
        "a number from 1 to 4096",
        "threads of operators on the CPU, as --threads",
    ),
}


def config_file() -> Path | None:
    """Where the file is looked for: ``ADAPTERPACK_CONFIG``, or in the user's folder of configurations; None
    where that variable is empty.

    Example:
        >>> config_file() is None or config_file().suffix == ".toml"
        True
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "adapterpack" / "config.toml"


def apply_config_file() -> None:
    """Gives the environment variables that are not set what the file says.

    Raises:
        StorageError: the file is named by the variable and is not there, or it cannot be read.
        ConfigError: it is too large, is no TOML, or has a key or a value that there is not.
    """
    path = config_file()
    if path is None or (VARIABLE not in os.environ and not path.exists()):
        return
    for name, value in _read(path).items():
        os.environ.setdefault(SETTINGS[name].variable, str(value))


def _read(path: Path) -> dict[str, Any]:
    with storage_errors(path), path.open("rb") as file:
        data = read_at_most(file, _MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            "the configuration is too large",
            where=path,
            expected=f"at most {_MAX_BYTES} bytes",
            remedy="shorten it",
        )
    try:
        values = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            "the configuration is no TOML", where=path, found=str(error), remedy="mend that line"
        ) from error
    for name, value in values.items():
        if name not in SETTINGS:
            raise ConfigError(
                "unknown key in the configuration",
                where=path,
                found=repr(name),
                remedy=nearest(name, SETTINGS),
            )
        if not SETTINGS[name].fits(value):
            raise ConfigError(
                f"{name} has a value that it does not take",
                where=path,
                expected=SETTINGS[name].expected,
                found=repr(value),
                remedy="see docs/configuration.md",
            )
    return values
