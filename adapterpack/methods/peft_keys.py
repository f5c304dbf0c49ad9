"""What differs by site, in PEFT's configs and out of them: one value for all, and a pattern of those that are others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import Unsupported
from .config import is_number


def by_site(name: str, values: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """``name``: the value of the first site, ``pattern``: those of the sites that have another.

    PEFT takes a name for the end of a path unless it is anchored.

    Example:
        >>> by_site("r", {"q": 2, "inner.q": 3, "v": 2}, "rank_pattern")
        {'r': 2, 'rank_pattern': {'inner.q': 3}}
    """
    first = next(iter(values.values()))
    differing = {path: value for path, value in values.items() if value != first}
    anchored = {f"^{path}" if any(other.endswith(f".{path}") for other in values) else path: value for path, value in differing.items()}
    return {name: first, pattern: anchored}


def plain(value: float) -> float:
    """A number as PEFT writes it: whole where it is."""
    return int(value) if float(value).is_integer() else value


def literal(pattern: Any, where: str) -> dict[str, Any]:
    """PEFT's pattern as names: PEFT takes the first key that fits the end of a path, we take the longest, so hidden keys are left out.

    Its keys are regular expressions, which are not run here (one can take hours); a key that is more than a name is refused.

    Example:
        >>> literal({"v_proj": 2, "1.v_proj": 4}, "rank_pattern")
        {'v_proj': 2}
    """
    if not isinstance(pattern or {}, Mapping) or not all(map(is_number, (pattern or {}).values())):
        raise ValueError(f"{where} must map names to numbers, not {pattern!r:.80}")
    names: dict[str, Any] = {}
    for key, value in (pattern or {}).items():
        name = key.replace("\\.", ".").removesuffix("$")
        if not re.fullmatch(r"\^?[A-Za-z0-9_.-]+", name):
            raise Unsupported("this PEFT pattern is a regular expression, which is not run", where=where, found=repr(key)[:80],
                              expected="module names", remedy="write the pattern with literal module names")
        if not any(f".{name.removeprefix('^')}".endswith(f".{earlier}") for earlier in names):
            names[name] = value
    return names
