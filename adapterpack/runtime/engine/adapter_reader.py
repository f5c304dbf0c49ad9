"""Reads a pack into memory in the form that the engine's graph takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle.decoder_graph import DECODER, cache_scale
from ...bundle.manifest import PAST
from ...errors import Unsupported
from ...onnx_graph.graph_file import map_tensor
from ...pack.pack import Pack
from ...slots.values import Values, pad_slots
from ...tasks.task import MAIN
from ..adapters.mix import Mix, parts_of
from ..adapters.positions import require_positions
from ..adapters.prompt_cache import layer_and_side
from ..adapters.slot_values import SlotValues
from ..open_bundle import OpenBundle
from .adapter_feeds import ResidentAdapter
from .shared_values import SharedArrays
from .slot_layout import SlotLayout


class AdapterReader:
    """Computes the slot values of packs for the engine's graph of a bundle."""

    def __init__(self, bundle: OpenBundle, values: SlotValues) -> None:
        self.bundle, self._values = bundle, values
        self._encoder = (
            {path: site for path, site in bundle.bundle.sites.items() if site.part != MAIN}
            if bundle.task.has_encoder
            else {}
        )
        self._folded = None if bundle.default is None else bundle.pack(bundle.default).id
        """The digest of the adapter that is folded into the graph's weights, if one is."""
        self.layout = SlotLayout(bundle.bundle, bundle.graph(DECODER).inputs, self._base_heads())
        self._shared = SharedArrays(self.layout)

    def read(self, adapter: Pack | Mix) -> ResidentAdapter:
        """Returns a pack or a mix as a resident adapter: its slot values, and the keys and values of its
        prompt.

        Raises:
            Unsupported: the graph has no slots for a part of the adapter.
            BaseMismatch: the adapter was made for layers of other widths.
        """
        if adapter.id == self._folded:
            return ResidentAdapter(adapter.name, adapter.id, {}, {})
        packs = [pack for pack, _ in parts_of(adapter)]
        for pack in packs:
            require_positions(pack, self.bundle.bundle.sites)
        with self.bundle.compared():  # the base's own weights may be read
            lost = [pack for pack in packs if self._values.reads_lost_weights(pack)]
            every = self._read_exported(lost, adapter) if lost else self._values.of(adapter)
        source = {name: array for name, array in every.items() if name.rpartition(".")[0] in self._encoder}
        dense = self.layout.own({name: array for name, array in every.items() if name not in source})
        values, shared = self._shared.of({} if isinstance(adapter, Mix) else adapter.factored, dense)
        return ResidentAdapter(
            adapter.name,
            adapter.id,
            values,
            self.layout.extents(dense),
            adapter.acts,
            self.bundle.prompt(adapter),
            source=self._in_bank(source) if source else {},
            shared=shared,
            packs=frozenset(pack.id for pack in packs),
        )

    def caches(self, prompt: np.ndarray) -> list[np.ndarray]:
        """Splits a prompt ``[layers, 2, heads, n, head_dim]`` into one array for each cache input, in the
        order of the graph's inputs.
        """
        return [
            self._to_cache(name, prompt[layer_and_side(name)])
            for name in self.bundle.graph(DECODER).inputs
            if name.startswith(PAST)
        ]

    def _to_cache(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Converts keys or values ``[heads, n, head_dim]`` to the dtype of the cache; an int8 cache quantizes
        them by its scale.
        """
        scale = self.bundle.stored(DECODER).get(cache_scale(name))
        return (
            numbers
            if scale is None
            else np.clip(np.rint(numbers / map_tensor(scale)), -128, 127).astype(np.int8)
        )

    def _in_bank(self, values: Values) -> Values:
        """Returns the encoder's bank with this adapter in slot 0. The encoder's graph is the ordinary one,
        with a bank, and reads one row at a time, so a single slot is enough.
        """
        filled = pad_slots(
            values,
            {path: site for path, site in self._encoder.items() if site.fields or site.members},
            self.bundle.bundle.max_rank,
            {},
        )
        banks = {
            name: np.zeros((self.bundle.bundle.slots, *array.shape), array.dtype)
            for name, array in filled.items()
        }
        for name, array in filled.items():
            banks[name][0] = array
        return banks

    def _read_exported(self, lost: Sequence[Pack], adapter: Pack | Mix) -> Values:
        """Returns the values from the exported bank, for methods that need base weights of which the graph
        holds quantized codes only.
        """
        values = self._values.exported_of(adapter)
        if values is None:
            raise Unsupported(
                "this method needs the base's own weights, which this graph does not hold",
                where=lost[0].name,
                remedy="export the bundle again with this adapter among the packs",
            )
        return values

    def _base_heads(self) -> Values:
        heads = ("head", "head_bias")
        if not any(field in heads for site in self.bundle.bundle.sites.values() for field in site.fields):
            return {}
        return {
            name: np.array(array[0])
            for name, array in self._values.exported_bank().items()
            if name.rpartition(".")[2] in heads
        }
