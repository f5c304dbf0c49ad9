"""Matches a pattern of a configuration with paths, in a process with limits: a pattern can take for ever."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ...errors import ConfigError
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox

_SANDBOX = Sandbox(f"{__name__}:match", SandboxLimits(memory=64 << 20, seconds=2))


def matched(pattern: str, paths: Sequence[str]) -> list[str]:
    """Returns the paths that a pattern matches as a whole, as PEFT reads one.

    Raises:
        ConfigError: it matches none.
        FormatError: it is no regular expression, or takes too long.

    Example:
        >>> matched(r"layers[.](0|2)[.]q_proj", ["layers.0.q_proj", "layers.1.q_proj"])
        ['layers.0.q_proj']
    """
    what = "the pattern of targets cannot be matched"
    found: list[str] = json.loads(_SANDBOX.run(json.dumps([pattern, paths]).encode(), what, "targets"))
    if not found:
        raise ConfigError(
            "the pattern matches no layer of the model",
            where="targets",
            found=repr(pattern)[:200],
            expected=f"a match of a whole path, such as {paths[-1]}" if paths else None,
        )
    return found


def match(request: bytes) -> bytes:
    """Returns which of the paths a pattern matches; runs in the sandbox."""
    pattern, paths = json.loads(request)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    return json.dumps([path for path in paths if compiled.fullmatch(path)]).encode()
