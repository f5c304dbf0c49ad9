"""The adapter bank of a running session: loads packs into the slots of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ...base import compatibility
from ...bundle.manifest import Bundle, Heads, graph_file
from ...errors import AdapterpackError, Unsupported
from ...manifest.manifest import Base
from ...onnx_graph.graph_file import Stored, mapped
from ...pack.pack import Adapter, Pack
from ...slots.projections import heads_at, projected
from ...slots.prompt_kv import PROJECTION
from ...slots.values import Values, pack_values, padded
from .contents import require_contents
from .positions import require_positions


class BankState(NamedTuple):
    """The bank at one moment: ``slots``, adapter -> number of its slot; ``arrays``, input of a graph -> contents of all slots;
    ``overrides``, the same on the device, by part. Without arrays the graph's own defaults are used. Never changed in place: a run keeps
    the state that it began with.
    """

    slots: Mapping[str, int]
    arrays: Mapping[str, np.ndarray]
    overrides: Mapping[str, Mapping[str, Any]]

    def without(self, name: str) -> BankState:
        """The state in which an adapter's slot is free; its contents stay until the slot is filled again."""
        return self._replace(slots={other: slot for other, slot in self.slots.items() if other != name})


class AdapterBank:
    """The slots of one bundle; ``stored`` says where a part's graph stores its initializers.

    Until a slot is filled the graph uses what it was exported with; from then on the whole bank is fed.
    """

    def __init__(self, bundle: Bundle, folder: Path, device: str, stored: Callable[[str], Mapping[str, Stored]]) -> None:
        self.bundle, self.folder, self.device, self._stored = bundle, folder, device, stored
        self._parsed: dict[str, Any] = {}

    def opened(self, packs: Mapping[str, Pack]) -> BankState:
        """The bank as it was exported, whose slots hold these of its packs.

        Raises:
            FormatError: a slot holds another adapter, or that of the base changes it.
        """
        slots = {adapter.name: int(adapter.slot or 0) for adapter in self.bundle.adapters}
        if packs and not self._reads_lost_weights(packs.values()):
            exported = self._exported()
            base = {name: array[0] for name, array in exported.items()}
            heads = {name: array for name, array in base.items() if _is_head(name)}
            require_contents(padded({}, self.bundle.sites, self.bundle.max_rank, heads), base, self.folder, None)
            for name, pack in packs.items():
                wide = padded(self._values(pack), self.bundle.sites, self.bundle.max_rank, heads)
                require_contents(wide, {slot: array[slots[name]] for slot, array in exported.items()}, self.folder, name)
        return BankState(slots, {}, {})

    def load(self, state: BankState, pack: Pack, base: Base, allow_structural: bool = False) -> BankState:
        """The state with a pack in a free slot. A pack without a head of its own has the base's.

        Raises:
            BaseMismatch: the pack belongs to another base.
            Unsupported: no slot is free, or it does not fit.
        """
        pack.require_levels(compatibility.recorded_fingerprint(base), name=base.name, where=self.folder, allow_structural=allow_structural)
        require_positions(pack, self.bundle.sites)
        values, slots = self._values(pack), state.slots
        if pack.name in slots:
            raise AdapterpackError("the session already has an adapter of that name", where=pack.name, remedy="choose another name")
        free = min(set(range(1, self.bundle.slots)) - set(slots.values()), default=None)
        if free is None:
            raise Unsupported("no slot is free", where=self.folder, expected=f"at most {self.bundle.slots - 1} adapters",
                              found=len(slots) + 1, remedy="unload one, or export with more --slots")
        arrays = state.arrays or self._exported()
        heads = {name: array[0] for name, array in arrays.items() if _is_head(name)}
        wide = padded(values, self.bundle.sites, self.bundle.max_rank, heads)
        filled = {name: np.concatenate([array[:free], wide[name][None], array[free + 1 :]]) for name, array in arrays.items()}
        overrides: dict[str, dict[str, Any]] = {}
        for name, array in filled.items():
            part = self.bundle.sites[name.rpartition(".")[0]].part
            overrides.setdefault(part, {})[name] = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        return BankState({**slots, pack.name: free}, filled, overrides)

    def _values(self, pack: Pack) -> Values:
        return pack_values(pack, self._weights if self.bundle.quantization is None else None, self.bundle.sites, self._projected)

    def _reads_lost_weights(self, packs: Iterable[Pack]) -> bool:
        """Whether the values of a pack are made with the base's own weights, which a quantized graph does not hold."""
        methods = [method for pack in packs for method in pack.methods]
        return self.bundle.quantization is not None and any(method.traits.reads_weight or method.kind == "attention" for method in methods)

    def _exported(self) -> Values:
        """The bank as the graphs were exported with it, mapped."""
        return {name: mapped(self._stored(site.part)[name]) for path, site in self.bundle.sites.items()
                for name in (f"{path}.{field}" for field in site.fields)}

    def _weights(self, adapter: Adapter) -> tuple[np.ndarray, np.ndarray | None]:
        """The base's own weight and bias at a site, out of the graph."""
        site = self.bundle.sites.get(adapter.site.path)
        if site is None:
            raise Unsupported("the graph has no slot for a part of this adapter", found=adapter.site.path,
                              remedy="export the bundle again with this adapter among the packs")
        initializers = self._graph(site.part).graph.initializers
        weight = np.array(initializers[site.weight].const_value.numpy())
        bias = None if site.bias is None else np.array(initializers[site.bias].const_value.numpy())
        rows = slice(site.at, site.at + site.out_features)
        return (weight if site.layout == "out_in" else weight.T)[rows], bias

    def _projected(self, prompt: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray, Heads]:
        """What the graph's own projections make of a prompt."""
        heads = heads_at(self.bundle.sites, path)
        site = self.bundle.sites[f"{path}.{PROJECTION}"]
        return *projected(self._graph(site.part), heads, prompt, site.dtype), heads

    def _graph(self, part: str) -> Any:
        """A graph of the bundle, parsed once: its nodes and small tensors in memory, its weights mapped. Nothing here changes it."""
        if part not in self._parsed:
            self._parsed[part] = ir.load(self.folder / graph_file(part))
        return self._parsed[part]


def _is_head(slot: str) -> bool:
    return slot.endswith((".head", ".head_bias"))
