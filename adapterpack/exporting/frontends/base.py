"""The frontend protocol: a config and a task in, graphs and the scopes of their nodes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ...tasks.task import MAIN
from ..graph.sitemap import Scope


class BaseGraph(NamedTuple):
    """Float graphs with the inputs of the task's parts: ``model`` gives the answer, ``before`` are those that run before it, by name.

    ``paddings``: the sides on which a decoder's shorter rows may be filled up, of which the proof decides.
    """

    model: Any
    scope: Scope
    version: str
    paddings: tuple[str, ...] = ("left",)
    before: Mapping[str, Any] = MappingProxyType({})

    @property
    def parts(self) -> dict[str, Any]:
        """Every graph by the name of its part, in the order in which they run."""
        return {**self.before, MAIN: self.model}


class Frontend(NamedTuple):
    """``supports(config, task)`` says whether it may be tried; ``build(folder, task, dtype)`` makes the graphs in a float type."""

    name: str
    supports: Callable[[Mapping[str, Any], str], bool]
    build: Callable[[Path, str, str], BaseGraph]
