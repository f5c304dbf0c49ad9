"""Holds what an export is called with: one value from which the library call and the command follow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

from ..pack.pack import Pack
from ..quantizing.graphs.options import CACHES, GraphOptions
from ..slots.precision import DEFAULT

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of one export: :func:`adapterpack.export` takes these fields and says more of each.

    ``base`` is a checkpoint, or an ONNX or GGUF file that was made of the ``checkpoint``, or a finished
    bundle.
    """

    base: str | os.PathLike[str]
    packs: Sequence[Pack | str | os.PathLike[str]] = ()
    out: str | os.PathLike[str] = "bundle"
    _: KW_ONLY
    mode: str = "bank"
    """``folded``, ``inputs`` or ``bank``."""
    task: str | None = None
    """A Hugging Face pipeline name; by default that of the packs, or of the base's architecture."""
    slots: int | None = None
    """How many slots a bank has, slot 0 for the base included."""
    max_rank: int | None = None
    """The largest rank that a slot of a bank takes."""
    quantize: str | None = None
    """The scheme of the graph's weights."""
    dequantize: bool = False
    """Whether a graph of a quantized base holds floats."""
    dtype: str = DEFAULT
    """The float type of graph and slots."""
    in_place: bool | None = None
    """Whether the engine's graph, whose cache is static, must be made (True) or left out (False)."""
    cache: str = CACHES[0]
    """The type of keys and values in the engine's graph."""
    frontend: str | None = None
    """What builds the graph; by default the first whose graph agrees with torch."""
    target: str = "ort"
    """The product that runs the bundle."""
    pooling: str | None = None
    """How hidden states become one vector, for tasks that give them."""
    checkpoint: str | os.PathLike[str] | None = None
    """The checkpoint that an ONNX or GGUF ``base`` was made of."""
    allow_structural: bool = False
    """Whether a base with the names, dtypes and shapes of the packs' is enough."""
    split: int | None = None
    """Bytes of the largest data file of a web site."""
    progress: Progress | None = None
    """Is called with each step."""
    accuracy: str | None = None
    """This and the fields below say how graphs are quantized: see :func:`adapterpack.quantize`."""
    head: str | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    algorithm: str | None = None
    calibration: str | os.PathLike[str] | None = None
    compensate: int | None = None
    error_budget: float | None = None
    size_budget: int | None = None

    @property
    def graph_options(self) -> GraphOptions:
        """The options of a quantized graph."""
        options: Any = {name: getattr(self, name) for name in GraphOptions.__annotations__}
        return cast(GraphOptions, options)
