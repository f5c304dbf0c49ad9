"""Tells by its form whether a base is named as a hub names it."""

from __future__ import annotations

import re

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = re.compile(f"{_PART}/{_PART}")


def is_repo(text: str) -> bool:
    """Returns whether a text is OWNER/NAME in plain ASCII, as every hub accepts it.

    Example:
        >>> is_repo("org/name"), is_repo("../name"), is_repo("name")
        (True, False, False)
    """
    return (
        _REPO.fullmatch(text) is not None
        and ".." not in text
        and "--" not in text
        and not text.endswith((".git", ".", "-"))
    )
