"""Holds adapters in memory, and builds the adapter inputs of a batch for the engine's graph.

If every row has the same adapter, the graph gets one set of values and broadcasts it; a mixed batch gets one
set for each row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from weakref import ReferenceType, ref

import numpy as np

from ..._native.row_lora import AdapterNumbers, HeldAdapter, LoraPart
from ...adapter_methods.core.token_positions import Acts
from ...bundle import ADAPTER_IDS
from ...io import one_thread_each
from ...onnx_graph import ROW_ADAPTERS
from ...pack import SharedFactors
from ...slots import RANK, Values
from ...tasks import Arrays
from ..ort import Memory, value_of
from .slot_layout import Axis, JoinedValue, SlotLayout

Feeds = dict[str, Any]
"""Name of a graph input -> ``OrtValue``."""


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


SlotValue = np.ndarray | FactoredValue | JoinedValue
"""The values of a slot, as an array, as a product, or in parts."""


def array_of(value: SlotValue) -> np.ndarray:
    """Returns the values of a slot as an array."""
    return value if isinstance(value, np.ndarray) else value.array()


def hold_lora(layout: SlotLayout, values: Mapping[str, SlotValue]) -> HeldAdapter | None:
    """Copies an adapter's LoRA for the graph's operator; None if it has none."""
    layers = [_lora_parts(values.get(f"{path}.down"), values.get(f"{path}.up")) for path in layout.lora]
    return HeldAdapter(layers, layout.halves) if any(layers) else None


def _lora_parts(down: SlotValue | None, up: SlotValue | None) -> list[LoraPart]:
    if down is None or up is None:
        return []
    if isinstance(down, JoinedValue) and isinstance(up, JoinedValue):
        downs = {ranks.start: part for (_, ranks), part in down.parts}
        return [
            LoraPart(downs[ranks.start], part, columns.start)
            for (ranks, columns), part in up.parts
            if ranks.start in downs
        ]
    return [LoraPart(array_of(down), array_of(up), 0)]


@dataclass(eq=False)
class ResidentAdapter:
    """An adapter whose values are in memory. ``prompt`` ``[layers, 2, heads, n, head_dim]`` holds the keys
    and values with which the caches of its rows begin.
    """

    name: str
    digest: str
    values: Mapping[str, SlotValue]
    extents: dict[Axis, int]
    acts: Acts | None = None
    prompt: np.ndarray | None = None
    users: int = 0
    """The number of rows that run with it. It stays in memory while this is not 0."""
    source: Values = field(default_factory=dict, repr=False)
    """For encoder-decoders: the bank of the encoder's graph, ``[slots, ...]`` by slot name, with this adapter
    in slot 0.
    """
    shared: frozenset[str] = frozenset()
    """The slots whose arrays other resident adapters use as well."""
    packs: frozenset[str] = frozenset()
    """The digests of the packs of which it consists: several for a mix."""
    held: HeldAdapter | None = None
    """Its LoRA where the graph has an operator for that; its values are the rest then."""
    _source_feeds: Feeds | None = field(default=None, init=False, repr=False)
    _multiplied: ReferenceType[HeldAdapter] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.packs = self.packs or frozenset({self.digest})

    @property
    def mixed(self) -> bool:
        """Whether a request made it up of several packs, or of one pack with a weight."""
        return self.digest not in self.packs

    @cached_property
    def nbytes(self) -> int:
        """The bytes of its own values, without arrays that it shares."""
        prompt = [] if self.prompt is None else [self.prompt]
        first = (array[0] for array in self.source.values())  # the other slots are never written
        own = (value for name, value in self.values.items() if name not in self.shared)
        held = 0 if self.held is None else self.held.nbytes
        return held + sum(int(array.nbytes) for array in (*own, *prompt, *first))

    @property
    def shared_nbytes(self) -> dict[int, int]:
        """The bytes of each array that it shares, by the ``id`` of the array."""
        return {id(self.values[name]): int(self.values[name].nbytes) for name in self.shared}

    def source_feeds(self, memory: tuple[str, int]) -> Feeds:
        """Returns ``source`` as feeds of the encoder's graph; the values are made once."""
        if self._source_feeds is None:
            self._source_feeds = {name: value_of(array, memory) for name, array in self.source.items()}
        return self._source_feeds

    def lora(self, layout: SlotLayout) -> HeldAdapter | None:
        """Returns its LoRA as the graph's operator reads it, None if it has none. A fleet's pack, whose
        factors are products, gives the last one while something still refers to it.
        """
        if self.held is not None or not self.shared:
            return self.held
        last = None if self._multiplied is None else self._multiplied()
        if last is None:
            last = hold_lora(layout, self.values)
            self._multiplied = None if last is None else ref(last)
        return last

    @property
    def virtual(self) -> int:
        """The number of positions that its prompt takes in a row's cache."""
        return 0 if self.prompt is None else int(self.prompt.shape[3])


class AdapterFeeds:
    """Builds the feeds of batches of up to ``rows`` rows.

    For mixed batches it copies values into buffers of its own, and rewrites a row only when the row's adapter
    has changed. The buffers fit the widest adapter of any mixed batch so far, until :meth:`forget`. Values
    that all rows of a batch share are fed once; with a ``rank`` every batch of several rows has values by
    row, at least so wide, so that its shape is that of all others.
    """

    def __init__(self, layout: SlotLayout, rows: int, memory: Memory, rank: int = 0) -> None:
        self.layout, self.rows, self._rank = layout, rows, rank
        # On the CPU the OrtValue borrows the memory of the array and keeps it alive.
        self._value = partial(value_of, memory=memory)
        self._buffers: Arrays = {}
        self._extents: dict[Axis, int] = {}
        self._filled: dict[str, dict[int, ResidentAdapter | None]] = {}
        self._alone: OrderedDict[ResidentAdapter, Feeds] = OrderedDict()
        """The last adapters that all rows of a batch shared, as many as there are rows, with their feeds."""
        self._tabled: tuple[Sequence[ResidentAdapter | None], Feeds] | None = None
        """The adapters of the last batch, with the tables that hold them."""
        self._by_row = frozenset(name for name, slot in layout.slots.items() if slot.by_row)
        self._has_tables = any(slot.table for slot in layout.slots.values())
        self._numbers: np.ndarray | None = None
        """Those of the last batch, so that a fleet's pack is multiplied once for all pieces of a prompt."""
        self._unread = {
            name: self._value(np.empty((1, *slot.shape({}, {})), slot.dtype))
            for name, slot in layout.slots.items()
            if slot.held
        }

    def joins(self, adapters: Iterable[ResidentAdapter | None]) -> bool:
        """Whether tokens of these adapters can be one row of the graph: they have one adapter, or differ in
        what the graph's operator for LoRAs reads.
        """
        distinct = {*adapters}
        apart = (one is None or self._by_row.isdisjoint(one.values) for one in distinct)
        return len(distinct) == 1 or (not self._has_tables and all(apart))

    def of(self, adapters: Sequence[ResidentAdapter | None], joint: bool = False) -> Feeds:
        """Returns the feeds of rows with these adapters, None for the base. With ``joint`` the adapters are
        those of the tokens of one row of the graph.

        Requires: for a joint row, that :meth:`joins` accepts its adapters.
        """
        distinct = list(dict.fromkeys(adapters))
        products = any(adapter is not None and adapter.shared for adapter in distinct)
        # After a product the threads of the BLAS spin for a while, and would take cores from the run that
        # follows.
        with one_thread_each() if products else nullcontext():
            alike = len(distinct) == 1 and not (self._rank and len(adapters) > 1)
            if joint:
                feeds = self._feed_shared(distinct[0] if len(distinct) == 1 else None)
            elif alike and (self.layout.shares or len(adapters) == 1 or distinct[0] is None):
                feeds = self._feed_shared(distinct[0])
            else:
                feeds = self._feed_mixed(adapters, distinct)
            feeds |= self._feed_held(adapters)
        if not self._has_tables:
            return feeds
        tabled, tables = self._tables(distinct)
        ids = np.array([tabled.index(adapter) for adapter in adapters[: 1 if joint else None]], np.int64)
        return {**feeds, **tables, ADAPTER_IDS: self._value(ids)}

    def _feed_held(self, adapters: Sequence[ResidentAdapter | None]) -> Feeds:
        """Returns the feeds for the graph's operator for LoRAs, a number for each of the adapters."""
        if not self.layout.lora:
            return {}
        held = [None if one is None else one.lora(self.layout) for one in adapters]
        self._numbers = np.asarray(AdapterNumbers(held))
        return {**self._unread, ROW_ADAPTERS: self._value(self._numbers)}

    @cached_property
    def _base(self) -> ResidentAdapter:
        base = self.layout.base
        return ResidentAdapter("", "", base, self.layout.extents(base))

    def _feed_shared(self, adapter: ResidentAdapter | None) -> Feeds:
        one = adapter or self._base
        if one in self._alone:
            self._alone.move_to_end(one)
            return dict(self._alone[one])
        feeds = {
            name: self._value(np.ascontiguousarray(self._slot(name, one)[None]))
            for name, slot in self.layout.slots.items()
            if slot.by_row
        }
        feeds |= {name: self._value(array) for name, array in self.layout.ranks(one.extents).items()}
        # the multiplied values take many times the memory of the cores, so only one such adapter's are kept
        for other in [other for other in self._alone if one.shared and other.shared]:
            del self._alone[other]
        self._alone[one] = feeds
        if len(self._alone) > self.rows:
            self._alone.popitem(last=False)
        return dict(feeds)

    def _slot(self, name: str, adapter: ResidentAdapter) -> np.ndarray:
        """Returns an adapter's values for one slot at the adapter's own ranks; a copy only where they do not
        fill the slot.
        """
        slot, value = self.layout.slots[name], adapter.values.get(name)
        own = None if value is None else array_of(value)
        shape = slot.shape(adapter.extents, self.layout.least)
        if own is not None and own.shape == shape:
            return own
        return self._filled_slot(name, own, shape)

    def _filled_slot(self, name: str, own: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        slot = self.layout.slots[name]
        filled = np.empty(shape, slot.dtype)
        slot.fill(filled, own)
        return filled

    def _feed_mixed(
        self, adapters: Sequence[ResidentAdapter | None], distinct: Sequence[ResidentAdapter | None]
    ) -> Feeds:
        wanted = self.layout.widest(
            [self._extents, *((adapter or self._base).extents for adapter in distinct)]
        )
        wanted = {axis: max(most, self._rank * (axis.name == RANK)) for axis, most in wanted.items()}
        # A wider adapter changes the shape of every buffer, so all are allocated again.
        if wanted != self._extents:
            self.forget()
            self._extents = wanted
        feeds: Feeds = {}
        for name, slot in self.layout.slots.items():
            if not slot.by_row:
                continue
            shape, common = slot.shape(wanted, self.layout.least), self._common(name, distinct)
            if common is not None:
                feeds[name] = self._value(
                    (common if common.shape == shape else self._filled_slot(name, common, shape))[None]
                )
                continue
            if name not in self._buffers:
                self._buffers[name], self._filled[name] = np.empty((self.rows, *shape), slot.dtype), {}
            for row, adapter in enumerate(adapters):
                self._fill(name, row, adapter)
            feeds[name] = self._value(self._buffers[name][: len(adapters)])
        return {**feeds, **{name: self._value(array) for name, array in self.layout.ranks(wanted).items()}}

    @staticmethod
    def _common(name: str, distinct: Sequence[ResidentAdapter | None]) -> np.ndarray | None:
        """Returns the array of a slot if all adapters that fill it share that array, else None. Rows without
        it need no array of their own, because their other factor is zero.
        """
        having = [adapter for adapter in distinct if adapter is not None and name in adapter.values]
        if not having or not all(name in adapter.shared for adapter in having):
            return None
        first = having[0].values[name]
        return array_of(first) if all(adapter.values[name] is first for adapter in having) else None

    def _fill(self, name: str, row: int, adapter: ResidentAdapter | None) -> None:
        filled, buffer = self._filled[name], self._buffers[name]
        if row in filled and filled[row] is adapter:
            return
        before = next((other for other, held in filled.items() if held is adapter), None)
        filled[row] = adapter
        if before is not None:  # another row has the same adapter, or had it before the rows moved
            buffer[row] = buffer[before]
            return
        value = (adapter or self._base).values.get(name)
        self.layout.slots[name].fill(buffer[row], None if value is None else array_of(value))

    def forget(self) -> None:
        """Frees the buffers of mixed batches; the next mixed batch allocates them again."""
        self._buffers, self._extents, self._filled, self._tabled = {}, {}, {}, None
        self._numbers = None
        self._alone.clear()

    def _tables(
        self, distinct: Sequence[ResidentAdapter | None]
    ) -> tuple[Sequence[ResidentAdapter | None], Feeds]:
        """Returns the adapters in the tables, in their order, and the tables: those of the last batch if it
        had all these adapters, since tables may be large. A single adapter's values are not copied.
        """
        last, alone = self._tabled, len(distinct) == 1
        if last is not None and alone == (len(last[0]) == 1) and {*distinct} <= {*last[0]}:
            return last
        extents = self.layout.widest([(adapter or self._base).extents for adapter in distinct])
        feeds: Feeds = {}
        for name, slot in self.layout.slots.items():
            if slot.table and alone:
                values = self._slot(name, distinct[0] or self._base)
                feeds[name] = self._value(np.ascontiguousarray(values[None]))
            elif slot.table:
                stacked = np.empty((len(distinct), *slot.shape(extents, self.layout.least)), slot.dtype)
                for place, adapter in enumerate(distinct):
                    value = (adapter or self._base).values.get(name)
                    slot.fill(stacked[place], None if value is None else array_of(value))
                feeds[name] = self._value(stacked)
        self._tabled = distinct, feeds
        return self._tabled
