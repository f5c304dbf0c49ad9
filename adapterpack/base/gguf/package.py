"""The ``gguf`` package, for what is not known here: it is an extra."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError


def library() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf  # noqa: PLC0415 - only what needs it pays for it
    except ImportError as error:
        raise ConfigError("this needs the gguf package", remedy="pip install 'adapterpack[demo]', or pip install gguf") from error
    return gguf
