"""What a scheme of quantized graphs is: how it rewrites a graph, and what can be chosen of it; one file in
:mod:`.schemes` each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...registry import Registry
from .product import RoundingSetting
from .stored_weights import StoredWeights
from .tensor_file import TensorFile

Choose = Callable[[str], RoundingSetting | None]
"""The name of a product's node -> what it is quantized to; None: it stays float."""


class Rewriting(NamedTuple):
    """What a graph is rewritten with: ``file`` takes new tensors, ``head`` is the setting of the product that
    gives the logits, and ``second`` gives the mean of ``x xᵀ`` of an input by its name, where an algorithm
    looks at it. ``stored`` are the codes of a quantized base, of a scheme ``of_base``.
    """

    model: ir.Model
    file: TensorFile
    choose: Choose
    head: RoundingSetting | None
    second: Callable[[str], np.ndarray | None] = lambda name: None
    stored: StoredWeights | None = None


@dataclass(frozen=True)
class GraphScheme:
    """One scheme.

    ``rewrite`` changes a graph in place and returns how many of its weights are quantized. ``setting`` is
    what its products get unless the user chooses otherwise among the options ``takes``; None, of a scheme
    that has no codes or chooses by product. ``budgeted``: it searches a setting for each product under a
    budget. ``of_base``: its codes are those of a quantized base, so that only an export writes it.
    ``refused`` says why no graph is written in it.

    ``tolerance`` is the largest change of an output, as a share of the largest, with which a graph is still
    written, and with which fast products are the default. That of a wrong graph is larger; four bits may move
    the outputs of a model as far as that, so their change is recorded and not judged.
    """

    name: str
    summary: str
    rewrite: Callable[[Rewriting], int] | None = None
    setting: RoundingSetting | None = None
    takes: frozenset[str] = frozenset()
    tolerance: float = math.inf
    budgeted: bool = False
    of_base: bool = False
    refused: str = ""


GRAPH_SCHEMES: Registry[GraphScheme] = Registry(
    "quantization scheme for a bundle",
    GraphScheme,
    "adapterpack.quantization_schemes",
    f"{__package__}.schemes",
)
