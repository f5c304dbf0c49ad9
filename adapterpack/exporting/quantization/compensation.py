"""A low-rank correction of what quantization did to the base, as one more pack that every row of a bank carries.

At each site with slots of low rank the error ``E = W - Wq`` is approximated by ``B A`` of the wanted rank: the largest singular values of
``E`` (LQER, Zhang et al., https://arxiv.org/abs/2402.02446, section 3.2) or, with calibration rows, of ``E S^½`` with ``S`` the mean of
``x xᵀ``, so that the error of the outputs is as small as it can be at this rank: ``A = Vᵀ S^-½`` (EoRA, Liu et al.,
https://arxiv.org/abs/2410.21271, section 3.2, which writes ``S^½`` by its eigenvectors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...adapter_methods import Site
from ...adapter_methods.lora import LoRA, lora
from ...bundle.manifest import ADDED, COMPENSATION, Bundle, Compensation, MappedSite
from ...errors import NothingToDo
from ...lowrank.range_finder import InMemory, largest
from ...lowrank.space import Factors
from ...lowrank.truncation import Cut
from ...manifest import manifest as m
from ...onnx_graph.nbits import Grid, unpacked, values
from ...pack.pack import Pack, build
from ...slots.values import pack_values, padded
from .in_codes import products_of
from .output_error import output_error

_DAMPING = 1e-3
"""What is added to the diagonal of ``S``, as a share of its mean: inputs that calibration rows never have are not free to err."""

Second = Callable[[str], np.ndarray | None]


class Compensator:
    """Corrects one graph of ``bundle``, a bank, while it is quantized: :meth:`remember` before, :meth:`apply` afterwards."""

    def __init__(self, bundle: Bundle, rank: int, second: Second | None) -> None:
        self.bundle, self.rank, self._second = bundle, rank, second
        self._weights: dict[str, tuple[Any, bool, str]] = {}
        """Of each product's node the tensor, whether it was transposed on the way, and the name of its input."""
        self._roots: tuple[str, np.ndarray, np.ndarray] | None = None
        self.errors = np.zeros(2)
        """The squared errors of the products' outputs (of the weights, without rows), before and with the correction."""
        self.pack: Pack | None = None

    def remember(self, model: Any) -> None:
        """Keeps hold of the float weights of a graph, which stay in their file."""
        self._weights = {product.node.name: (product.weight.const_value, product.weight is not product.node.inputs[1],
                                             product.node.inputs[0].name) for product in products_of(model)}

    def apply(self, model: Any) -> None:
        """Computes the correction of a quantized graph, and widens its bank by it.

        Raises:
            NothingToDo: no quantized product has slots of low rank.
        """
        nodes = {node.name.rpartition("_Q")[0]: node for node in model.graph if node.op_type == "MatMulNBits"}
        adapters = {}
        for path, site in self.bundle.sites.items():
            if site.kind == "linear" and site.role == "adapter" and site.weight and "up" in site.fields and site.node in nodes:
                tensor, turned, x = self._weights[site.node]
                rows = slice(site.at, site.at + site.out_features)
                weight = tensor.numpy() if turned else tensor.numpy().T
                error = weight[rows].astype(np.float32) - dense(nodes[site.node])[rows]
                factors = self._factors(error, None if self._second is None else self._second(x), x)
                short = self.rank - len(factors.A)  # slots are of one rank at all sites, and begin with the correction
                adapters[Site(path, site.in_features, site.out_features, "linear")] = (
                    LoRA(r=self.rank, alpha=float(self.rank)), {"lora_A": np.pad(factors.A, ((0, short), (0, 0))).astype(np.float32),
                                                                "lora_B": np.pad(factors.B, ((0, 0), (0, short))).astype(np.float32)})
        if not adapters:
            raise NothingToDo("no quantized product has slots of low rank", where="--compensate", remedy="export without packs, or with "
                              "adapters of linear layers, which give the graph its slots")
        self.pack = build(COMPENSATION, lora, adapters, task=m.Task(self.bundle.task), base=self.bundle.base)
        widen(model, self.bundle.sites, pack_values(self.pack, None, self.bundle.sites), self.rank)

    def written(self, folder: Path, bundle: Bundle) -> tuple[Bundle, dict[str, Any]]:
        """Writes the pack into an unpublished bundle's folder; its manifest, and what its report says."""
        assert self.pack is not None
        (folder / COMPENSATION).mkdir()
        self.pack.write_into(folder / COMPENSATION)
        before, after = self.errors
        left = float(np.sqrt(after / before)) if before else 0.0
        report = {"rank": self.rank, "sites": len(self.pack.manifest.groups), "error_left": left}
        return replace(bundle, max_rank=bundle.max_rank + self.rank, compensation=Compensation(self.pack.id, self.rank)), report

    def _factors(self, error: np.ndarray, second: np.ndarray | None, key: str) -> Factors:
        """``B A`` near an error ``[out, in]``; ``key`` names the input, whose roots serve all products that read it."""
        cut = Cut(rank=min(self.rank, *error.shape))
        if second is None:
            factors, loss = largest(InMemory(error), cut).cut(cut)
            self.errors += loss.total, loss.tail
            return factors
        if self._roots is None or self._roots[0] != key:
            self._roots = (key, *_roots(second))
        _, root, inverse = self._roots
        scaled, _ = largest(InMemory(error @ root), cut).cut(cut)
        factors = Factors((scaled.A @ inverse).astype(np.float32), scaled.B)
        self.errors += output_error(error, second), output_error(error - factors.B @ factors.A, second)
        return factors


def _roots(second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``S^½`` and ``S^-½`` of a damped second moment, in float32."""
    S = second.astype(np.float64)
    sizes, vectors = np.linalg.eigh(S)
    sizes = np.maximum(sizes, 0) + _DAMPING * float(np.trace(S)) / len(S)
    return tuple(((vectors * power) @ vectors.T).astype(np.float32) for power in (np.sqrt(sizes), 1 / np.sqrt(sizes)))  # type: ignore[return-value]


def dense(node: Any) -> np.ndarray:
    """What a ``MatMulNBits`` and the division before it multiply with ``[out, in]``, in float32."""
    out, width, bits = (node.attributes.get_int(name) for name in ("N", "K", "bits"))
    codes, scales, *zeros = (value.const_value.numpy() for value in node.inputs[1:] if value is not None)
    scales = scales.reshape(out, -1).astype(np.float32)
    if not zeros:
        zero = np.full_like(scales, 1 << (bits - 1))
    else:
        stored = zeros[0].reshape(out, -1)
        zero = (unpacked(stored, bits)[:, : scales.shape[1]] if stored.dtype == np.uint8 else stored).astype(np.float32)
    q = unpacked(codes.reshape(*scales.shape, -1), bits).astype(np.float32)
    rows = values(q, Grid(scales, zero, not zeros)).reshape(out, -1)[:, :width]
    scaled = node.inputs[0].producer()
    if scaled is not None and scaled.name == f"{node.name.rpartition('_Q')[0]}/scaled":
        rows = rows * scaled.inputs[1].const_value.numpy().astype(np.float32)
    return rows


def widen(model: Any, sites: Mapping[str, MappedSite], correction: Mapping[str, np.ndarray], rank: int) -> None:
    """Puts a correction of up to ``rank`` before what every slot of a bank holds, the base's included; slots get wider by it. Where nothing
    is corrected the room stays free, behind what is there."""
    graph = model.graph
    for name, own in padded(correction, sites, rank, {}).items():
        path, _, field = name.rpartition(".")
        value = graph.initializers.get(name)
        if field not in {"down", "up"} or value is None:
            continue
        old = value.const_value.numpy()
        parts = sites[path].members if sites[path].members and (field == "down" or "up" in sites[path].fields) else (path,)
        axis = old.ndim - 1 if field == "down" else 1
        split = (*old.shape[:axis], len(parts), -1, *old.shape[axis + 1 :])
        first, second = np.broadcast_to(own, (len(old), *own.shape)).reshape(split), old.reshape(split)
        ordered = [(first, second) if f"{part}.up" in correction else (second, first) for part in parts]
        wide = np.stack([np.concatenate([each.take(place, axis) for each in pair], axis) for place, pair in enumerate(ordered)], axis)
        shape = [*old.shape]
        shape[axis] += rank * len(parts)
        value.const_value = ir.tensor(np.ascontiguousarray(wide.reshape(shape)), name=name)
        value.shape = ir.Shape(shape)
    for node in graph:
        for output in node.outputs:
            users = [use.node for use in output.uses()]
            if (node.name or "").startswith(ADDED) and users and all((user.name or "").startswith(ADDED) for user in users):
                output.shape = None  # it may have the rank among its axes
