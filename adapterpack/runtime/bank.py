"""The adapter bank of a running session: which adapter is in which slot, and what the slots hold."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ..errors import AdapterpackError, BaseMismatch, Unsupported
from ..pack.manifest import Base
from ..pack.pack import Pack
from .bundle import GRAPH, Bundle
from .slots import Values, pack_values, padded


class AdapterBank:
    """Slots of one session. What the graph was exported with needs no feed; after the first ``fill`` the bank is fed whole.

    A fill puts a new set of device values in place of the old one, so a run that has begun keeps the set that it began with.
    """

    def __init__(self, bundle: Bundle, folder: Path, device: str) -> None:
        self.bundle, self.folder, self.device = bundle, folder, device
        self.slots: dict[str, int] = {a.name: int(a.slot or 0) for a in bundle.adapters}
        self.overrides: dict[str, Any] = {}
        self._arrays: Values = {}
        self._lock = threading.Lock()

    def slot(self, name: str | None) -> int:
        """The slot of an adapter; 0 for the base."""
        return 0 if name is None else self.slots[name]

    def fill(self, pack: Pack, base: Base) -> int:
        """Puts a pack into a free slot and returns its number.

        Raises:
            BaseMismatch: the pack belongs to another base.
            Unsupported: no slot is free, or it does not fit.
        """
        wanted = pack.manifest.base
        if wanted.content is not None and base.content is not None and wanted.content != base.content:
            raise BaseMismatch(f"pack '{pack.name}' was made for another base", where=self.folder,
                               expected=f"{base.name} ({base.content[:17]})", found=f"{wanted.name} ({wanted.content[:17]})",
                               remedy="export a bundle of the base that the pack names")
        values = padded(pack_values(pack), self.bundle.sites, self.bundle.max_rank, self.bundle.max_labels)
        with self._lock:
            if pack.name in self.slots:
                raise AdapterpackError("the session already has an adapter of that name", where=pack.name, remedy="choose another name")
            free = sorted(set(range(1, self.bundle.slots)) - set(self.slots.values()))
            if not free:
                raise Unsupported("no slot is free", expected=f"fewer than {self.bundle.slots - 1} adapters", found=len(self.slots),
                                  remedy="unload one, or export with more --slots")
            arrays = self._arrays or self._exported()
            for name, array in values.items():
                arrays[name] = arrays[name].copy()
                arrays[name][free[0]] = array
            self._arrays = arrays
            self.overrides = {name: ort.OrtValue.ortvalue_from_numpy(array, self.device, 0) for name, array in arrays.items()}
            self.slots[pack.name] = free[0]
            return free[0]

    def free(self, name: str) -> None:
        """Gives an adapter's slot back; its contents stay until the slot is filled again."""
        with self._lock:
            del self.slots[name]

    def _exported(self) -> Values:
        """The bank as the graph was exported with it."""
        graph = ir.load(self.folder / GRAPH).graph
        names = [f"{path}.{field}" for path, site in self.bundle.sites.items() for field in site.fields]
        return {name: np.array(graph.initializers[name].const_value.numpy()) for name in names}
