"""How the adapters of each mode get to a running graph: in the weights, as ONNX Runtime's own adapters, or from a bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime as ort

from ..errors import FormatError, Unsupported
from ..pack import manifest as m
from ..pack.pack import Pack
from .bank import AdapterBank
from .bundle import ADAPTER_IDS
from .slots import NO_LABEL

if TYPE_CHECKING:
    from .session import Session

Run = Callable[[Mapping[str, Any]], dict[str, Any]]
"""feeds -> outputs, both by name and as ``OrtValue``"""


class Attached(Protocol):
    """What a session asks of a mode."""

    def pin(self, names: Sequence[str | None]) -> Run:
        """One run after another with these adapters, one a row; what is loaded or unloaded meanwhile does not touch them."""
        ...

    def load(self, pack: Pack, allow_structural: bool = False) -> None:
        """Takes another pack in, if the bundle's base is the pack's."""
        ...

    def unload(self, name: str) -> None:
        """Lets one go."""
        ...


class Folded:
    """The adapters are in the weights: rows have what was folded, and cannot choose."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def pin(self, names: Sequence[str | None]) -> Run:
        """See :class:`Attached`."""
        packs = self.session.packs
        if len(packs) == 1 and None in names:
            raise Unsupported("a folded bundle has no base to run rows on", where=self.session.folder, remedy="export with --mode bank")
        if len(packs) > 1 and any(names):
            raise Unsupported("the adapters of this bundle are folded together, so rows cannot have one of them", found=", ".join(packs),
                              where=self.session.folder, remedy="name none, or export with --mode bank")
        return self.session.call

    def load(self, pack: Pack, allow_structural: bool = False) -> None:
        """See :class:`Attached`."""
        raise Unsupported("a folded bundle takes no further adapters", found=pack.name, remedy="export with --mode bank")

    def unload(self, name: str) -> None:
        """See :class:`Attached`."""
        raise Unsupported("the adapter is folded into the weights", found=name, remedy="export with --mode bank")


class Inputs:
    """ONNX Runtime's own adapters, one a run: a mixed batch runs once for each adapter in it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        listed = {entry.path: entry.sha256 for entry in session.bundle.files}
        self.files: dict[str, Any] = {}
        for adapter in session.bundle.adapters:
            path = session.folder / f"{adapter.path}.onnx_adapter"
            if not path.is_file() or m.sha256_of(path) != listed.get(f"{adapter.path}.onnx_adapter"):
                raise FormatError("an adapter file of the bundle is missing or was altered", where=path, remedy="export again")
            self.files[adapter.name] = ort.LoraAdapter()
            self.files[adapter.name].Load(str(path))

    def pin(self, names: Sequence[str | None]) -> Run:
        """See :class:`Attached`."""
        files = dict(self.files)
        for name in names:
            self.session.require(name, files)
        rows = {name: np.array([row for row, other in enumerate(names) if other == name]) for name in dict.fromkeys(names)}

        def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
            if len(rows) == 1:
                return self.session.call(feeds, _options(files, names[0]))
            parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            for name, own in rows.items():
                some = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[own])) for key, value in feeds.items()}
                for key, value in self.session.call(some, _options(files, name)).items():
                    parts.setdefault(key, []).append((own, value.numpy()))
            return {key: _owning(_joined(pieces)) for key, pieces in parts.items()}

        return run

    def load(self, pack: Pack, allow_structural: bool = False) -> None:
        """See :class:`Attached`."""
        raise Unsupported("this bundle takes its adapters at export", found=pack.name, remedy="export with --mode bank")

    def unload(self, name: str) -> None:
        """See :class:`Attached`."""
        del self.files[name]


class Bank:
    """Stacked slots on the device; ``adapter_ids`` chooses one for each row."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.bank = AdapterBank(session.bundle, session.folder, session.device)

    def pin(self, names: Sequence[str | None]) -> Run:
        """See :class:`Attached`."""
        slots, overrides = self.bank.state  # one look: a slot that is filled anew meanwhile must not be taken for the old one
        for name in names:
            self.session.require(name, slots)
        ids = np.array([0 if name is None else slots[name] for name in names], np.int64)
        fixed = {ADAPTER_IDS: ort.OrtValue.ortvalue_from_numpy(ids, self.session.device, 0), **overrides}
        return lambda feeds: self.session.call({**feeds, **fixed})

    def load(self, pack: Pack, allow_structural: bool = False) -> None:
        """See :class:`Attached`."""
        self.bank.fill(pack, self.session.bundle.base, allow_structural)

    def unload(self, name: str) -> None:
        """See :class:`Attached`."""
        self.bank.free(name)


def _options(files: Mapping[str, Any], name: str | None) -> Any:
    options = ort.RunOptions()
    if name is not None:
        options.add_active_adapter(files[name])
    return options


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Rows of several runs put back in their order; narrower logits are filled with the logit of an absent label."""
    first = pieces[0][1]
    width = max(array.shape[-1] for _, array in pieces)
    total = sum(len(rows) for rows, _ in pieces)
    joined = np.full((total, *first.shape[1:-1], width), NO_LABEL, first.dtype)
    for rows, array in pieces:
        joined[rows, ..., : array.shape[-1]] = array
    return joined


def _owning(array: np.ndarray) -> Any:
    """An ``OrtValue`` with memory of its own: one made from an array only borrows it, and so do the arrays that are taken from it."""
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype)
    value.update_inplace(array)
    return value


ATTACH: dict[str, Callable[[Any], Attached]] = {"folded": Folded, "inputs": Inputs, "bank": Bank}
"""Mode -> how a session attaches."""
