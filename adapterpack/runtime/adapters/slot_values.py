"""Computes the values that a pack writes into the slots of a bundle's graphs, from the base model's weights
where a method needs them (DoRA, for example).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, Heads, SiteMap, graph_file
from ...errors import Unsupported
from ...onnx_graph import StoredTensor, map_tensor
from ...pack import Adapter, Pack
from ...slots import PROJECTION, Summand, Values, add_changes, pack_values, pad_slots
from .mix import Mix, parts_of


def reads_weights(pack: Pack) -> bool:
    """Returns whether the slot values of a pack depend on weights of the base model."""
    return any(method.traits.reads_weight or method.kind == "attention" for method in pack.methods)


def require_positions(adapter: Pack | Mix, sites: SiteMap) -> None:
    """Checks that a graph can restrict a pack, or each pack of a mix, to the positions at which it acts.

    Raises:
        Unsupported: a pack acts at some positions only, and a site of the graph has no input for them.
    """
    for pack, _ in parts_of(adapter):
        for group in pack.manifest.adapter_groups if pack.acts is not None else ():
            if not (group.path in sites and sites[group.path].positional):
                raise Unsupported(
                    "this adapter acts at some positions of a row only, which this graph does not ask for",
                    where=group.path,
                    found=str(pack.acts)[:80],
                    remedy="export the bundle again with this adapter among the packs",
                )


class SlotValues:
    """Computes the slot values of packs for one bundle; ``stored`` returns the initializers that a part's
    graph stores.
    """

    def __init__(
        self, bundle: Bundle, folder: Path, stored: Callable[[str], Mapping[str, StoredTensor]]
    ) -> None:
        self.bundle = bundle
        self.folder = folder
        self._stored = stored
        self._parsed: dict[str, Any] = {}

    def of(self, adapter: Pack | Mix) -> Values:
        """Returns every slot value of a pack or a mix, by slot name, without padding; see
        :func:`adapterpack.slots.values.pack_values`.

        Raises:
            NotASum: of a mix, if the changes of its packs cannot be added.
        """
        if isinstance(adapter, Mix):
            parts = [Summand(pack.name, self._of(pack), weight) for pack, weight in adapter.parts]
            return add_changes(parts, self.bundle.sites)
        return self._of(adapter)

    def _of(self, pack: Pack) -> Values:
        return pack_values(
            pack, None if self.reads_lost_weights(pack) else self._weights, self.bundle.sites, self._project
        )

    def reads_lost_weights(self, pack: Pack) -> bool:
        """Returns whether the values of a pack depend on base weights of which this graph holds quantized
        codes only.
        """
        if not reads_weights(pack):
            return False
        return not all(
            self._graph(site.part).graph.initializers[site.weight].dtype.is_floating_point()
            for site in self.bundle.sites.values()
            if site.weight
        )

    def exported_bank(self) -> Values:
        """Returns the bank with which the graphs were exported, memory-mapped: ``[slots, ...]`` by
        slot name.
        """
        return {
            name: map_tensor(self._stored(site.part)[name])
            for path, site in self.bundle.sites.items()
            for name in (f"{path}.{field}" for field in site.fields)
        }

    def pad(self, values: Values) -> Values:
        """Pads slot values to the widths of the bank's slots; where they have no head, they get the base
        model's.
        """
        return pad_slots(values, self.bundle.sites, self.bundle.max_rank, self.base_heads())

    def base_heads(self) -> Values:
        """Returns the base model's heads by slot name: those of slot 0 of the exported bank."""
        return {
            name: np.array(map_tensor(self._stored(site.part)[name])[0])
            for path, site in self.bundle.sites.items()
            for name in (f"{path}.{field}" for field in ("head", "head_bias") if field in site.fields)
        }

    def in_bank(self, adapter: Pack | Mix) -> Values:
        """Returns the values that a pack or a mix has in a slot of the bank: the exported ones if it was
        exported with the bundle, else those of :meth:`of`, padded.

        Raises:
            Unsupported: the adapter acts at some positions only and the graph has no input for them, or the
                graph has no slot for a part of it.
            NotASum: of a mix, if the changes of its packs cannot be added.
        """
        require_positions(adapter, self.bundle.sites)
        return self.exported_of(adapter) or self.pad(self.of(adapter))

    def exported_of(self, adapter: Pack | Mix) -> Values | None:
        """Returns the padded values that a pack has in the exported bank, or None if the bundle was exported
        without it.
        """
        slot = next((one.slot for one in self.bundle.adapters if one.pack == adapter.id), None)
        return (
            None
            if slot is None
            else {name: np.array(array[slot]) for name, array in self.exported_bank().items()}
        )

    def _weights(self, adapter: Adapter) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads the base model's weight and bias at a site from the graph."""
        site = self.bundle.sites.get(adapter.site.path)
        if site is None:
            raise Unsupported(
                "the graph has no slot for a part of this adapter",
                found=adapter.site.path,
                remedy="export the bundle again with this adapter among the packs",
            )
        initializers = self._graph(site.part).graph.initializers
        weight = np.array(initializers[site.weight].const_value.numpy())
        bias = None if site.bias is None else np.array(initializers[site.bias].const_value.numpy())
        if adapter.site.kind == "table":
            return weight, bias
        if site.kind == "patches":
            weight = weight.reshape(len(weight), -1)
        rows = slice(site.at, site.at + site.out_features)
        return (weight if site.layout == "out_in" else weight.T)[rows], bias

    def _project(self, prompt: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray, Heads]:
        """Runs a prompt through the graph's key and value projections."""
        # it loads sympy, and most packs need no graph
        from ...slots import heads_at, project  # noqa: PLC0415

        heads = heads_at(self.bundle.sites, path)
        site = self.bundle.sites[f"{path}.{PROJECTION}"]
        return *project(self._graph(site.part), heads, prompt, site.dtype), heads

    def _graph(self, part: str) -> Any:
        """Loads a graph of the bundle once: nodes and small tensors in memory, weights mapped. Callers must
        not change it.
        """
        if part not in self._parsed:
            import onnx_ir as ir  # noqa: PLC0415 - it loads sympy, and most packs need no graph

            self._parsed[part] = ir.load(self.folder / graph_file(part))
        return self._parsed[part]
