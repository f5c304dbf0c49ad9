"""Opens a bundle under ONNX Runtime: its graphs, and its adapters, which are loaded and unloaded while rows
run.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..adapter_methods import PROMPT
from ..bundle.decoder_graph import DECODER, graphs_of
from ..bundle.files import require_files, require_in_list, require_same
from ..bundle.manifest import FILE_NAME, Bundle, graph_file, manifest_bytes, parse_bundle
from ..bundle.proofs import VerificationCache
from ..errors import ConfigError, FormatError, UnknownAdapter, Unsupported, nearest
from ..onnx_graph.confine import require_safe
from ..onnx_graph.graph_file import GraphFile, StoredTensor
from ..pack.pack import Pack
from ..pack.validate.validation import load, load_proved
from ..slots.prompt_rows import virtual_tokens
from ..tasks.data.problems import PROBLEMS, number_labels
from ..tasks.session import RowHead
from ..tasks.task import MAIN, get_task
from .adapters.mix import Mix, Names
from .adapters.modes import ADAPTER_MODES
from .adapters.pinned import Adapters, PinnedRows
from .adapters.prompt_cache import prompt_kv
from .adapters.slot_values import SlotValues
from .generation.sampling import Sampling
from .ort.contract import require_contract
from .ort.model import OrtModel
from .ort.sandboxed_open import require_openable
from .providers.device import Device
from .providers.kernels import list_unfit
from .providers.placement import CpuNodesWarning
from .providers.resolved_device import resolve
from .text.context_length import most_characters
from .text.model_files import read_object
from .text.tokenizer import NoTokenizer, Tokenizer


class OpenBundle:
    """A bundle that ONNX Runtime has open: its graphs, its adapters at this moment, its configuration and
    tokenizer.

    See :class:`~.session.Session` for the arguments and errors.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        provider: str | Device | None = None,
        threads: int | None = None,
        mapped: bool = False,
        verify: str = "cached",
    ) -> None:
        self.folder, self._verify = Path(bundle), verify
        manifest = manifest_bytes(bundle)
        self.bundle: Bundle = parse_bundle(manifest, self.folder / FILE_NAME)
        self._proofs = VerificationCache(manifest)
        proved = verify != "off" and self._proofs.is_valid()
        self._resolved = resolve(Device.of(provider, threads))
        self.task = get_task(self.bundle.task)
        if self._resolved.captures and not self.bundle.decoder:
            raise Unsupported(
                "only the engine's steps are captured, and the bundle has no graph for them",
                where=self.folder,
                remedy="leave --capture out, or export with --static-cache",
            )
        compared = require_files(self.folder, self.bundle, verify)
        self._run_time = partial(OrtModel, self.folder, dtype=self.bundle.dtype, mapped=mapped)
        self._opened: dict[str, Any] = {}
        """What is opened when it is first used, by name."""
        self._opening = threading.RLock()
        files = {
            part: GraphFile(self.folder / graph_file(part))
            for part in (() if proved else graphs_of(self.bundle))
        }
        for file in files.values():
            data = require_safe(file)
            if verify != "off":
                require_in_list(self.folder, self.bundle, data)
        self._stored = {part: file.stored for part, file in files.items()}
        main = DECODER if self.bundle.decoder else MAIN  # then the ordinary graph may never be needed
        self._opened |= {part: self._open(part) for part in (*self.bundle.parts[:-1], main)}
        first: OrtModel = self._opened[main]
        self.provider, self.memory, self._cache_inputs = first.provider, first.memory, first.inputs
        self.slot_values = SlotValues(self.bundle, self.folder, self.stored)
        packs = _packs(self.folder, self.bundle, load_proved if proved else load)
        self._mode = ADAPTER_MODES[self.bundle.mode](self)
        prompts = {name: cache for name, pack in packs.items() if (cache := self._prompt(pack)) is not None}
        attached = self._mode.open(None if proved or verify == "off" else packs)
        self._adapters = Adapters({name: pack.unloaded() for name, pack in packs.items()}, prompts, attached)
        self._changing = threading.Lock()
        """Taken to put another value in the place of ``_adapters``; to read it takes no lock."""
        require_same(compared)
        if verify != "off":
            self._proofs.remember_validity()

    def frozen(self) -> Self:
        """The session with the adapters that it has at this moment, whatever is loaded or unloaded meanwhile:
        a row finds its adapter, prompt and labels by one name, and must not meet two adapters of that name.
        """
        return copy.copy(self)

    def _open(self, part: str) -> OrtModel:
        if self._verify != "off":
            require_openable(self.folder, self.bundle, self._proofs, [part], self._resolved.provider.name)
        graph = self._run_time(part, self._resolved if part == DECODER else self._resolved.without_capture())
        require_contract(self.bundle, part, graph)
        if graph.cpu_nodes:
            warnings.warn(
                f"{len(graph.cpu_nodes)} nodes of {graph.path} run on the CPU: {list_unfit(graph.cpu_nodes)}",
                CpuNodesWarning,
                2,
            )
        return graph

    def stored(self, part: str) -> Mapping[str, StoredTensor]:
        """Where a graph of the bundle stores its initializers."""
        if part not in self._stored:
            self._stored[part] = GraphFile(self.folder / graph_file(part)).stored
        return self._stored[part]

    @contextmanager
    def compared(self) -> Iterator[None]:
        """What the block reads by the names of files are the files that the manifest lists."""
        compared = require_files(self.folder, self.bundle, "off" if self._verify == "off" else "cached")
        yield
        require_same(compared)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives of the bundle's files when it is first needed."""
        if name not in self._opened:
            with self._opening:
                if name not in self._opened:
                    with self.compared():
                        made = make()
                    self._opened[name] = made
        return self._opened[name]

    @property
    def pads_left(self) -> bool:
        """Whether shorter rows of a batch are filled up on the left."""
        return self.task.pads_left and self.bundle.padding == "left"

    @property
    def packs(self) -> Mapping[str, Pack]:
        """The packs at this moment, by the names that rows name them by."""
        return self._adapters.packs

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that rows may name."""
        packs = self.packs
        return [] if self.bundle.mode == "folded" and len(packs) > 1 else list(packs)

    @property
    def default(self) -> str | None:
        """What rows have when no adapter is named at all: the base, or the one adapter that is folded into
        the weights.
        """
        return self.adapters[0] if self.bundle.mode == "folded" and self.adapters else None

    def graph(self, part: str) -> OrtModel:
        """The graph of that part. A bundle with a graph for the engine opens that one first, and the ordinary
        one when it is first used: most calls need one of them, and each has the weights in memory.
        """
        graph: OrtModel = self.once(part, lambda: self._open(part))
        return graph

    @property
    def graphs(self) -> Mapping[str, OrtModel]:
        """The graphs of the task's parts, each opened when it is first used."""
        return _Graphs(self)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The inputs of the graph that gives the answer."""
        return self.graph(MAIN).inputs

    @property
    def outputs(self) -> list[str]:
        """Its outputs."""
        return self.graph(MAIN).outputs

    @property
    def pad_id(self) -> int:
        """The id that fills up short rows; masked, so any would do where there is no tokenizer."""
        return self.tokenizer.pad_id if self.has_tokenizer else 0

    @property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return self._config("config.json")

    @property
    def generation_config(self) -> dict[str, Any]:
        """The model's ``generation_config.json``, or nothing."""
        return self._config("generation_config.json")

    def _config(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = self.once(name, lambda: read_object(self.folder / name))
        return config

    @property
    def image_token(self) -> int:
        """The id that stands for one position of an image.

        Raises:
            ConfigError: the config names none.
        """
        for key in ("image_token_id", "image_token_index"):
            if type(self.config.get(key)) is int:
                return int(self.config[key])
        raise ConfigError(
            "the model's config names no token for images",
            expected="image_token_id",
            found=", ".join(sorted(self.config))[:200],
        )

    @property
    def image_positions(self) -> int:
        """How many positions one image takes in a decoder, which the graph that looks at images says.

        Raises:
            Unsupported: it does not.
        """
        positions = next(
            graph.shapes["image_features"][1]
            for graph in self.graphs.values()
            if "image_features" in graph.shapes
        )
        if not isinstance(positions, int):
            raise Unsupported(
                "the number of positions of an image is not known", where=self.folder, found=positions
            )
        return positions

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""
        tokenizer: Tokenizer = self.once(
            "tokenizer", lambda: Tokenizer(self.folder, most_characters(self), self.compared)
        )
        return tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle can make tokens of texts; without, it answers token ids with token ids."""
        return (self.folder / "tokenizer.json").is_file()

    def tokenizer_of(self, sampling: Sampling) -> Tokenizer | NoTokenizer:
        """The tokenizer of answers with these parameters, which need none where they ask for no text.

        Raises:
            StorageError: there is none, and they have a stop text or a form.
        """
        if self.has_tokenizer or sampling.reads_text:
            return self.tokenizer
        return self.once("no tokenizer", lambda: NoTokenizer(self.folder))  # type: ignore[no-any-return]

    def _with(self, pack: Pack) -> Self:
        """As :meth:`frozen`, with one more adapter."""
        one, before = self.frozen(), self._adapters
        with self.compared():  # the base's own weights may be read
            attached, prompt = self._mode.load(before.attached, pack), self._prompt(pack)
        prompts = before.prompts if prompt is None else {**before.prompts, pack.name: prompt}
        one._adapters = Adapters({**before.packs, pack.name: pack}, prompts, attached)
        return one

    def unload(self, name: str) -> None:
        """Frees the slot of an adapter; rows that are running keep what they started with.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        with self._changing:
            self.require_adapter(name)
            packs, prompts, attached = self._adapters
            self._adapters = Adapters(
                {other: pack for other, pack in packs.items() if other != name},
                {other: cache for other, cache in prompts.items() if other != name},
                self._mode.unload(attached, name),
            )

    def pack(self, name: str) -> Pack:
        """The pack of that name.

        Raises:
            UnknownAdapter: there is none.
        """
        packs = self.packs
        self.require(name, packs)
        return packs[name]

    def require_adapter(self, name: str) -> None:
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
            raise UnknownAdapter(
                "the bundle has no such adapter",
                where=self.folder,
                found=repr(name),
                remedy=nearest(name, known),
            )

    def labels(self, adapter: str | None) -> tuple[str, ...] | None:
        """The labels of a row's logits, in order, or None for a task without labels; an adapter without a
        head has the base's.
        """
        named = self.head(None if adapter is None else self.pack(adapter)).labels
        return self.bundle.base_labels if named is None else tuple(named)

    def head(self, pack: Pack | Mix | None) -> RowHead:
        """The head of rows with a pack, None for the base: a pack without one has the base's, and so has a
        mix, as no sum has a head.
        """
        pack = None if isinstance(pack, Mix) else pack
        named = None if pack is None else pack.manifest.task.labels
        by_base, bases = self.bundle.base_head_trained, self.bundle.base_labels
        problem = self.bundle.base_problem if named is None or pack is None else pack.manifest.problem
        width = 0 if pack is None or named is not None else self._head_width(pack)
        if width and not (by_base and bases is not None and len(bases) == width):
            named = number_labels(width)
        return RowHead(
            by_base or (pack is not None and bool(pack.full())),
            named or (bases if by_base else None),
            PROBLEMS[problem],
        )

    def _head_width(self, pack: Pack) -> int:
        """How many labels the head of a pack has, which need not name them: PEFT's files never do. 0 where it
        has none.
        """
        paths = (
            [path for path, site in self.bundle.sites.items() if site.labels and site.output == "logits"]
            if self.task.labelled
            else []
        )
        return next(
            (
                len(values)
                for path, params in pack.full().items()
                if path in paths
                for values in params.values()
            ),
            0,
        )

    def head_trained(self, adapter: str | None) -> bool:
        """Whether a row's head was trained, by its adapter or with the base."""
        return self.head(None if adapter is None else self.pack(adapter)).trained

    def trained_labels(self, adapter: str | None) -> Sequence[str] | None:
        """The labels of a row's logits, in order; None where nobody trained its head."""
        return self.head(None if adapter is None else self.pack(adapter)).labels

    def shape(self, name: str) -> list[Any]:
        """The shape of one row of an input, whichever graph has it; an extent that is not fixed has a
        name.
        """
        return list(
            next(
                graph.inputs[name].shape
                for graph in map(self.graph, self.bundle.parts)
                if name in graph.inputs
            )[1:]
        )

    def names(self, adapters: Names, rows: int) -> list[str | None]:
        """One name a row, each known to the bundle."""
        chosen = self.default if adapters is None else adapters
        names: list[str | None] = (
            [chosen] * rows if chosen is None or isinstance(chosen, str) else list(chosen)
        )
        if len(names) != rows:
            raise ConfigError("adapters must name one for each row", expected=rows, found=len(names))
        for name in names:
            if not isinstance(name, str | None):
                raise ConfigError("an adapter is named by a text, the base by None", found=repr(name))
            self.require(name, self.packs)
        return names

    def pin(self, names: Sequence[str | None]) -> PinnedRows:
        """Rows with these adapters, as they are now: one run after another on ``OrtValue`` feeds, whatever is
        loaded or unloaded meanwhile.

        Raises:
            UnknownAdapter: one was unloaded.
            Unsupported: the rows of a folded bundle cannot choose.
        """
        adapters = self._adapters  # read once: another thread may exchange it
        for name in names:
            self.require(name, adapters.packs)
        return PinnedRows(names, adapters, self._mode.run(adapters, names))

    def acting(
        self, inputs: Mapping[str, np.ndarray], names: Sequence[str | None], before: np.ndarray | None = None
    ) -> np.ndarray:
        """At which positions the adapter of each row acts in a pass: see :meth:`.Pinned.acting`."""
        return self.pin(names).acting(inputs, before)

    def prompt(self, pack: Pack | Mix) -> np.ndarray | None:
        """What the caches of rows with a pack begin with, ``[layers, 2, heads, n, head_dim]``; None without a
        prompt, as of a mix.
        """
        if isinstance(pack, Mix):
            return None
        packs, prompts, _ = self._adapters
        return prompts.get(pack.name) if packs.get(pack.name) is pack else self._prompt(pack)

    def _prompt(self, pack: Pack) -> np.ndarray | None:
        before_tokens = PROMPT in self.bundle.sites and virtual_tokens(pack)
        return None if before_tokens else prompt_kv(pack, self.folder, self._cache_inputs)


class _Graphs(Mapping[str, OrtModel]):
    def __init__(self, bundle: OpenBundle) -> None:
        self._bundle = bundle

    def __getitem__(self, part: str) -> OrtModel:
        return self._bundle.graph(part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.bundle.parts)

    def __len__(self) -> int:
        return len(self._bundle.bundle.parts)


def _packs(folder: Path, bundle: Bundle, read: Callable[[Path, str], Pack]) -> dict[str, Pack]:
    packs = {adapter.name: read(folder / adapter.path, adapter.name) for adapter in bundle.adapters}
    for adapter in bundle.adapters:
        if packs[adapter.name].id != adapter.pack:
            raise FormatError(
                "the bundle holds another adapter than its manifest names",
                where=folder / adapter.path,
                expected=adapter.pack[:19],
                found=packs[adapter.name].id[:19],
                remedy="export again",
            )
    return packs
