"""Renders a chat template. A sandbox process calls it: jinja2's own sandbox keeps a template from Python, but
not from looping for ever.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST = 10_000
"""The most repetitions of a sequence, and the longest range beyond twice the number of messages."""
MOST_TEXT = 1 << 20
"""The most characters of a text, beyond :data:`GROWTH` times the size of its values."""
GROWTH = 8


def render(request: bytes) -> bytes:
    """Renders ``[template, values]``, in JSON, to a text. ``values["messages"]`` is a list.

    Raises:
        Exception: any exception of the template; OverflowError if it exceeds a limit.
    """
    source, values = json.loads(request)
    most = MOST + 2 * len(values["messages"])
    text: str = _compile(source).render(values, range=partial(_range, most))
    if len(text) > MOST_TEXT + GROWTH * len(request):
        raise OverflowError(f"it writes {len(text)} characters for values of {len(request)}")
    return text.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    return ChatEnvironment().from_string(source)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The jinja2 environment that chat templates expect: that of transformers, without the globals that they
    do not need.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, GenerationExtension]
        )
        self.globals = {
            "dict": _mapping,
            "namespace": _Namespace,
            "raise_exception": _refuse,
            "strftime_now": _now,
        }
        self.filters["tojson"] = _tojson  # jinja2's own filter escapes HTML

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluates ``*`` or ``**`` and refuses very long repetitions."""
        for one, times in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and isinstance(times, int) and times > MOST:
                raise OverflowError(f"it repeats something {times} times, where {MOST} is the most")
        return super().call_binop(context, operator, left, right)


class GenerationExtension(Extension):
    """``{% generation %}`` marks the text to train on; it does not change the output."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> Any:
        """Returns the statements in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace without a deep ``repr``, since it may contain itself, or another one many times."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _mapping(*pairs: Any, **items: Any) -> dict[Any, Any]:
    """Makes a mapping; the type ``dict`` itself would expose more than templates need."""
    return dict(*pairs, **items)


def _range(most: int, *bounds: int) -> range:
    counted = range(*bounds)
    if len(counted) > most:
        raise OverflowError(f"it counts {len(counted)} steps, where {most} is the most")
    return counted


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
