"""The adapter bank of a running session: which adapter is in which slot, and what the slots hold."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ..base import compatibility
from ..bundle.manifest import Bundle, Heads, graph_file
from ..errors import AdapterpackError, Unsupported
from ..manifest.manifest import Base
from ..pack.pack import Adapter, Pack
from ..slots.projections import heads_at, projected
from ..slots.prompt_kv import PROJECTION
from ..slots.values import Values, pack_values, padded
from .positions import require_positions


class BankState(NamedTuple):
    """Adapter name -> slot, and of each part, slot name -> device value; without values the graph's own defaults hold. Never changed in
    place."""

    slots: Mapping[str, int]
    overrides: Mapping[str, Mapping[str, Any]]


class AdapterBank:
    """Slots of one session. What the graph was exported with needs no feed; after the first ``fill`` the bank is fed whole.

    A fill or a free puts a new state in place of the old one, so a run that has begun keeps the state that it began with.
    """

    def __init__(self, bundle: Bundle, folder: Path, device: str) -> None:
        self.bundle, self.folder, self.device = bundle, folder, device
        self.state = BankState({a.name: int(a.slot or 0) for a in bundle.adapters}, {})
        self._arrays: Values = {}
        self._lock = threading.Lock()

    def fill(self, pack: Pack, base: Base, allow_structural: bool = False) -> int:
        """Puts a pack into a free slot and returns its number. A pack without a head of its own has the base's.

        Raises:
            BaseMismatch: the pack belongs to another base.
            Unsupported: no slot is free, or it does not fit.
        """
        pack.require_levels(compatibility.recorded_fingerprint(base), name=base.name, where=self.folder, allow_structural=allow_structural)
        require_positions(pack, self.bundle.sites)
        values = pack_values(pack, self._weights if self.bundle.quantization is None else None, self.bundle.sites, self._projected)
        with self._lock:
            slots, _ = self.state
            if pack.name in slots:
                raise AdapterpackError("the session already has an adapter of that name", where=pack.name, remedy="choose another name")
            free = sorted(set(range(1, self.bundle.slots)) - set(slots.values()))
            if not free:
                raise Unsupported("no slot is free", where=self.folder, expected=f"at most {self.bundle.slots - 1} adapters",
                                  found=len(slots) + 1, remedy="unload one, or export with more --slots")
            arrays = self._arrays or self._exported()
            heads = {name: array[0] for name, array in arrays.items() if name.endswith((".head", ".head_bias"))}
            wide = padded(values, self.bundle.sites, self.bundle.max_rank, heads)
            filled = {name: np.concatenate([array[: free[0]], wide[name][None], array[free[0] + 1 :]]) for name, array in arrays.items()}
            overrides: dict[str, dict[str, Any]] = {}
            for name, array in filled.items():
                part = self.bundle.sites[name.rpartition(".")[0]].part
                overrides.setdefault(part, {})[name] = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
            self._arrays, self.state = filled, BankState({**slots, pack.name: free[0]}, overrides)
            return free[0]

    def free(self, name: str) -> None:
        """Gives an adapter's slot back; its contents stay until the slot is filled again."""
        with self._lock:
            self.state = self.state._replace(slots={other: slot for other, slot in self.state.slots.items() if other != name})

    def _weights(self, adapter: Adapter) -> tuple[np.ndarray, np.ndarray | None]:
        """The base's own weight and bias at a site, out of the graph."""
        site = self.bundle.sites.get(adapter.site.path)
        if site is None:
            raise Unsupported("the graph has no slot for a part of this adapter", found=adapter.site.path,
                              remedy="export the bundle again with this adapter among the packs")
        known = ir.load(self.folder / graph_file(site.part)).graph.initializers
        weight = np.array(known[site.weight].const_value.numpy())
        bias = None if site.bias is None else np.array(known[site.bias].const_value.numpy())
        own = slice(site.at, site.at + site.out_features)
        return (weight if site.layout == "out_in" else weight.T)[own], bias

    def _projected(self, prompt: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray, Heads]:
        """What the graph's own projections make of a prompt."""
        heads = heads_at(self.bundle.sites, path)
        part = self.bundle.sites[f"{path}.{PROJECTION}"].part
        return *projected(ir.load(self.folder / graph_file(part)), heads, prompt), heads

    def _exported(self) -> Values:
        """The bank as the graph was exported with it."""
        found: Values = {}
        for part in self.bundle.parts:
            graph = ir.load(self.folder / graph_file(part)).graph
            names = [f"{path}.{field}" for path, site in self.bundle.sites.items() if site.part == part for field in site.fields]
            found |= {name: np.array(graph.initializers[name].const_value.numpy()) for name in names}
        return found
