"""Reads a pack into memory as the engine's graph takes it."""

from __future__ import annotations

import numpy as np

from ...bundle.decoder_graph import DECODER
from ...bundle.manifest import PAST
from ...errors import Unsupported
from ...pack.pack import Pack
from ...slots.values import Values
from ..adapters.positions import require_positions
from ..adapters.prefix_cache import layer_and_side
from ..adapters.slot_values import SlotValues
from ..open_bundle import OpenBundle
from .adapter_feeds import ResidentAdapter
from .slot_layout import SlotLayout


class AdapterReader:
    """The values of packs for the engine's graph of a bundle."""

    def __init__(self, bundle: OpenBundle, values: SlotValues) -> None:
        self.bundle, self._values = bundle, values
        self.layout = SlotLayout(bundle.bundle, bundle.graph(DECODER).inputs, self._base_heads())

    def read(self, pack: Pack) -> ResidentAdapter:
        """A pack's values, and what its rows' caches begin with.

        Raises:
            Unsupported: the graph has no slots for a part of the adapter.
            BaseMismatch: the adapter was made for layers of other widths.
        """
        require_positions(pack, self.bundle.bundle.sites)
        values = self.layout.own(self._exported(pack) if self._values.reads_lost_weights(pack) else self._values.of(pack))
        prompt = self.bundle.prompt(pack)
        return ResidentAdapter(pack.name, pack.id, values, self.layout.extents(values), pack.acts, prompt)

    def caches(self, prompt: np.ndarray) -> list[np.ndarray]:
        """What a prompt ``[layers, 2, heads, n, head_dim]`` puts into a row's cache, in the order of the graph's inputs."""
        return [prompt[layer_and_side(name)] for name in self.bundle.graph(DECODER).inputs if name.startswith(PAST)]

    def _exported(self, pack: Pack) -> Values:
        """The values that a pack has in the bank, where those of the base that they were made of are quantized away."""
        values = self._values.exported_of(pack)
        if values is None:
            raise Unsupported("this method needs the base's own weights, which this graph does not hold", where=pack.name,
                              remedy="export the bundle again with this adapter among the packs")
        return values

    def _base_heads(self) -> Values:
        heads = ("head", "head_bias")
        if not any(field in heads for site in self.bundle.bundle.sites.values() for field in site.fields):
            return {}
        return {name: np.array(array[0]) for name, array in self._values.exported().items() if name.rpartition(".")[2] in heads}
