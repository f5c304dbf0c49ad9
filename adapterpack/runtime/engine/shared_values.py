"""Slot values of fleet packs for the engine's graph: large arrays that all packs share, and a small core of
each pack.

A change is ``x down core up``, where ``down`` and ``up`` belong to the fleet. A row's slots need two factors,
so the core is multiplied into the smaller one when a row needs it, and the other stays a single array for all
rows. Memory thus holds ``down`` and ``up`` once, and only the core of each pack.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from weakref import ReferenceType, WeakValueDictionary, ref

import numpy as np

from ...pack.shared_factors import SharedFactors
from ...slots.values import Values
from .slot_layout import SlotLayout


@dataclass(eq=False)
class FactoredValue:
    """The values of a slot as a product: the parts of the ``shared`` array ``[in, parts k]`` or ``[parts k,
    out]``, each multiplied by its core ``[k, k]``, or zero for a part without a core. With ``columns`` the
    parts are ranges of columns.
    """

    shared: np.ndarray
    cores: Sequence[SharedFactors | None]
    columns: bool
    _made: ReferenceType[np.ndarray] | None = field(default=None, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.shared.shape

    @property
    def nbytes(self) -> int:
        """The bytes of the cores, the only memory that belongs to this pack alone."""
        return sum(one.codes.nbytes + one.scales.nbytes for one in self.cores if one is not None)

    def array(self) -> np.ndarray:
        """Returns the product. It reuses the last one while something still refers to it, as during the
        prefill of a prompt.
        """
        last = None if self._made is None else self._made()
        if last is None:
            last = self._multiply()
            self._made = ref(last)
        return last

    def _multiply(self) -> np.ndarray:
        made = np.zeros(self.shared.shape, self.shared.dtype)
        width = self.shared.shape[int(self.columns)] // len(self.cores)
        for number, core in enumerate(self.cores):
            if core is not None:
                small = core.core.T
                part = slice(number * width, number * width + len(small))
                if self.columns:
                    made[:, part] = self.shared[:, part].astype(np.float32, copy=False) @ small
                else:
                    made[part] = small @ self.shared[part].astype(np.float32, copy=False)
        return made


SlotValue = np.ndarray | FactoredValue
"""The values of a slot, as an array or as a product."""


def array_of(value: SlotValue) -> np.ndarray:
    """Returns the values of a slot as an array."""
    return value.array() if isinstance(value, FactoredValue) else value


class SharedArrays:
    """Computes the values of fleet packs, and shares the large arrays among them for as long as one of them
    is in memory.
    """

    def __init__(self, layout: SlotLayout) -> None:
        self._layout = layout
        self._known: MutableMapping[tuple[str, ...], np.ndarray] = WeakValueDictionary()

    def of(
        self, factored: Mapping[str, SharedFactors], values: Values
    ) -> tuple[dict[str, SlotValue], frozenset[str]]:
        """Splits a pack's values at its ``factored`` sites into shared arrays and products. Returns the
        values, and the names of the slots whose arrays are shared.
        """
        result: dict[str, SlotValue] = dict(values)
        shared = set()
        for path, site in self._layout.sites.items():
            members = site.members or (path,)
            ups = (
                [f"{path}.up"]
                if f"{path}.up" in self._layout.slots
                else [f"{member}.up" for member in members]
            )
            names = [f"{path}.down", *ups]
            cores = [factored.get(member) for member in members]
            if (
                not set(names) <= values.keys()
                or not values[names[0]].size
                or all(core is None for core in cores)
            ):
                continue  # not a low-rank site, or not one of the fleet
            arrays = self._arrays(path, members, cores, names, values)
            # The core is multiplied into the smaller factor, which then differs by pack; the larger one is
            # shared.
            narrow = values[names[0]].size <= sum(values[name].size for name in ups)
            for name in names:
                down = name == names[0]
                if down != narrow:
                    result[name] = arrays[name]
                    shared.add(name)
                else:
                    own = cores if down or len(ups) == 1 else [factored.get(name.removesuffix(".up"))]
                    result[name] = FactoredValue(arrays[name], own, columns=down)
        return result, frozenset(shared)

    def _arrays(
        self,
        path: str,
        members: Sequence[str],
        cores: Sequence[SharedFactors | None],
        names: Sequence[str],
        values: Values,
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
                    bare[f"{member}.down"], bare[f"{member}.up"] = (
                        core.down.T.astype(dtype),
                        core.up.T.astype(dtype),
                    )
            made = self._layout.own(bare)
            found = {name: np.ascontiguousarray(made[name]) for name in names}
            for name, array in found.items():
                self._known[(name, *key)] = array
        return found
