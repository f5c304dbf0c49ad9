"""The arguments of an export as one value, shared by the library call and the command."""

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
    """The arguments of one export; :func:`adapterpack.export` takes these fields and documents them.

    ``base`` is a checkpoint, an ONNX or GGUF file made from the ``checkpoint``, or a finished bundle.
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
    """The number of slots of a bank, including slot 0 for the base."""
    max_rank: int | None = None
    """The largest rank that a slot of a bank can hold."""
    quantize: str | None = None
    """The scheme of the graph's weights."""
    dequantize: bool = False
    """Whether to store the weights of a quantized base as floats."""
    dtype: str = DEFAULT
    """The float type of graph and slots."""
    in_place: bool | None = None
    """Whether the engine's graph, which has a static cache, is required (True), left out (False), or built
    where possible (None).
    """
    cache: str = CACHES[0]
    """The type of keys and values in the engine's graph."""
    frontend: str | None = None
    """The frontend that builds the graph; by default the first whose graph agrees with torch."""
    target: str = "ort"
    """The product that runs the bundle."""
    pooling: str | None = None
    """How to pool hidden states into one vector, for tasks that return them."""
    checkpoint: str | os.PathLike[str] | None = None
    """The checkpoint from which an ONNX or GGUF ``base`` was made."""
    allow_structural: bool = False
    """Whether to accept a base that only matches the packs' base in names, dtypes and shapes."""
    split: int | None = None
    """Size limit in bytes for the data files of a web site."""
    progress: Progress | None = None
    """A function that receives a message at each step."""
    accuracy: str | None = None
    """This field and the following ones control how graphs are quantized; :func:`adapterpack.quantize`
    documents them.
    """
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
