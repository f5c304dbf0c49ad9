"""Opens a bundle's graph as the base of a merge: its site map locates the weights, and the bundle records its
identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ...adapter_methods import LAYOUTS, LINEAR
from ...base import Fingerprint, read_json, recorded_fingerprint
from ...bundle import Bundle
from ...errors import SiteNotFound, Unsupported, nearest
from ...io import Json, TensorInfo, dtype_name
from ...onnx_graph import (
    GraphFile,
    TensorPlace,
    WeightPiece,
    dequantize,
    quantized_nodes,
    require_place,
    require_plain,
)
from ...pack import Pack
from ..checkpoint import MergeBase


class GraphBase(MergeBase):
    """The linear modules of a bundle, under the names that the packs' sites have, as linear layers ``[out,
    in]`` however the graph holds them.

    A quantized weight is read dequantized, in float32.
    """

    def __init__(self, folder: Path, bundle: Bundle, graph: GraphFile, packs: Sequence[Pack]) -> None:
        self.folder = folder
        self.bundle = bundle
        self.graph = graph
        self.index = None
        self.files = {}
        self.shard_of = {}
        self.identities = {}
        self.quantized = {}
        self._nbits = {one.weight: one for one in quantized_nodes(graph)}
        wanted = {
            group.path: group
            for pack in packs
            for group in pack.manifest.groups
            if group.path in bundle.sites
        }
        self._sites = {
            path: (
                bundle.sites[path],
                group.kind if group.role == "adapter" and group.kind not in LINEAR else "linear",
            )
            for path, group in wanted.items()
        }

    @cached_property
    def config(self) -> Json:
        """The bundle's own ``config.json``."""
        path = self.folder / "config.json"
        config: Json = read_json(path) if path.is_file() else {}
        # a graph's modules are changed one by one
        return {key: value for key, value in config.items() if key != "tie_word_embeddings"}

    @cached_property
    def name(self) -> str:
        """The name of the base that the bundle was made from."""
        return self.bundle.base.name or "base"

    @property
    def structure(self) -> str:  # type: ignore[override]
        """The structure fingerprint that the bundle records."""
        return self.bundle.base.structure or ""

    def fingerprint(self, *, content: bool = True, files: bool = False) -> Fingerprint:
        """Returns the fingerprint that the bundle records."""
        return recorded_fingerprint(self.bundle.base)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """``PATH.weight`` and ``PATH.bias`` of each site that the packs change.

        Raises:
            Unsupported: a site has no weight of its own in the graph.
        """
        tensors = {}
        for path, (site, kind) in self._sites.items():
            if not site.weight:
                raise Unsupported(
                    "the site map does not say where the weights of this site lie",
                    where=path,
                    found=site.kind,
                    remedy="fold into the checkpoint, and export that with --mode folded",
                )
            layout = LAYOUTS[kind]
            shape = (
                (site.in_features, site.out_features)
                if layout.turned
                else (site.out_features, site.in_features)
            )
            dtype = (
                "F32"
                if site.weight in self._nbits
                else dtype_name(require_place(self.graph, site.weight).dtype)
            )
            tensors[f"{path}.weight"] = TensorInfo(f"{path}.weight", dtype, shape, 0, 0)
            if site.bias is not None:
                bias = require_place(self.graph, site.bias)
                tensors[f"{path}.bias"] = TensorInfo(
                    f"{path}.bias", dtype_name(bias.dtype), (site.out_features,), 0, 0
                )
        return tensors

    def view(self, name: str) -> np.ndarray:
        """Returns the weight or bias, as :meth:`read` does."""
        return self.read(name)

    def read(self, name: str) -> np.ndarray:
        """Reads a weight as its site stores it, or a bias; float tensors are views of the mapped graph."""
        path, _, leaf = name.rpartition(".")
        site, kind = self._sites[path]
        if leaf == "bias":
            return self.graph.array(site.bias or "").reshape(-1)
        one = self._nbits.get(site.weight)
        if one is not None:
            require_plain(self.graph, one)
            out_in = dequantize(self.graph, one, slice(0, one.rows))
        else:
            stored = self.graph.array(site.weight)
            out_in = stored if site.layout == "out_in" else stored.T
        out_in = out_in[site.at : site.at + site.out_features]
        return out_in.T if LAYOUTS[kind].turned else out_in

    def linear_kind(self, weight: str) -> str:
        """Returns the layout in which :meth:`read` returns the weight."""
        return "linear"

    def weight_name(self, path: str, recorded: str | None = None) -> str | None:
        """Returns the weight of the module ``path``; a graph has modules, not the tensor names of a
        checkpoint.
        """
        name = f"{path}.weight"
        return name if name in self.tensors else None

    def require_weight(self, path: str, recorded: str | None = None) -> str:
        """Returns the weight of a module like :meth:`weight_name`, and raises if there is none.

        Raises:
            SiteNotFound: the site map has no such module.
        """
        name = self.weight_name(path)
        if name is None:
            raise SiteNotFound(
                "the bundle's site map has no such module",
                where=self.folder,
                found=path,
                remedy=f"{nearest(path, self.bundle.sites)}, or name the checkpoint with --base",
            )
        return name

    def places(self, wanted: Mapping[str, str]) -> dict[str, TensorPlace]:
        """Returns where the graph stores tensors, by its site map.

        Raises:
            Unsupported: two modules of the site map have one weight.
        """
        return {name: self._place(name, kind) for name, kind in wanted.items()}

    def _place(self, name: str, kind: str) -> TensorPlace:
        path, _, leaf = name.rpartition(".")
        site = self._sites[path][0]
        if leaf == "bias":
            return TensorPlace(
                name, "norm", ((WeightPiece(site.bias or "", 0, site.out_features, 0),),), (site.node,)
            )
        sharing = sorted(
            other.path
            for other in self.bundle.sites.values()
            if other.weight == site.weight
            and other.path != path
            and other.at < site.at + site.out_features
            and site.at < other.at + other.out_features
        )
        readers = {node.name for node in self.graph.readers.get(site.weight, ())}
        if sharing or len(readers) > 1:
            raise Unsupported(
                "other nodes read this site's weight too, and would change with it",
                where=f"{self.folder}, {path}",
                found=", ".join([*sharing, *sorted(readers - {site.node})][:5]),
                remedy="export the bundle again",
            )
        one = self._nbits.get(site.weight)
        transposed = site.layout == "in_out" and one is None
        return TensorPlace(
            name,
            kind,
            ((WeightPiece(site.weight, 0, site.out_features, site.at, 0, transposed, None, one),),),
            (site.node,),
        )
