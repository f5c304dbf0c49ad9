"""Runs a graph with adapters, one class a mode: in the weights, as ONNX Runtime's own adapters, or from a bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from ...bundle.manifest import ADAPTER_IDS, STEP, Bundle, adapter_file
from ...errors import FormatError, Unsupported
from ...io.hashing import Identity, identity
from ...pack.pack import Pack
from ...slots.precision import ABSENT, converted
from ...tasks.task import MAIN
from ..ort_model import OrtModel
from .bank import AdapterBank, BankState
from .pinned import Adapters, Run


class OpenGraphs(Protocol):
    """What a mode needs of an open bundle."""

    folder: Path
    bundle: Bundle
    device: str

    def graph(self, part: str) -> OrtModel:
        """The graph of that part."""
        ...


class AdapterMode(Protocol):
    """How a session runs adapters. What the mode needs to run them is a value, :attr:`Adapters.attached`: loading and unloading make
    another one and leave the old one to the rows that have begun with it.
    """

    def opened(self) -> Any:
        """The value of the bundle's own adapters."""
        ...

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> Run:
        """One run after another with these of the adapters, one a row."""
        ...

    def load(self, attached: Any, pack: Pack, allow_structural: bool = False) -> Any:
        """The value with another pack, if the bundle's base is the pack's."""
        ...

    def unload(self, attached: Any, name: str) -> Any:
        """The value without one."""
        ...


class FoldedMode:
    """The adapters are folded into the weights: every row has them, and none can choose."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session

    def opened(self) -> None:
        """See :class:`AdapterMode`."""

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> Run:
        """See :class:`AdapterMode`."""
        packs = adapters.packs
        if len(packs) == 1 and None in names:
            raise Unsupported("a folded bundle has no base to run rows on", where=self.session.folder, remedy="export with --mode bank")
        if len(packs) > 1 and any(names):
            raise Unsupported("the adapters of this bundle are folded together, so rows cannot have one of them", found=", ".join(packs),
                              where=self.session.folder, remedy="name none, or export with --mode bank")
        return lambda feeds, part=MAIN, rows=None: self.session.graph(part).call(feeds)

    def load(self, attached: None, pack: Pack, allow_structural: bool = False) -> None:
        """See :class:`AdapterMode`."""
        raise Unsupported("a folded bundle takes no further adapters", found=pack.name, remedy="export with --mode bank")

    def unload(self, attached: None, name: str) -> None:
        """See :class:`AdapterMode`."""
        raise Unsupported("the adapter is folded into the weights", found=name, remedy="export with --mode bank")


class InputsMode:
    """ONNX Runtime's own adapters, one a run: a mixed batch runs once for each adapter in it."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session
        self._fed: dict[str, dict[str, Any]] = {}
        self._identities: dict[str, dict[Path, Identity]] = {}

    def opened(self) -> dict[str, dict[str, Any]]:
        """See :class:`AdapterMode`."""
        session, files = self.session, dict[str, dict[str, Any]]()
        slotted = {site.part for site in session.bundle.sites.values() if site.fields} | {MAIN}
        for adapter in session.bundle.adapters:
            files[adapter.name], self._identities[adapter.name] = {}, {}
            for part in slotted:
                path = session.folder / adapter_file(adapter.path, part)
                if not path.is_file():
                    raise FormatError("an adapter file of the bundle is missing", where=path, remedy="export again")
                self._identities[adapter.name][path] = identity(path)
                files[adapter.name][part] = ort.LoraAdapter()
                files[adapter.name][part].Load(str(path))
        return files

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> Run:
        """See :class:`AdapterMode`."""
        files: Mapping[str, Mapping[str, Any]] = adapters.attached
        for name in {name for name in names if name is not None}:
            self._require_unchanged(name)

        def run(feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None) -> dict[str, Any]:
            chosen = names if rows is None else [names[row] for row in rows]
            graph = self.session.graph(part)
            if part == STEP:  # its outputs are bound, and bindings take no adapters
                return graph.call({**feeds, **self._slots(next(iter(chosen), None))})
            if len(set(chosen)) <= 1:
                return graph.call(feeds, _options(files, next(iter(chosen), None), part))
            parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            for name in dict.fromkeys(chosen):
                mine = np.array([row for row, other in enumerate(chosen) if other == name])
                some = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[mine])) for key, value in feeds.items()}
                for key, value in graph.call(some, _options(files, name, part)).items():
                    parts.setdefault(key, []).append((mine, value.numpy()))
            return {key: _owning(_joined(pieces)) for key, pieces in parts.items()}

        return run

    def _require_unchanged(self, name: str) -> None:
        """Checks the files of an adapter, which ONNX Runtime maps: what is written into one would be in the rows at once."""
        for path, before in self._identities[name].items():
            if identity(path)[:4] != before[:4]:
                raise FormatError("an adapter file of the bundle was exchanged while the session is open", where=path,
                                  remedy="open the bundle again")

    def _slots(self, name: str | None) -> dict[str, Any]:
        """What an adapter puts into the slots of the main graph, as values that can be fed."""
        if name is None:
            return {}
        if name not in self._fed:
            path = self.session.folder / adapter_file(self.session.bundle.adapter(name).path, MAIN)
            arrays = {slot: value.numpy() for slot, value in ort.AdapterFormat.read_adapter(str(path)).get_parameters().items()}
            self._fed[name] = {slot: _owning(array) for slot, array in arrays.items()}
        return self._fed[name]

    def load(self, attached: Any, pack: Pack, allow_structural: bool = False) -> Any:
        """See :class:`AdapterMode`."""
        raise Unsupported("this bundle takes its adapters at export", found=pack.name, remedy="export with --mode bank")

    def unload(self, attached: Mapping[str, Any], name: str) -> dict[str, Any]:
        """See :class:`AdapterMode`."""
        return {other: files for other, files in attached.items() if other != name}


class BankMode:
    """Stacked slots on the device; ``adapter_ids`` chooses one for each row."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session
        self.bank = AdapterBank(session.bundle, session.folder, session.device)

    def opened(self) -> BankState:
        """See :class:`AdapterMode`."""
        return self.bank.opened()

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> Run:
        """See :class:`AdapterMode`."""
        slots, overrides = adapters.attached.slots, adapters.attached.overrides
        ids = np.array([0 if name is None else slots[name] for name in names], np.int64)

        def run(feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None) -> dict[str, Any]:
            graph = self.session.graph(part)
            if ADAPTER_IDS not in graph.inputs:  # no adapter reaches this graph
                return graph.call(feeds)
            batch_ids = ort.OrtValue.ortvalue_from_numpy(ids if rows is None else ids[list(rows)], graph.device, 0)
            return graph.call({**feeds, ADAPTER_IDS: batch_ids, **overrides.get(MAIN if part == STEP else part, {})})

        return run

    def load(self, attached: BankState, pack: Pack, allow_structural: bool = False) -> BankState:
        """See :class:`AdapterMode`."""
        return self.bank.load(attached, pack, self.session.bundle.base, allow_structural)

    def unload(self, attached: BankState, name: str) -> BankState:
        """See :class:`AdapterMode`."""
        return attached.without(name)


def _options(files: Mapping[str, Mapping[str, Any]], name: str | None, part: str) -> Any:
    options = ort.RunOptions()
    if name is not None and part in files[name]:
        options.add_active_adapter(files[name][part])
    return options


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Rows of several runs put back in their order; narrower logits are filled with the logit of an absent label."""
    first = pieces[0][1]
    width = max(array.shape[-1] for _, array in pieces)
    total = sum(len(rows) for rows, _ in pieces)
    joined = np.full((total, *first.shape[1:-1], width), converted(np.array(ABSENT), first.dtype.name, "logits"), first.dtype)
    for rows, array in pieces:
        joined[rows, ..., : array.shape[-1]] = array
    return joined


def _owning(array: np.ndarray) -> Any:
    """An ``OrtValue`` with memory of its own: one made from an array only borrows it, and so do the arrays that are taken from it."""
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype)
    value.update_inplace(array)
    return value


ADAPTER_MODES: dict[str, Callable[[Any], AdapterMode]] = {"folded": FoldedMode, "inputs": InputsMode, "bank": BankMode}
"""Mode -> how a session runs adapters."""
