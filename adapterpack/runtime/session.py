"""A bundle opened under ONNX Runtime: rows of one batch through their adapters."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import AdapterpackError, ConfigError, FormatError, UnknownAdapter, nearest
from ..onnx_graph.confine import require_confined
from ..pack.pack import Pack
from ..pack.validate import load
from . import providers
from .attached import ATTACH, Run
from .bundle import ADAPTER_IDS, ADAPTER_POSITIONS, GRAPH, Bundle, read_bundle
from .positions import where
from .prompts import PAST, Before, before, cache_of
from .tokenizer import Tokenizer
from .virtual import Graph

Arrays = dict[str, np.ndarray]
Names = Sequence[str | None] | str | None


class Session:
    """A running bundle. ``provider`` is ``cuda``, ``cpu`` or None for the best there is; ``session.provider`` says which runs.

    Raises:
        FormatError: the folder is no bundle, its graph reads files outside of it, or an adapter in it was altered or exchanged.
        ProviderError: the provider is unknown or did not start.

    Example:
        >>> session = Session("bundle")  # doctest: +SKIP
        >>> session.run(session.encode(["where is my parcel?"]), adapters=["tickets"])["logits"].argmax()  # doctest: +SKIP
        2
    """

    def __init__(self, bundle: str | os.PathLike[str], provider: str | None = None, threads: int | None = None) -> None:
        self.folder = Path(bundle)
        self.bundle: Bundle = read_bundle(bundle)
        require_confined(self.folder / GRAPH)
        wanted = providers.choose(provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # each optional input would be a warning of its own
        options.intra_op_num_threads = threads or 0
        self._ort = ort.InferenceSession(self.folder / GRAPH, options, providers=wanted)
        self.provider = providers.require(self._ort, wanted)
        self.device = "cuda" if self.provider.startswith("CUDA") else "cpu"
        self.inputs = {value.name: value for value in self._ort.get_inputs()}
        self.outputs = [value.name for value in self._ort.get_outputs()]
        self.packs = _packs(self.folder, self.bundle)
        self._attach = ATTACH[self.bundle.mode](self)
        self._prompts: Arrays = {}
        for pack in self.packs.values():
            self._take_prompt(pack)
        self._tokenizer: Tokenizer | None = None

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that rows may ask for."""
        together = self.bundle.mode == "folded" and len(self.packs) > 1
        return [] if together else list(self.packs)

    @property
    def default(self) -> str | None:
        """What rows have when no adapter is named at all: the base, or the one adapter that is folded into the weights."""
        return self.adapters[0] if self.bundle.mode == "folded" and self.adapters else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.folder)
        return self._tokenizer

    def load(self, pack: Pack | str | os.PathLike[str], name: str | None = None, *, allow_structural: bool = False) -> str:
        """Puts another pack into a free slot of a running bank, and returns its name.

        ``allow_structural`` accepts a bundle of a base that has the names, dtypes and shapes of the pack's, whatever its weights.

        Raises:
            BaseMismatch: the pack belongs to another base.
            Unsupported: no slot is free, or the pack does not fit the graph's slots.
        """
        loaded = pack if isinstance(pack, Pack) else load(pack)
        loaded = loaded if name is None else loaded.called(name)
        self._attach.load(loaded, allow_structural)
        try:
            self._take_prompt(loaded)
        except AdapterpackError:
            self._attach.unload(loaded.name)
            raise
        self.packs = {**self.packs, loaded.name: loaded}
        return loaded.name

    def unload(self, name: str) -> None:
        """Frees the slot of an adapter; rows that are running keep what they started with.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        self.bundle_adapter(name)
        self._attach.unload(name)
        self.packs = {other: pack for other, pack in self.packs.items() if other != name}
        self._prompts = {other: cache for other, cache in self._prompts.items() if other != name}

    def bundle_adapter(self, name: str) -> None:
        """Checks that there is an adapter of that name.

        Raises:
            UnknownAdapter: there is none.
        """
        self.require(name, self.packs)

    def require(self, name: str | None, known: Collection[str]) -> None:
        """Checks that a row's adapter is the base (None) or among ``known``.

        Raises:
            UnknownAdapter: it is not; the nearest name is given.
        """
        if name is not None and name not in known:
            raise UnknownAdapter("the bundle has no such adapter", where=self.folder, found=repr(name), remedy=nearest(name, known))

    def labels(self, adapter: str | None) -> tuple[str, ...] | None:
        """The labels of a row's logits, in order, or None for a task without labels; an adapter without a head has the base's."""
        own = None if adapter is None else self.packs[adapter].manifest.task.labels
        return own or self.bundle.base_labels

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Texts as a padded batch: ``input_ids`` and ``attention_mask`` [batch, longest], int64, padded on the right.

        Raises:
            ConfigError: a text without a token.
        """
        rows = [self.tokenizer.encode(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ConfigError("a text has no tokens", where=self.folder, found=repr(text))
        return pad(rows, self.tokenizer.pad_id, left=False)

    def run(self, inputs: Mapping[str, np.ndarray], adapters: Names = None) -> Arrays:
        """One pass. ``inputs`` are numpy arrays; ``adapters`` names one for each row, None for the base; one name holds for all rows.

        Position ids and a cache are supplied where the graph wants them and they are not given. Masks and position ids count the rows' own
        tokens; the virtual tokens of a prompt are added to them.

        Returns:
            Output name -> array, rows in the order of the inputs. Logits of labels that a row's adapter does not have are -1e9.

        Raises:
            UnknownAdapter: a name that the bundle does not hold.
            ConfigError: a missing or unknown input.
        """
        complete, names = self._complete(inputs, adapters)
        run = self.pin(names)
        return {name: value.numpy() for name, value in run(_values(complete)).items()}

    def feeds(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The inputs as ``OrtValue``, with position ids and an empty cache where the graph wants them and they are not given.

        Raises:
            ConfigError: a missing or unknown input.
        """
        return _values(self._complete(inputs, None)[0])

    def generate(self, prompts: Sequence[Any], adapters: Names = None, **sampling: Any) -> list[Any]:
        """Answers to ``prompts``, one batch, each row with its own adapter; ``sampling`` are the fields of ``Sampling`` and ``emit``.

        Example:
            >>> session.generate(["Order 12 mugs for Lisbon"], adapters=["orders"], max_new_tokens=40)[0].text  # doctest: +SKIP
            '{"item": "mugs", "quantity": 12, "city": "Lisbon"}'
        """
        from .generate import Sampling, generate  # noqa: PLC0415 - generation is built on the session

        emit = sampling.pop("emit", None)
        known = [field.name for field in dataclasses.fields(Sampling)]
        for name in sampling:
            if name not in known:
                raise ConfigError("unknown sampling parameter", found=repr(name), remedy=nearest(name, known))
        return list(generate(self, prompts, adapters, Sampling(**sampling), emit))

    def names(self, adapters: Names, rows: int) -> list[str | None]:
        """One name a row, each known to the bundle."""
        chosen = self.default if adapters is None else adapters
        names: list[str | None] = [chosen] * rows if chosen is None or isinstance(chosen, str) else list(chosen)
        if len(names) != rows:
            raise ConfigError("adapters must name one for each row", expected=rows, found=len(names))
        for name in names:
            if not isinstance(name, str | None):
                raise ConfigError("an adapter is named by a text, the base by None", found=repr(name))
            self.require(name, self.packs)
        return names

    def pin(self, names: Sequence[str | None]) -> Run:
        """One run after another on ``OrtValue`` feeds with these adapters, one a row, whatever is loaded or unloaded meanwhile.

        Raises:
            UnknownAdapter: one was unloaded.
            Unsupported: the rows of a folded bundle cannot choose.
        """
        return self._attach.pin(names)

    def step(self, feeds: Mapping[str, Any], names: list[str | None]) -> dict[str, Any]:
        """One pass on ``OrtValue`` feeds, nothing copied back."""
        return self.pin(names)(feeds)

    def call(self, feeds: Mapping[str, Any], options: Any = None) -> dict[str, Any]:
        """The graph itself. On CUDA a cache stays on the device, unless ONNX Runtime's own adapters are active: bindings ignore those.

        Raises:
            AdapterpackError: ONNX Runtime refuses, for instance because of a shape or an id that the graph cannot take.
        """
        try:
            if self.device == "cpu" or options is not None:
                values = self._ort.run_with_ort_values(self.outputs, dict(feeds), options)
            else:
                values = self._bound(feeds)
        except Exception as error:
            reason = str(error).partition("\n")[0][:300]
            raise AdapterpackError("ONNX Runtime could not run the graph on these inputs", where=self.folder, found=reason,
                                   remedy="check shapes, lengths and ids against the model's config") from error
        return dict(zip(self.outputs, values, strict=True))

    def _bound(self, feeds: Mapping[str, Any]) -> list[Any]:
        binding = self._ort.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.device if name.startswith("present.") else "cpu")
        self._ort.run_with_iobinding(binding)
        return list(binding.get_outputs())

    def _complete(self, inputs: Mapping[str, np.ndarray], adapters: Names) -> tuple[Arrays, list[str | None]]:
        known = set(self.inputs) - {ADAPTER_IDS}
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise ConfigError("inputs that the graph does not take", expected=", ".join(sorted(known)), found=", ".join(unknown),
                              remedy="name adapters with adapters=" if ADAPTER_IDS in unknown else None)
        if "input_ids" not in inputs or inputs["input_ids"].ndim != 2 or 0 in inputs["input_ids"].shape:
            raise ConfigError("inputs are missing", expected="input_ids [rows, tokens], at least one of each",
                              found=inputs["input_ids"].shape if "input_ids" in inputs else ", ".join(inputs) or "nothing")
        complete = dict(inputs)
        batch, length = complete["input_ids"].shape
        names = self.names(adapters, batch)
        first = self.before(names)
        for name, array in first.cache.items():
            complete.setdefault(name, array)
        past = next((array.shape[2] for name, array in complete.items() if name.startswith(PAST)), 0)
        if "attention_mask" in known:
            own = past + length - first.width
            mask = complete.get("attention_mask", np.ones((batch, own), np.int64))
            if mask.shape != (batch, own):
                raise ConfigError("attention_mask must cover every token, those in the cache too", expected=(batch, own), found=mask.shape)
            complete["attention_mask"] = first.covering(mask)
            if "position_ids" in known:
                given = complete.get("position_ids")
                complete["position_ids"] = positions(complete["attention_mask"])[:, -length:] if given is None else given + first.lengths
        if ADAPTER_POSITIONS in known:
            given = complete.get(ADAPTER_POSITIONS)
            complete[ADAPTER_POSITIONS] = self._positions(complete, first, past, names) if given is None else given.astype(bool)
        missing = sorted(known - set(complete))
        if missing:
            raise ConfigError("inputs are missing", expected=", ".join(missing))
        return {name: array.astype(np.int64) if name.endswith(("_ids", "_mask")) else array for name, array in complete.items()}, names

    def before(self, names: Sequence[str | None]) -> Before:
        """The cache that rows with these adapters begin with: their prompts, or nothing; and the mask that covers it."""
        return before(self.inputs, self._prompts, names)

    def acting(self, inputs: Mapping[str, np.ndarray], names: Sequence[str | None], before: np.ndarray | None = None) -> np.ndarray:
        """Where each row's adapter acts in a pass: ``[batch, tokens]`` bool, which is True for adapters that act everywhere.

        ``inputs`` are the pass's ``input_ids`` and the ``attention_mask`` of these tokens; ``before`` ``[batch]`` says, of a pass on a
        cache, in which rows the adapter has acted so far.
        """
        return where({name: pack.acts for name, pack in self.packs.items()}, names, inputs["input_ids"], inputs["attention_mask"], before)

    def _positions(self, complete: Arrays, first: Before, past: int, names: Sequence[str | None]) -> np.ndarray:
        if past > first.width and any(name is not None and self.packs[name].acts is not None for name in names):
            raise ConfigError("where the adapter acts in a pass on a cache is told by what the cache was filled with", where=self.folder,
                              expected=ADAPTER_POSITIONS, remedy="give it: session.acting says it for every pass in turn")
        ids = complete["input_ids"]
        mask = complete.get("attention_mask", np.ones_like(ids))
        return self.acting({"input_ids": ids, "attention_mask": mask[:, -ids.shape[1] :]}, names)

    def _take_prompt(self, pack: Pack) -> None:
        cache = cache_of(pack, Graph(self.folder, self.inputs))
        if cache is not None:
            self._prompts = {**self._prompts, pack.name: cache}


def positions(mask: np.ndarray) -> np.ndarray:
    """Position ids of a mask ``[batch, length]``: counted from the first real token, whatever the padding side."""
    counted: np.ndarray = np.clip(np.cumsum(mask, axis=1) - 1, 0, None).astype(np.int64)
    return counted


def last_places(mask: np.ndarray) -> np.ndarray:
    """Where each row's last real token is, ``[rows]``, whatever the padding side."""
    found: np.ndarray = mask.shape[1] - 1 - np.argmax(mask[:, ::-1] > 0, axis=1)
    return found


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> Arrays:
    """Ragged ids as ``input_ids`` and ``attention_mask`` [batch, longest], int64."""
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _packs(folder: Path, bundle: Bundle) -> dict[str, Pack]:
    packs = {adapter.name: load(folder / adapter.path, adapter.name) for adapter in bundle.adapters}
    for adapter in bundle.adapters:
        if packs[adapter.name].id != adapter.pack:
            raise FormatError("the bundle holds another adapter than its manifest names", where=folder / adapter.path,
                              expected=adapter.pack[:19], found=packs[adapter.name].id[:19], remedy="export again")
    return packs


def _values(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
