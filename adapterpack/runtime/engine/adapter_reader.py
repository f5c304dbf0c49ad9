"""Reads a pack into memory in the form that the engine's graph takes.

The packs of a fleet share large arrays. Their change is ``x down core up``, where ``down`` and ``up`` belong
to the fleet. A row's slots need two factors, so the core is multiplied into the smaller one when a row needs
it, and the other stays a single array for all rows. Memory thus holds ``down`` and ``up`` once, and only the
core of each pack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from weakref import WeakValueDictionary

import numpy as np

from ...bundle import DECODER, PAST, cache_scale
from ...errors import Unsupported
from ...onnx_graph import map_tensor
from ...pack import Pack, SharedFactors
from ...slots import Values, in_slots, on_modules, pad_slots
from ...tasks import MAIN
from ..adapters import Mix, layer_and_side, parts_of, require_positions
from ..open_bundle import OpenBundle
from .adapter_feeds import FactoredValue, ResidentAdapter, SlotValue, array_of, hold_lora
from .slot_layout import SlotLayout, own_memory


def not_in_bank(bundle: OpenBundle, names: Sequence[str]) -> Unsupported:
    """Makes the error for adapters that change how images are read, which the bank of a bundle does not
    hold.
    """
    return Unsupported(
        "this bundle's adapters change how images are read, and this one is not in its bank",
        where=bundle.folder,
        found=", ".join(names),
        remedy="name one adapter of the bundle for a row with images, or export with this one",
    )


class AdapterReader:
    """Computes the slot values of packs for the engine's graph of a bundle."""

    def __init__(self, bundle: OpenBundle) -> None:
        self.bundle, self._values = bundle, bundle.slot_values
        others = {path: site for path, site in bundle.bundle.sites.items() if site.part != MAIN}
        self._encoder, self._seeing = (others, {}) if bundle.task.has_encoder else ({}, others)
        self._folded = None if bundle.default is None else bundle.pack(bundle.default).id
        """The digest of the adapter that is folded into the graph's weights, if one is."""
        self.layout = SlotLayout(bundle.bundle, bundle.graph(DECODER), self._values.base_heads())
        self._shared = SharedArrays(self.layout)

    def read(self, adapter: Pack | Mix) -> ResidentAdapter:
        """Returns a pack or a mix as a resident adapter: its slot values, and the keys and values of its
        prompt.

        Raises:
            Unsupported: the graph has no slots for a part of the adapter, or it changes how images are read
                and is not in the bundle's bank.
            BaseMismatch: the adapter was made for layers of other widths.
        """
        if adapter.id == self._folded:
            return ResidentAdapter(adapter.name, adapter.id, {}, {})
        packs = [pack for pack, _ in parts_of(adapter)]
        require_positions(adapter, self.bundle.bundle.sites)
        with self.bundle.compare_files():  # the base's own weights may be read
            lost = [pack for pack in packs if self._values.reads_lost_weights(pack)]
            every = self._values.exported_of(adapter) if lost else self._values.of(adapter)
        if every is None:
            raise Unsupported(
                "this method needs the base's own weights, which this graph does not hold",
                where=lost[0].name,
                remedy="export the bundle again with this adapter among the packs",
            )
        if self.bundle.bundle.mode == "inputs":  # whose modules have the paths of the graph
            sites = self.bundle.bundle.sites
            every = in_slots(on_modules(every, sites, self.bundle.given), sites)
        if any(pack.is_on_disk for pack in packs):  # whose file would stay in memory with a view of it
            every = {name: own_memory(array) for name, array in every.items()}
        source = {name: array for name, array in every.items() if name.rpartition(".")[0] in self._encoder}
        seeing = {name for name in every if name.rpartition(".")[0] in self._seeing}
        banked = {pack.id for pack in self.bundle.packs.values()}
        if seeing and (isinstance(adapter, Mix) or adapter.id not in banked):
            raise not_in_bank(self.bundle, [adapter.name])
        dense = self.layout.own(
            {name: array for name, array in every.items() if name not in source and name not in seeing}
        )
        values, shared = self._shared.of({} if isinstance(adapter, Mix) else adapter.factored, dense)
        held = None if shared else hold_lora(self.layout, values)
        if held is not None:
            values = {name: value for name, value in values.items() if not self.layout.slots[name].held}
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
            held=held,
        )

    def caches(self, prompt: np.ndarray) -> list[np.ndarray]:
        """Splits a prompt ``[layers, 2, heads, n, head_dim]`` into one array for each cache input, in the
        order of the graph's inputs, as wide as its caches are. An int8 cache quantizes them by its scale.
        """
        arrays = []
        for name, value in self.bundle.graph(DECODER).inputs.items():
            if name.startswith(PAST):
                array = prompt[layer_and_side(name)]
                array = np.pad(array, ((0, 0), (0, 0), (0, value.shape[3] - array.shape[2])))
                scale = self.bundle.initializers(DECODER).get(cache_scale(name))
                if scale is not None:
                    array = np.clip(np.rint(array / map_tensor(scale)), -128, 127).astype(np.int8)
                arrays.append(array)
        return arrays

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


class SharedArrays:
    """Computes the values of fleet packs, and shares the large arrays among them for as long as one of them
    is in memory.
    """

    def __init__(self, layout: SlotLayout) -> None:
        self._layout = layout
        self._known: MutableMapping[tuple[str, ...], np.ndarray] = WeakValueDictionary()

    def of(
        self, factored: Mapping[str, SharedFactors], values: Mapping[str, SlotValue]
    ) -> tuple[dict[str, SlotValue], frozenset[str]]:
        """Splits a pack's values at its ``factored`` sites into shared arrays and products. Returns the
        values, and the names of the slots whose arrays are shared.
        """
        result = dict(values)
        shared = set[str]()
        for path, site in self._layout.sites.items():
            members = site.members or (path,)
            joined = f"{path}.up" in self._layout.slots
            cores = [factored.get(member) for member in members]
            having = [member for member, core in zip(members, cores, strict=True) if core is not None]
            ups = [f"{path}.up"] if joined else [f"{member}.up" for member in having]
            names = [f"{path}.down", *ups]
            if (
                not set(names) <= values.keys()
                or not values[names[0]].shape[1]
                or all(core is None for core in cores)
            ):
                continue  # not a low-rank site, or not one of the fleet
            arrays = self._arrays(members, cores, names)
            # The core is multiplied into the smaller factor, which then differs by pack; the larger one is
            # shared.
            down, *others = (math.prod(values[name].shape) for name in names)
            narrow = down <= sum(others)
            for name in names:
                first = name == names[0]
                if first != narrow:
                    result[name] = arrays[name]
                    shared.add(name)
                else:
                    own = cores if first or joined else [factored.get(name.removesuffix(".up"))]
                    result[name] = FactoredValue(arrays[name], own, columns=first)
        return result, frozenset(shared)

    def _arrays(
        self, members: Sequence[str], cores: Sequence[SharedFactors | None], names: Sequence[str]
    ) -> Values:
        """Returns the fleet's ``down`` and ``up`` at a site in the layout of the slots, as arrays that all
        packs of these bases share.
        """
        key = tuple("" if core is None else core.bases for core in cores)
        found = {name: array for name in names if (array := self._known.get((name, *key))) is not None}
        if len(found) < len(names):
            bare: Values = {}
            for member, core in zip(members, cores, strict=True):
                if core is not None:
                    dtype = self._layout.sites[member].dtype
                    bare[f"{member}.down"] = core.down.T.astype(dtype)
                    bare[f"{member}.up"] = core.up.T.astype(dtype)
            made = self._layout.own(bare)
            found = {name: np.ascontiguousarray(array_of(made[name])) for name in names}
            self._known.update({(name, *key): array for name, array in found.items()})
        return found
