"""Renders pages from the jinja2 templates in ``templates/``; the environment escapes every value."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ..io.readable import count, percent, seconds, small
from ..palette import DARK, LIGHT, variables
from ..resources import templates
from .text import escaped

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = b"default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What every page has near its beginning: the policy by which it loads nothing."""


def render(name: str, /, **values: Any) -> str:
    """The template ``name`` with these values; a value that it names and does not get is an error.

    Example:
        >>> "--page:#ffffff" in render("style.css.jinja")
        True
    """
    return environment().get_template(name).render(**values)


@cache
def environment() -> Environment:
    """The environment of the pages' templates: markup in a value is shown as text; only
    :class:`markupsafe.Markup` passes as it is.
    """
    made = templates(__package__, escaped)
    made.filters.update(count=count, percent=percent, seconds=seconds, small=small)
    made.globals.update(light=LIGHT, dark=DARK, variables=variables)
    return made
