"""Defines a frontend: a checkpoint and a task in, float graphs and the scopes of their nodes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import onnx_ir as ir

from ...graph_passes.sites import Scope
from ...pack.pack import Pack
from ...registry import Registry
from ...slots.precision import DEFAULT
from ...tasks.task import MAIN, Task


class ExportSource(NamedTuple):
    """What a graph is made from: the checkpoint in ``folder``, for a task, in a float type.

    ``file`` is the ONNX file that somebody made from the checkpoint, if the user named one. ``packs`` are
    those that the graph gets slots for; packs that are folded are in the checkpoint's numbers already.
    """

    folder: Path
    task: Task
    dtype: str = DEFAULT
    file: Path | None = None
    packs: Sequence[Pack] = ()


class BaseGraph(NamedTuple):
    """Float graphs with the inputs of the task's parts: ``model`` gives the answer, ``before`` are those that
    run before it, by name.

    ``scope`` maps a node to the path of the module that it computes. ``paddings``: the sides on which a
    decoder's shorter rows may be padded; the proof decides which of them. ``warnings``: what the builder
    warned of.
    """

    model: ir.Model
    scope: Scope
    version: str
    paddings: tuple[str, ...] = ("left",)
    before: Mapping[str, ir.Model] = MappingProxyType({})
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, ir.Model]:
        """Every graph by the name of its part, in the order in which they run."""
        return {**self.before, MAIN: self.model}


class Frontend(NamedTuple):
    """Makes graphs: ``build`` makes those of a source, and is tried only where ``supports`` says so.

    Frontends of a lower ``rank`` are tried first, until one makes a graph that agrees with the model.
    """

    name: str
    supports: Callable[[ExportSource], bool]
    build: Callable[[ExportSource], BaseGraph]
    rank: int = 50


FRONTENDS: Registry[Frontend] = Registry(
    "frontend", Frontend, "adapterpack.frontends", "adapterpack.exporting.frontends"
)
"""Name -> the frontend; a file of this folder registers the one that it defines."""
