"""Refuses to publish text that contains secrets. The error names their kind and place, never their
characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import ConfigError

PATTERNS: dict[str, re.Pattern[bytes]] = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{20,}"),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})"),
    "an API key": re.compile(rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"),
    "an address with a password": re.compile(rb"https?://[^/\s:@\"']{1,100}:[^/\s:@\"']{1,100}@"),
}
"""Kind of secret -> its pattern, which runs in linear time."""


def refuse_secrets(files: Mapping[str, bytes]) -> None:
    """Searches the texts that are to be published for secrets.

    Raises:
        ConfigError: a text contains something that looks like a secret.

    Example:
        >>> refuse_secrets({"README.md": b"nothing to see"})
    """
    for name, data in files.items():
        for what, pattern in PATTERNS.items():
            if match := pattern.search(data):
                raise ConfigError(
                    f"a file to be published holds what looks like {what}",
                    where=f"{name}, byte {match.start()}",
                    remedy="revoke it, take it out and pack the adapter again; nothing was sent",
                )
