"""Defines a frontend: it takes a checkpoint and a task, and returns float graphs with the scopes of their
nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import onnx_ir as ir

from ...graph_passes import Scope
from ...pack import Pack
from ...registry import Registry
from ...slots import DEFAULT
from ...tasks import MAIN, Task


class ExportSource(NamedTuple):
    """The input of a frontend: the checkpoint in ``folder``, for a task, in a float type.

    ``file`` is an ONNX file of the checkpoint, if the user named one. ``packs`` get slots in the graph;
    folded packs are already merged into the checkpoint.
    """

    folder: Path
    task: Task
    dtype: str = DEFAULT
    file: Path | None = None
    packs: Sequence[Pack] = ()


class BaseGraph(NamedTuple):
    """Float graphs with the inputs of the task's parts: ``model`` computes the answer, ``before`` maps names
    to the graphs that run before it.

    ``scope`` maps a node to the path of the module that it computes. ``paddings``: the sides on which a
    decoder's shorter rows may be padded; the proof decides between them. ``warnings``: the builder's
    warnings.
    """

    model: ir.Model
    scope: Scope
    version: str
    paddings: tuple[str, ...] = ("left",)
    before: Mapping[str, ir.Model] = MappingProxyType({})
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, ir.Model]:
        """Every graph by the name of its part, in running order."""
        return {**self.before, MAIN: self.model}


class Frontend(NamedTuple):
    """A graph builder: ``build`` builds the graphs of a source, and is called only if ``supports`` allows it;
    ``takes`` changes the source before, for the proof, too.

    Frontends of a lower ``rank`` are tried first, until one builds a graph that agrees with the model.
    """

    name: str
    supports: Callable[[ExportSource], bool]
    build: Callable[[ExportSource], BaseGraph]
    rank: int = 50
    takes: Callable[[ExportSource], ExportSource] = lambda source: source


FRONTENDS = Registry("frontend", Frontend, "adapterpack.frontends", "adapterpack.exporting.frontends")
"""Name -> the frontend; a module of this folder registers the one that it defines."""
