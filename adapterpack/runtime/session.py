"""A bundle opened under ONNX Runtime: rows of one batch through their adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import ConfigError, Unsupported
from ..pack.pack import Pack
from ..pack.validate import load
from . import providers
from .bank import AdapterBank
from .bundle import ADAPTER_IDS, GRAPH, Bundle, BundledAdapter, read_bundle
from .tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]
Names = Sequence[str | None] | str | None


class Session:
    """A running bundle. ``provider`` is ``cuda``, ``cpu`` or None for the best there is; ``session.provider`` says which runs.

    Raises:
        FormatError: the folder is no bundle, or a pack in it was altered.
        ProviderError: the provider is unknown or did not start.

    Example:
        >>> session = Session("bundle")  # doctest: +SKIP
        >>> session.run(session.encode(["where is my parcel?"]), adapters=["tickets"])["logits"].argmax()  # doctest: +SKIP
        2
    """

    def __init__(self, bundle: str | os.PathLike[str], provider: str | None = None, threads: int | None = None) -> None:
        self.folder = Path(bundle)
        self.bundle: Bundle = read_bundle(bundle)
        wanted = providers.choose(provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # each optional input would be a warning of its own
        options.intra_op_num_threads = threads or 0
        self._ort = ort.InferenceSession(self.folder / GRAPH, options, providers=wanted)
        self.provider = providers.require(self._ort, wanted)
        self.device = "cuda" if self.provider.startswith("CUDA") else "cpu"
        self.inputs = {value.name: value for value in self._ort.get_inputs()}
        self.outputs = [value.name for value in self._ort.get_outputs()]
        self.packs: dict[str, Pack] = {a.name: load(self.folder / a.path, a.name) for a in self.bundle.adapters}
        self._attach = ATTACH[self.bundle.mode](self)
        self._tokenizer: Tokenizer | None = None

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that rows may ask for."""
        return list(self.packs)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.folder)
        return self._tokenizer

    def load(self, pack: Pack | str | os.PathLike[str], name: str | None = None) -> str:
        """Puts another pack into a free slot of a running bank, and returns its name.

        Raises:
            BaseMismatch: the pack belongs to another base.
            Unsupported: no slot is free, or the pack does not fit the graph's slots.
        """
        loaded = pack if isinstance(pack, Pack) else load(pack, name)
        return self._attach.load(loaded if name is None else loaded.renamed(name))

    def unload(self, name: str) -> None:
        """Frees the slot of an adapter; rows that are running keep what they started with."""
        self.bundle_adapter(name)
        self._attach.unload(name)

    def bundle_adapter(self, name: str) -> None:
        """Checks that there is an adapter of that name.

        Raises:
            UnknownAdapter: there is none.
        """
        if name not in self.packs:
            known = [BundledAdapter(n, p.id, "") for n, p in self.packs.items()]
            Bundle("", "", self.bundle.base, "", {}, tuple(known), ()).adapter(name)

    def labels(self, adapter: str | None) -> tuple[str, ...] | None:
        """The labels of a row's logits, in order, or None for a task without labels."""
        return self.bundle.base_labels if adapter is None else self.packs[adapter].manifest.task.labels

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Texts as a padded batch: ``input_ids`` and ``attention_mask`` [batch, longest], int64, padded on the right."""
        rows = [self.tokenizer.encode(text) for text in texts]
        return pad(rows, self.tokenizer.pad_id, left=False)

    def run(self, inputs: Mapping[str, np.ndarray], adapters: Names = None) -> Arrays:
        """One pass. ``inputs`` are numpy arrays; ``adapters`` names one for each row, None for the base; one name holds for all rows.

        Position ids and an empty cache are supplied where the graph wants them and they are not given.

        Returns:
            Output name -> array, rows in the order of the inputs. Logits of labels that a row's adapter does not have are -1e9.

        Raises:
            UnknownAdapter: a name that the bundle does not hold.
            ConfigError: a missing or unknown input.
        """
        rows = inputs["input_ids"].shape[0] if "input_ids" in inputs else next(iter(inputs.values())).shape[0]
        names = self.names(adapters, rows)
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in self._complete(inputs).items()}
        values = self._attach.run(feeds, names)
        return {name: value.numpy() for name, value in values.items()}

    def generate(self, prompts: Sequence[Any], adapters: Names = None, **sampling: Any) -> list[Any]:
        """Answers to ``prompts``, one batch, each row with its own adapter; ``sampling`` are the fields of ``Sampling`` and ``emit``.

        Example:
            >>> session.generate(["Order 12 mugs for Lisbon"], adapters=["orders"], max_new_tokens=40)[0].text  # doctest: +SKIP
            '{"item": "mugs", "quantity": 12, "city": "Lisbon"}'
        """
        from .generate import Sampling, generate  # noqa: PLC0415 - generation is built on the session

        emit = sampling.pop("emit", None)
        return list(generate(self, prompts, adapters, Sampling(**sampling), emit))

    def names(self, adapters: Names, rows: int) -> list[str | None]:
        """One name a row, each known to the bundle."""
        names: list[str | None] = [adapters] * rows if adapters is None or isinstance(adapters, str) else list(adapters)
        if len(names) != rows:
            raise ConfigError("adapters must name one for each row", expected=rows, found=len(names))
        for name in {name for name in names if name is not None}:
            self.bundle_adapter(name)
        return names

    def step(self, feeds: Mapping[str, Any], names: list[str | None]) -> dict[str, Any]:
        """One pass on ``OrtValue`` feeds, nothing copied back: what generation calls for every token."""
        return self._attach.run(dict(feeds), names)

    def call(self, feeds: Mapping[str, Any], options: Any = None) -> dict[str, Any]:
        """The graph itself."""
        return dict(zip(self.outputs, self._ort.run_with_ort_values(self.outputs, dict(feeds), options), strict=True))

    def _complete(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        slots = {ADAPTER_IDS}
        unknown = sorted(set(inputs) - set(self.inputs))
        if unknown:
            raise ConfigError("inputs that the graph does not have", expected=", ".join(sorted(set(self.inputs) - slots)),
                              found=", ".join(unknown))
        complete = dict(inputs)
        batch, length = complete["input_ids"].shape
        complete.setdefault("attention_mask", np.ones((batch, length), np.int64))
        if "position_ids" in self.inputs:
            complete.setdefault("position_ids", positions(complete["attention_mask"])[:, -length:])
        for name, empty in self.empty_cache(batch).items():
            complete.setdefault(name, empty)
        missing = sorted(set(self.inputs) - set(complete) - slots)
        if missing:
            raise ConfigError("inputs are missing", expected=", ".join(missing))
        return {name: array.astype(np.int64) if name.endswith(("_ids", "_mask")) else array for name, array in complete.items()}

    def empty_cache(self, batch: int) -> Arrays:
        """A key/value cache of length 0 for every layer of a decoder; nothing for other graphs."""
        return {
            name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
            for name, value in self.inputs.items()
            if name.startswith("past_key_values.")
        }


def positions(mask: np.ndarray) -> np.ndarray:
    """Position ids of a mask ``[batch, length]``: counted from the first real token, whatever the padding side."""
    return np.clip(np.cumsum(mask, axis=1) - 1, 0, None).astype(np.int64)


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> Arrays:
    """Ragged ids as ``input_ids`` and ``attention_mask`` [batch, longest], int64."""
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


class _Folded:
    """The adapter is in the weights: the only name that a row may have is that of a folded pack."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, feeds: dict[str, Any], names: list[str | None]) -> dict[str, Any]:
        if self.session.packs and None in names and any(names):
            raise Unsupported("a folded bundle has no base to run rows on", remedy="export with --mode bank")
        return self.session.call(feeds)

    def load(self, pack: Pack) -> str:
        raise Unsupported("a folded bundle takes no further adapters", found=pack.name, remedy="export with --mode bank")

    def unload(self, name: str) -> None:
        raise Unsupported("the adapter is folded into the weights", found=name, remedy="export with --mode bank")


class _Inputs:
    """ONNX Runtime's own adapters, one a run: a mixed batch runs once for each adapter in it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.files: dict[str, Any] = {}
        for adapter in session.bundle.adapters:
            self.files[adapter.name] = ort.LoraAdapter()
            self.files[adapter.name].Load(str(session.folder / f"{adapter.path}.onnx_adapter"))

    def run(self, feeds: dict[str, Any], names: list[str | None]) -> dict[str, Any]:
        kinds = list(dict.fromkeys(names))
        if len(kinds) == 1:
            return self.session.call(feeds, self._options(kinds[0]))
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for kind in kinds:
            rows = np.array([number for number, name in enumerate(names) if name == kind])
            some = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[rows])) for name, value in feeds.items()}
            for name, value in self.session.call(some, self._options(kind)).items():
                parts.setdefault(name, []).append((rows, value.numpy()))
        return {name: ort.OrtValue.ortvalue_from_numpy(_joined(pieces)) for name, pieces in parts.items()}

    def _options(self, name: str | None) -> Any:
        options = ort.RunOptions()
        if name is not None:
            options.add_active_adapter(self.files[name])
        return options

    def load(self, pack: Pack) -> str:
        raise Unsupported("this bundle takes its adapters at export", found=pack.name, remedy="export with --mode bank")

    def unload(self, name: str) -> None:
        del self.files[name], self.session.packs[name]


class _Bank:
    """Stacked slots on the device; ``adapter_ids`` chooses one for each row."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.bank = AdapterBank(session.bundle, session.folder, session.device)

    def run(self, feeds: dict[str, Any], names: list[str | None]) -> dict[str, Any]:
        ids = np.array([self.bank.slot(name) for name in names], np.int64)
        return self.session.call({**feeds, ADAPTER_IDS: ort.OrtValue.ortvalue_from_numpy(ids), **self.bank.overrides})

    def load(self, pack: Pack) -> str:
        wanted = self.session.bundle.base
        self.bank.fill(pack, wanted)
        self.session.packs[pack.name] = pack
        return pack.name

    def unload(self, name: str) -> None:
        self.bank.free(name)
        del self.session.packs[name]


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Rows of several runs put back in their order; narrower logits are filled with the logit of an absent label."""
    first = pieces[0][1]
    width = max(array.shape[-1] for _, array in pieces)
    total = sum(len(rows) for rows, _ in pieces)
    joined = np.full((total, *first.shape[1:-1], width), -1e9, first.dtype)
    for rows, array in pieces:
        joined[rows, ..., : array.shape[-1]] = array
    return joined


ATTACH: dict[str, Any] = {"folded": _Folded, "inputs": _Inputs, "bank": _Bank}
