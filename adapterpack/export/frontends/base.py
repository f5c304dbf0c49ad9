"""The frontend protocol: a config and a task in, a graph and the scopes of its nodes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..sitemap import Scope


class BaseGraph(NamedTuple):
    """A float graph whose inputs are ``input_ids`` [batch, sequence], ``attention_mask``, and for decoders position ids and past.

    ``paddings``: the sides on which a decoder's shorter rows may be filled up, of which the proof decides.
    """

    model: Any
    scope: Scope
    version: str
    paddings: tuple[str, ...] = ("left",)


class Frontend(NamedTuple):
    """``supports(config, task)`` says whether it may be tried; ``build(folder, task)`` makes the graph."""

    name: str
    supports: Callable[[Mapping[str, Any], str], bool]
    build: Callable[[Path, str], BaseGraph]
