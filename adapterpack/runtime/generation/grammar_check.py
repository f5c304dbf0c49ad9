"""Compiles the grammar of an untrusted request. A sandbox process calls it, so the module imports llguidance
and little else.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_STACK = 1 << 20
"""A fraction of the stack of any thread of the caller: a grammar that compiles within it cannot overflow
theirs.
"""
DEFAULTS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON on one line, with or without a space after commas and colons: with free white space a model can emit
spaces for ever. The ``x-guidance`` of a schema overrides this.
"""


def check(request: bytes) -> bytes:
    """Compiles the grammar of ``[kind, text]``, as JSON, to llguidance's form. ``kind`` is the name of a
    sampling parameter.

    Raises:
        ValueError: the text is no such grammar, uses a feature that cannot be enforced, or is too large.
    """
    threading.stack_size(_STACK)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_check_grammar, *json.loads(request)).result().encode()


def limits() -> Any:
    """Returns the limits for compiling a grammar and for one step of it: lower than llguidance's defaults,
    and above the needs of real grammars.
    """
    from llguidance import LLParserLimits  # noqa: PLC0415 - an extra

    return LLParserLimits(max_items_in_row=1000, max_lexer_states=20_000, verbose_errors=False)


def _check_grammar(kind: str, text: str) -> str:
    from llguidance import LLMatcher, grammar_from  # noqa: PLC0415 - an extra

    if kind == "json_schema":  # an unenforceable keyword is an error, even if the schema asks for leniency
        grammar: str = LLMatcher.grammar_from_json_schema(text, DEFAULTS, {"lenient": False})
    else:
        grammar = grammar_from("regex" if kind == "regex" else "grammar", text)
    error = LLMatcher.validate_grammar(grammar, limits=limits())
    if error and not error.startswith("WARNING"):
        raise ValueError(error)
    return grammar
