"""Reads the user's configuration: a small TOML file with defaults for environment variables, and thereby for
options.

The order of precedence is: the option, the environment variable, the file, the default. The library itself
reads only the environment.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, require_among, storage_errors
from ..io import Json, read_at_most

VARIABLE = "ADAPTERPACK_CONFIG"
PROVIDER, THREADS = "ADAPTERPACK_PROVIDER", "ADAPTERPACK_THREADS"
_MAX_BYTES = 1 << 16
_LONGEST = 4096


class ConfigKey(NamedTuple):
    """A key of the file: the variable for which it sets a default, the values that it accepts, and its
    description.
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
    "revoked": ConfigKey("ADAPTERPACK_REVOKED", _is_text, "a path", "the list of what was revoked"),
    "provider": ConfigKey(PROVIDER, _is_text, "a name", "where bundles run, as --provider"),
    "threads": ConfigKey(
        THREADS,
        lambda value: type(value) is int and 1 <= value <= 4096,
        "a number from 1 to 4096",
        "threads of operators on the CPU, as --threads",
    ),
}


def config_file() -> Path | None:
    """Returns the path of the configuration file: ``ADAPTERPACK_CONFIG``, or the default in the user's
    configuration folder; None if that variable is empty.

    Example:
        >>> config_file() is None or config_file().suffix == ".toml"
        True
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "adapterpack" / "config.toml"


def apply_config_file() -> None:
    """Sets the environment variables that are not set to the values in the file.

    Raises:
        StorageError: the variable names a file that does not exist, or the file cannot be read.
        ConfigError: the file is too large, is not TOML, or has an unknown key or value.
    """
    path = config_file()
    if path is None or (VARIABLE not in os.environ and not path.exists()):
        return
    for name, value in _read(path).items():
        os.environ.setdefault(SETTINGS[name].variable, str(value))


def _read(path: Path) -> Json:
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
            "the configuration is not valid TOML", where=path, found=str(error), remedy="mend that line"
        ) from error
    for name, value in values.items():
        require_among("unknown key in the configuration", name, SETTINGS, ConfigError, path)
        if not SETTINGS[name].fits(value):
            raise ConfigError(
                f"{name} has a value that it does not take",
                where=path,
                expected=SETTINGS[name].expected,
                found=repr(value),
                remedy="see docs/configuration.md",
            )
    return values
