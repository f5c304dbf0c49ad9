"""Checks the YAML at the head of a README, which strangers write, in time that grows with its length
alone.
"""

from __future__ import annotations

from ...errors import ConfigError
from ...io import plain_yaml

_LONGEST = 256 << 10


def problem(text: str) -> str | None:
    """What is wrong with the header; None for a mapping.

    Example:
        >>> problem("license: mit"), problem("- mit")
        (None, 'the header is no mapping')
    """
    if len(text) > _LONGEST:
        return f"the header is longer than {_LONGEST} characters"
    try:
        value = plain_yaml.loads(text, None, what="the header is not YAML")
    except ConfigError as error:
        return error.what
    return None if isinstance(value, dict) else "the header is no mapping"
