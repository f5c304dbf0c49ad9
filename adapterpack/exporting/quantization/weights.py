"""Quantizes one graph of a bundle, and replaces its files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...graph_passes.tied import share_bytes
from ...onnx_graph.save import save_graph
from .compensation import Compensator
from .product import Setting
from .scheme import SCHEMES, Choose, Rewriting
from .stored_weights import StoredWeights
from .tensor_file import TensorFile


def quantize_file(
    path: Path,
    scheme: str,
    choose: Choose,
    head: Setting | None = None,
    second: Callable[[str], np.ndarray | None] | None = None,
    compensator: Compensator | None = None,
    stored: StoredWeights | None = None,
) -> int:
    """Quantizes the graph at ``path`` by a scheme and replaces its file and its data; returns the number of
    quantized weights.

    ``choose`` gives the setting of each product, ``head`` is that of the product that gives the logits, and a
    ``compensator`` corrects what that did. ``stored`` are the codes of a quantized base.
    """
    model, data = ir.load(path), f"{path.name}.data"
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=path.parent) as name:
        scratch, rewrite = Path(name), SCHEMES[scheme].rewrite
        assert rewrite is not None
        if compensator is not None:
            compensator.remember(model)
        tensors = TensorFile(scratch / "tensors")
        count = rewrite(Rewriting(model, tensors, choose, head, second or (lambda name: None), stored))
        if compensator is not None:
            compensator.apply(model, tensors)
        save_graph(model, scratch / path.name)
        share_bytes(scratch / path.name)
        for file in (data, path.name):
            path.with_name(file).unlink(missing_ok=True)
            if (scratch / file).exists():  # a graph of small tensors has no data file
                (scratch / file).rename(path.with_name(file))
    return count
