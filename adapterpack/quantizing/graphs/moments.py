"""Computes the second moments (the mean of ``x xᵀ``) of the inputs of a float graph's products on calibration
rows, a few inputs at a time.

The moment of an input of width ``n`` has ``n²`` numbers, so the moments of all inputs can be larger than the
model. One pass of the rows through the graph, with some inputs as additional outputs, computes as many
moments as fit into :data:`BUDGET`, in graph order. Asking in that order therefore runs the rows a few times
instead of once for each input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...adapter_methods import Arrays
from ...bundle import FILE_NAME, graph_file, read_bundle, signature_of
from ...errors import AdapterpackError
from ...runtime import Session
from ...tasks import MAIN
from .replace_products import find_products

BUDGET = 512 << 20
"""Bytes of moments in memory at a time; a single larger moment is alone."""


class Moments:
    """The second moments of the inputs of the products in the main graph of an unpublished bundle's folder,
    on ``rows`` of token ids.

    While rows run, it replaces the graph's file and the manifest, and restores the same bytes afterwards.
    Compute the moments before the graph is quantized.
    """

    def __init__(self, folder: Path, rows: Sequence[Sequence[int]]) -> None:
        self.folder, self.rows = folder, rows
        self._path = folder / graph_file(MAIN)
        self._original = self._path.read_bytes()
        products = {product.node.inputs[0].name: product for product in find_products(ir.load(self._path))}
        self._widths = {name: product.width for name, product in products.items()}
        self._inputs = {name: product.input() for name, product in products.items()}
        self._moments: Arrays = {}

    def of(self, name: str) -> np.ndarray:
        """Returns the mean of ``x xᵀ`` ``[in, in]`` of an input in float32, over all tokens of all rows.

        Raises:
            AdapterpackError: the rows do not reach the input.
        """
        if name not in self._moments:
            self._moments = {}
            names = list(self._widths)
            self._moments = self._gather(self._fitting(names[names.index(name) :]))
        return self._moments[name]

    def _fitting(self, names: Sequence[str]) -> list[str]:
        """Returns the first of these inputs, and as many of the following ones as the budget allows."""
        chosen = list[str]()
        total = 0
        for name in names:
            total += 4 * self._widths[name] ** 2
            if chosen and total > BUDGET:
                break
            chosen.append(name)
        return chosen

    def _gather(self, names: Sequence[str]) -> Arrays:
        manifest = self.folder / FILE_NAME
        before = manifest.read_bytes()
        try:
            self._with_outputs(names)
            session = Session(self.folder, provider="cpu", mapped=True, verify="off")
            sums = {name: np.zeros((self._widths[name],) * 2, np.float32) for name in names}
            count = 0
            for ids in self.rows:
                results = session.run({"input_ids": np.array([ids], np.int64)})
                count += len(ids)
                for name in names:
                    x = results[name].reshape(-1, self._widths[name])
                    sums[name] += x.T @ x
        finally:
            self._path.write_bytes(self._original)
            manifest.write_bytes(before)
        for name, total in sums.items():
            if not np.isfinite(total).all() or not total.any():
                raise AdapterpackError(
                    "calibration rows do not reach an input of the graph",
                    where=name,
                    remedy="give other rows",
                )
        return {name: total / np.float32(count) for name, total in sums.items()}

    def _with_outputs(self, names: Sequence[str]) -> None:
        model = ir.load(self._path)
        values = {value.name: value for node in model.graph for value in node.outputs}
        present = {value.name for value in model.graph.outputs}
        for name in names:
            if name not in present:
                values[name].shape, values[name].type = self._inputs[name].shape, self._inputs[name].type
                model.graph.outputs.append(values[name])
        ir.save(model, self._path)
        replace(read_bundle(self.folder), io=signature_of(model), decoder=False).write(
            self.folder, draft=True
        )
