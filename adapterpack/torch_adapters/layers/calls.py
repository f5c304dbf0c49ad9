"""Tells which argument of a module's call is which."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import takewhile
from typing import Any

from torch import nn

Args = tuple[Any, ...]
"""The positional arguments of a call."""
Kwargs = dict[str, Any]
"""The keyword arguments of a call."""


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the arguments of a module's ``forward``, as its class defines it, in order, the
    input first; those after ``*args`` are left out.
    """
    return _names_of(type(module).forward)


@lru_cache(maxsize=1024)
def _names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(one.name for one in takewhile(lambda one: one.kind in named, parameters))


def named_arguments(module: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """Returns the arguments of a call of a module by their names."""
    return {**dict(zip(argument_names(module), args, strict=False)), **kwargs}


def input_key(parameter: str | None, args: Args, kwargs: Kwargs) -> int | str:
    """Returns where the input of a call is: 0 for its first positional argument, else the keyword
    ``parameter`` or the first keyword.

    Raises:
        TypeError: the call has no arguments.
    """
    if args:
        return 0
    if not kwargs:
        raise TypeError("a module with adapters was called without an input")
    return parameter if parameter is not None and parameter in kwargs else next(iter(kwargs))
