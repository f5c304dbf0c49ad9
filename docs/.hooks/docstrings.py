"""Docstrings as mkdocstrings reads them: "Example:" is a section of examples, and a role such as :class:`Pack` is plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`[.~]*([^`]+)`")
_ERRORS = re.compile(r"^ +[A-Z]\w+(?:, [A-Z]\w+)+(?=: )", re.MULTILINE)
"""Several errors under one reason."""


class PlainDocstrings(griffe.Extension):
    """Changes the text of every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = _ERRORS.sub(lambda found: found[0].replace(", ", " | "), text)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)
