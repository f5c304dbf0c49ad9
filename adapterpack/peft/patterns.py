"""Converts the regular expressions of an untrusted PEFT configuration to literal module paths.

RE2 runs them: its time is linear in the pattern and the text and its memory is bounded, so no pattern can
stall a reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import FormatError, Unsupported, excerpt

_NAME = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+\$?")
_MAX_KEYS = 1024
_MAX_LENGTH = 1024
_MAX_MEMORY = 1 << 20


def is_expression(pattern: Any) -> bool:
    """Whether some key of a pattern is more than the end of a module's path.

    Example:
        >>> is_expression({"1.v_proj": 4}), is_expression({"layers.[0-3].v_proj": 4}), is_expression(None)
        (False, True, False)
    """
    return isinstance(pattern, Mapping) and not all(
        isinstance(key, str) and _NAME.fullmatch(key) for key in pattern
    )


def expand(pattern: Mapping[str, Any], paths: Iterable[str], where: str) -> dict[str, Any]:
    """Returns the value of a pattern for each of ``paths``, with anchored keys; as in PEFT, the first key
    that matches the end of a path counts.

    Raises:
        FormatError: a key is not a string or too long, or there are too many keys.
        Unsupported: a key needs more than linear time, such as a look-ahead or a back-reference.

    Example:
        >>> expand({"layers.[0-3].v_proj": 4}, ["layers.1.v_proj", "layers.4.v_proj"], "rank_pattern")
        {'^layers.1.v_proj': 4}
    """
    if len(pattern) > _MAX_KEYS or not all(isinstance(key, str) for key in pattern):
        raise FormatError(
            "a pattern has too many keys, or keys that are no texts",
            where=where,
            expected=f"at most {_MAX_KEYS} texts",
            found=len(pattern),
        )
    compiled = [(_compile(rf"(?:.*\.)?(?:{key})", key, where), value) for key, value in pattern.items()]
    value_by_path = {}
    for path in paths:
        for expression, value in compiled:
            if expression.fullmatch(path):
                value_by_path[f"^{path}"] = value
                break
    return value_by_path


def match_paths(expression: str, paths: Iterable[str], where: str) -> list[str]:
    r"""Returns the paths that an expression matches in full, which is how PEFT reads a ``target_modules``
    that is a string.

    Raises:
        FormatError: the expression is too long.
        Unsupported: the expression needs more than linear time.

    Example:
        >>> match_paths(r".*\.[qv]_proj", ["layers.1.v_proj", "layers.1.k_proj"], "target_modules")
        ['layers.1.v_proj']
    """
    compiled = _compile(f"(?:{expression})", expression, where)
    return [path for path in paths if compiled.fullmatch(path)]


def _compile(expression: str, shown: str, where: str) -> Any:
    """Compiles an expression that runs in bounded time; ``shown`` is its text in the file, for errors."""
    if len(shown) > _MAX_LENGTH:
        raise FormatError(
            "an expression is too long",
            where=where,
            expected=f"at most {_MAX_LENGTH} characters",
            found=len(shown),
        )
    import re2  # noqa: PLC0415 - only for the few files that hold an expression

    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.log_errors = False
    try:
        return re2.compile(expression, options)
    except re2.error as error:
        reason = (
            error.args[0].decode("utf-8", "replace")
            if error.args and isinstance(error.args[0], bytes)
            else str(error)
        )
        raise Unsupported(
            f"this PEFT pattern cannot be run in bounded time: {reason[:120]}",
            where=where,
            found=excerpt(shown),
            expected="an expression without look-around and back-references",
            remedy="write the pattern with literal module names",
        ) from error
