"""Defines a scheme of quantized graphs: how it rewrites a graph, and which options it takes. Each module of
:mod:`.schemes` registers schemes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from ...registry import Registry
from .product import RoundingSetting, Second
from .stored_weights import StoredWeights
from .tensor_file import TensorFile

Choose = Callable[[str], RoundingSetting | None]
"""The name of a product's node -> its setting; None: it stays float."""


class Rewriting(NamedTuple):
    """The inputs of rewriting a graph: ``file`` takes new tensors, ``head`` is the setting of the product
    that computes the logits, and ``second`` returns the mean of ``x xᵀ`` of an input by its name, for
    algorithms that use it. ``stored`` holds the codes of a quantized base, for a scheme ``of_base``.
    ``tick`` is called for each product.
    """

    model: ir.Model
    file: TensorFile
    choose: Choose
    head: RoundingSetting | None
    second: Second
    stored: StoredWeights | None = None
    tick: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class GraphScheme:
    """A scheme of quantized graphs.

    ``rewrite`` changes a graph in place and returns how many of its weights are quantized. ``setting`` is the
    default setting of its products, which the options ``takes`` may change; None for a scheme that has no
    codes or chooses by product. ``budgeted``: it searches a setting for each product under a budget.
    ``of_base``: its codes are those of a quantized base, so that only an export can write it. ``refused``
    says why no graph can be written in it.

    ``tolerance`` is the largest change of an output, as a share of the largest, up to which a graph is
    accepted, and up to which fast products are the default. A wrong graph exceeds it. Int4 may move the
    outputs just as far, so for such schemes the change is recorded and not judged. ``accuracy`` is the
    default accuracy of its products, where it does not depend on their errors.
    """

    name: str
    summary: str
    rewrite: Callable[[Rewriting], int] | None = None
    setting: RoundingSetting | None = None
    takes: frozenset[str] = frozenset()
    tolerance: float = math.inf
    accuracy: str | None = None
    budgeted: bool = False
    of_base: bool = False
    refused: str = ""


GRAPH_SCHEMES = Registry(
    "quantization scheme for a bundle",
    GraphScheme,
    "adapterpack.quantization_schemes",
    f"{__package__}.schemes",
)
