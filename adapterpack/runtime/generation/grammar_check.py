"""Compiles a grammar of a stranger where it can do no harm: the function that a sandbox calls. It imports
llguidance and little else.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_STACK = 1 << 20
"""A fraction of what any thread of the caller has: a grammar that compiles on this stack does not break a
larger one.
"""
_DEFAULTS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON is written on one line, with a space after commas and colons or without: free white space can go on
for ever. The schema's own ``x-guidance`` may say otherwise.
"""


def check(request: bytes) -> bytes:
    """The grammar of ``[kind, text]`` in llguidance's form. ``kind`` is the name of a sampling parameter.

    Raises:
        ValueError: it is none, needs what cannot be enforced, or is too large.
    """
    threading.stack_size(_STACK)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_check_grammar, *json.loads(request)).result().encode()


def limits() -> Any:
    """What compiling a grammar and one step of it may take: lower than llguidance's own limits, and above
    what real grammars need.
    """
    from llguidance import LLParserLimits  # noqa: PLC0415 - an extra

    return LLParserLimits(max_items_in_row=1000, max_lexer_states=20_000, verbose_errors=False)


def _check_grammar(kind: str, text: str) -> str:
    from llguidance import LLMatcher, grammar_from  # noqa: PLC0415 - an extra

    if kind == "json_schema":  # a keyword that cannot be enforced is an error, whatever the schema says of it
        grammar: str = LLMatcher.grammar_from_json_schema(text, _DEFAULTS, {"lenient": False})
    else:
        grammar = grammar_from("regex" if kind == "regex" else "grammar", text)
    error = LLMatcher.validate_grammar(grammar, limits=limits())
    if error and not error.startswith("WARNING"):
        raise ValueError(error)
    return grammar
