"""Renders messages by the chat template that came with a model: compiled once, within limits of time and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError

from ..library_errors import library_errors
from .limits import BoundedEnvironment, metered
from .meter import ROOM, SECONDS, Meter

Message = Mapping[str, Any]

MAX_SOURCE = 256 << 10
_LONGEST_DATE = 1000


class ChatTemplate:
    """A template that a stranger wrote. ``seconds`` and ``room`` limit one rendering, see :class:`~.limits.Meter`.

    Example:
        >>> ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}").render([{"role": "user", "content": "Hi"}])
        '<user>Hi'
    """

    def __init__(self, source: str, where: object = None, seconds: float = SECONDS, room: int = ROOM) -> None:
        self.source, self.where = source, where
        self._seconds, self._room = seconds, room

    @cached_property
    def _compiled(self) -> Any:
        if len(self.source) > MAX_SOURCE:
            raise TemplateError(f"it has {len(self.source)} characters, and {MAX_SOURCE} are the most")
        environment = BoundedEnvironment()
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        return environment.compiled(self.source)

    def render(self, messages: Sequence[Message], special: Mapping[str, Any] | None = None) -> str:
        """The messages in the template's form, ready for the model's answer. ``special`` are special tokens by name.

        Raises:
            FormatError: the template cannot be compiled, does not render, or takes more time or space than a template needs.
        """
        values = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True, **(special or {})}
        with library_errors("jinja2", "the chat template does not render", where=self.where,
                            remedy="give a list of token ids, or use a tokenizer with another chat template"):
            compiled = self._compiled
            with metered(Meter(values, self._seconds, self._room)):
                text: str = compiled.render(values)
        return text


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    if len(form) > _LONGEST_DATE:
        raise TemplateError("it asks for a very long date")
    return datetime.now().strftime(form)
