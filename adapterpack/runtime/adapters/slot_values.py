"""Makes the values with which a pack fills the slots of a bundle's graphs, with the base's own weights where
a method reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.manifest import Bundle, Heads, graph_file
from ...errors import Unsupported
from ...onnx_graph.graph_file import StoredTensor, map_tensor
from ...pack.pack import Adapter, Pack
from ...slots.prompt_kv import PROJECTION
from ...slots.sums import Summand, add_changes
from ...slots.values import Values, pack_values, pad_slots
from .mix import Mix, parts_of
from .positions import require_positions


def reads_weights(pack: Pack) -> bool:
    """Whether the values of a pack's slots are made with the base's own weights."""
    return any(method.traits.reads_weight or method.kind == "attention" for method in pack.methods)


class SlotValues:
    """The slot values of packs for one bundle; ``stored`` says where a part's graph stores its
    initializers.
    """

    def __init__(
        self, bundle: Bundle, folder: Path, stored: Callable[[str], Mapping[str, StoredTensor]]
    ) -> None:
        self.bundle, self.folder, self._stored = bundle, folder, stored
        self._parsed: dict[str, Any] = {}

    def of(self, adapter: Pack | Mix) -> Values:
        """Every slot value of a pack or of a mix, by slot name, unpadded: see
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
        """Whether the values of a pack are made with the base's own weights, and a graph holds codes in place
        of some of them.
        """
        if not reads_weights(pack):
            return False
        return not all(
            self._graph(site.part).graph.initializers[site.weight].dtype.is_floating_point()
            for site in self.bundle.sites.values()
            if site.weight
        )

    def exported_bank(self) -> Values:
        """The bank as the graphs were exported with it, mapped: ``[slots, ...]`` by slot name."""
        return {
            name: map_tensor(self._stored(site.part)[name])
            for path, site in self.bundle.sites.items()
            for name in (f"{path}.{field}" for field in site.fields)
        }

    def pad(self, values: Values) -> Values:
        """Slot values as wide as a slot of the bank; where they have no head the base's is taken."""
        heads = {
            name: array[0]
            for name, array in self.exported_bank().items()
            if name.endswith((".head", ".head_bias"))
        }
        return pad_slots(values, self.bundle.sites, self.bundle.max_rank, heads)

    def in_bank(self, adapter: Pack | Mix) -> Values:
        """What a slot of the bank holds of a pack or of a mix: what it was exported with, or :meth:`of`,
        padded.

        Raises:
            Unsupported: it acts at positions that the graph does not ask for, or as :meth:`of`.
            NotASum: of a mix, if the changes of its packs cannot be added.
        """
        for pack, _ in parts_of(adapter):
            require_positions(pack, self.bundle.sites)
        return self.exported_of(adapter) or self.pad(self.of(adapter))

    def exported_of(self, adapter: Pack | Mix) -> Values | None:
        """The values that a pack has in the bank with which the graphs were exported, padded; None where it
        is not among them.
        """
        slot = next((one.slot for one in self.bundle.adapters if one.pack == adapter.id), None)
        return (
            None
            if slot is None
            else {name: np.array(array[slot]) for name, array in self.exported_bank().items()}
        )

    def _weights(self, adapter: Adapter) -> tuple[np.ndarray, np.ndarray | None]:
        """The base's own weight and bias at a site, out of the graph."""
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
        """What the graph's own projections make of a prompt."""
        # it loads sympy, and most packs need no graph
        from ...slots.projections import heads_at, project  # noqa: PLC0415

        heads = heads_at(self.bundle.sites, path)
        site = self.bundle.sites[f"{path}.{PROJECTION}"]
        return *project(self._graph(site.part), heads, prompt, site.dtype), heads

    def _graph(self, part: str) -> Any:
        """A graph of the bundle, parsed once: its nodes and small tensors in memory, its weights mapped.
        Nothing here changes it.
        """
        if part not in self._parsed:
            import onnx_ir as ir  # noqa: PLC0415 - it loads sympy, and most packs need no graph

            self._parsed[part] = ir.load(self.folder / graph_file(part))
        return self._parsed[part]
