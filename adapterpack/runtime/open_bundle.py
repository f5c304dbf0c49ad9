"""Opens a bundle under ONNX Runtime: its graphs, the inputs that it makes of texts, images and speech, and
its adapters, which can be loaded and unloaded while rows run.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from ..adapter_methods import PROMPT, Tensors
from ..bundle import (
    DECODER,
    FILE_NAME,
    VALID,
    Bundle,
    VerificationCache,
    graph_file,
    graphs_of,
    manifest_bytes,
    parse_bundle,
    require_files,
    require_in_list,
    require_same,
)
from ..errors import ConfigError, FormatError, UnknownAdapter, Unsupported, require_among
from ..io import Json
from ..onnx_graph import GraphFile, StoredTensor, require_safe, try_opening
from ..pack import Pack
from ..pack.validate import load, load_proved
from ..paths import StrPath
from ..sandbox.child import is_inside
from ..slots import virtual_tokens
from ..tasks import MAIN, SOUNDS, Arrays, RowHead, get_task
from ..tasks.data import PROBLEMS, Picture, Recording, map_rows, number_labels
from .adapters import ADAPTER_MODES, Adapters, Mix, Names, PinnedRows, SlotValues, prompt_kv
from .genai_bundle import MADE_OF, bundle_folder
from .generation import Sampling
from .media import PIXELS, ImageLayout, layout_of, preparation, rate_of, section, sized_image_of, sound_of
from .ort import BFLOAT16, OrtModel, require_contract
from .padding import pad
from .providers import CpuNodesWarning, Device, list_unfit, resolve
from .text import Characters, NoTokenizer, Tokenizer, collapse, most_characters, read_object

T = TypeVar("T")


class OpenBundle:
    """An open bundle: the sessions of its graphs, its current adapters, its configuration and tokenizer.

    Arguments and errors are those of :class:`~.session.Session`. Graphs that a call may never need, and the
    tokenizer, are opened on first use.
    """

    def __init__(
        self,
        bundle: StrPath,
        provider: str | Device | None = None,
        threads: int | None = None,
        mapped: bool = False,
        verify: str = "cached",
    ) -> None:
        self.folder = bundle_folder(bundle)
        self._verify = verify
        manifest = manifest_bytes(self.folder)
        self.bundle = parse_bundle(manifest, self.folder / FILE_NAME)
        made_of = self.bundle.parity.get(MADE_OF)
        self.given = Path(made_of) if isinstance(made_of, str) else self.folder
        """The folder that the user knows; that of another tool has its bundle in the cache."""
        self._proofs = VerificationCache(manifest)
        proved = verify != "off" and self._proofs.knows()
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
        """Graphs, configurations and the tokenizer that have been opened so far, by name."""
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
        # with the engine's graph, the ordinary one may never be needed
        main = DECODER if self.bundle.decoder else MAIN
        self._opened |= {part: self._open(part) for part in (*self.bundle.parts[:-1], main)}
        first: OrtModel = self._opened[main]
        self.provider, self.memory = first.provider, first.memory
        self.slot_values = SlotValues(self.bundle, self.folder, self.initializers)
        packs = _packs(self.folder, self.bundle, load_proved if proved else load)
        self._mode = ADAPTER_MODES[self.bundle.mode](self)
        prompts = {name: cache for name, pack in packs.items() if (cache := self._prompt(pack)) is not None}
        attached = self._mode.open(None if proved or verify == "off" else packs)
        self._adapters = Adapters({name: pack.unloaded() for name, pack in packs.items()}, prompts, attached)
        self._changing = threading.Lock()
        """Held to replace ``_adapters``; reading it needs no lock, since its value is immutable."""
        require_same(compared)
        if verify != "off":
            self._proofs.remember(VALID)

    @staticmethod
    def of(
        bundle: StrPath | OpenBundle,
        provider: str | Device | None,
        threads: int | None,
        verify: str,
    ) -> OpenBundle:
        """Returns an open bundle as it is, or opens the bundle in a folder."""
        return (
            bundle if isinstance(bundle, OpenBundle) else OpenBundle(bundle, provider, threads, verify=verify)
        )

    def freeze(self) -> Self:
        """Returns a copy that keeps the current adapters, whatever is loaded or unloaded later. A row looks
        up its adapter, prompt and labels by name, and must not see two adapters of one name.
        """
        return copy.copy(self)

    def _open(self, part: str) -> OrtModel:
        if self._verify != "off":
            require_openable(self.folder, self.bundle, self._proofs, part, self._resolved.provider.name)
        graph = self._run_time(part, self._resolved if part == DECODER else self._resolved.without_capture())
        require_contract(self.bundle, part, graph)
        if graph.cpu_nodes:
            warnings.warn(
                f"{len(graph.cpu_nodes)} nodes of {graph.path} run on the CPU: {list_unfit(graph.cpu_nodes)}",
                CpuNodesWarning,
                2,
            )
        return graph

    def initializers(self, part: str) -> Mapping[str, StoredTensor]:
        """Returns the initializers that a graph of the bundle stores, by name."""
        if part not in self._stored:
            self._stored[part] = GraphFile(self.folder / graph_file(part)).stored
        return self._stored[part]

    @contextmanager
    def compare_files(self) -> Iterator[None]:
        """Guards a block that reads files by name: checks before and after it that they are the files that
        the manifest lists.
        """
        compared = require_files(self.folder, self.bundle, "off" if self._verify == "off" else "cached")
        yield
        require_same(compared)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Returns ``make()`` of the first call for that name; later calls return the same object.
        Thread-safe.
        """
        if name not in self._opened:
            with self._opening:
                if name not in self._opened:
                    with self.compare_files():
                        made = make()
                    self._opened[name] = made
        opened: T = self._opened[name]
        return opened

    @property
    def pads_left(self) -> bool:
        """Whether shorter rows of a batch are padded on the left."""
        return self.task.pads_left and self.bundle.padding == "left"

    @property
    def packs(self) -> Mapping[str, Pack]:
        """The current packs, by the names that rows use."""
        return self._adapters.packs

    @property
    def adapters(self) -> list[str]:
        """The names that rows may use."""
        packs = self.packs
        return [] if self.bundle.mode == "folded" and len(packs) > 1 else list(packs)

    @property
    def default(self) -> str | None:
        """The adapter of rows that name none: None for the base, or the single adapter that is folded into
        the weights.
        """
        return self.adapters[0] if self.bundle.mode == "folded" and self.adapters else None

    def graph(self, part: str) -> OrtModel:
        """Returns the graph of a part, opened on first use. A bundle with a graph for the engine opens that
        graph at once and the ordinary one later: most calls need only one of them, and each holds the weights
        in memory.
        """
        return self.once(part, lambda: self._open(part))

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The inputs of the task's last graph, which gives the answer."""
        return self.graph(MAIN).inputs

    @property
    def outputs(self) -> list[str]:
        """The outputs of the task's last graph."""
        return self.graph(MAIN).outputs

    @property
    def pad_id(self) -> int:
        """The id that pads short rows; without a tokenizer 0, since padding is masked."""
        return self.tokenizer.pad_id if self.has_tokenizer else 0

    @property
    def config(self) -> Json:
        """The model's ``config.json``."""
        return self._config("config.json")

    @property
    def generation_config(self) -> Json:
        """The model's ``generation_config.json``, empty if it has none."""
        return self._config("generation_config.json")

    def _config(self, name: str) -> Json:
        return self.once(name, lambda: read_object(self.folder / name))

    @property
    def image_token(self) -> int:
        """The token id that marks one position of an image.

        Raises:
            ConfigError: the config names no such token.
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
    def image_layout(self) -> ImageLayout:
        """How the model reads images."""
        return self.once("image layout", self._make_image_layout)

    def _make_image_layout(self) -> ImageLayout:
        graph = next(
            graph for graph in map(self.graph, self.bundle.parts) if "image_features" in graph.results
        )
        sized = not isinstance(graph.inputs[PIXELS].shape[-1], int)
        positions = graph.results["image_features"].shape[1]
        return layout_of(self.config, [*graph.inputs], sized, positions if isinstance(positions, int) else 0)

    def image_lengths(self, images: Arrays) -> list[int]:
        """Returns how many positions each image takes in the decoder; ``images`` are arrays as the model's
        processor makes them.
        """
        return self.image_layout.lengths(self.image_layout.whole(images))

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""
        return self.once(
            "tokenizer", lambda: Tokenizer(self.folder, most_characters(self), self.compare_files)
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle can tokenize text. Without a tokenizer it takes token ids and returns
        token ids.
        """
        return (self.folder / "tokenizer.json").is_file()

    def tokenizer_of(self, sampling: Sampling) -> Tokenizer | NoTokenizer:
        """Returns the tokenizer for answers with these parameters, or a stand-in if the bundle has none and
        they do not depend on text.

        Raises:
            StorageError: the bundle has no tokenizer, and the parameters have a stop text or a grammar.
        """
        if self.has_tokenizer or sampling.reads_text:
            return self.tokenizer
        return self.once("no tokenizer", lambda: NoTokenizer(self.folder))

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Tokenizes texts into a padded batch: ``input_ids`` and ``attention_mask`` ``[batch, longest]``,
        int64, padded on the right.

        Raises:
            ConfigError: a text has no tokens.
        """
        return pad(map_rows(texts, self.tokenizer.row), self.tokenizer.pad_id, left=False)

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """Returns images as ``pixel_values`` ``[images, channels, height, width]`` float32.

        An image is the path or the bytes of a PNG or JPEG, prepared as the base model's processor does, or a
        ``.npy`` file or an array that is prepared already. PNG and JPEG need the extra ``vision``.

        Raises:
            ConfigError, FormatError, StorageError, Unsupported: see
                :func:`adapterpack.runtime.media.inputs.image_of`.

        Example:
            >>> session.run({"pixel_values": session.pixels(["photo.jpg"])},
            ...     ["leaves"])["logits"].argmax()  # doctest: +SKIP
            4
        """
        return np.stack([self.sized_pixels(image)[0][0] for image in images])

    def sized_pixels(self, image: Picture) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns one image as :meth:`pixels` does, and its own height and width."""
        prepared = partial(self.once, "image_processor", lambda: preparation(self.folder))
        pixels, size = sized_image_of(image, self.shape("pixel_values"), prepared)
        return pixels[None], size

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]]
    ) -> tuple[Arrays, list[list[tuple[int, int] | None]]]:
        """Tokenizes pairs of texts into a padded batch, with ``token_type_ids`` where the graph reads them.
        Also returns, for each token of a row, the character range in the second text, or None for other
        tokens.
        """
        rows = map_rows(pairs, lambda pair: self.tokenizer.pair(*pair))
        inputs = pad([ids for ids, _, _ in rows], self.tokenizer.pad_id, left=False)
        if "token_type_ids" in self.inputs or "token_type_ids" in self.graph(MAIN).optional:
            inputs["token_type_ids"] = pad([types for _, types, _ in rows], 0, left=False)["input_ids"]
        return inputs, [spans for _, _, spans in rows]

    @property
    def sound_input(self) -> str | None:
        """The name of the input for sound, None if there is none."""
        part = self.bundle.parts[0]
        # a server asks this: the ordinary graph would be a second copy of the engine's weights
        first = self.graph(DECODER if part == MAIN and self.bundle.decoder else part).inputs
        return next((name for name in SOUNDS if name in first), None)

    def sounds(self, recordings: Sequence[Recording]) -> list[Arrays]:
        """Returns the inputs of each recording, arrays ``[1, ...]``, with a mask if the graph takes one;
        :func:`adapterpack.runtime.media.inputs.sound_of` says what a recording is.
        """
        config = self.once("feature_extractor", lambda: section(self.folder, "feature_extractor")[0])
        name = self.sound_input
        assert name is not None
        shape = self.shape(name)
        masked = "attention_mask" in self.graph(self.bundle.parts[0]).inputs

        def inputs_of(recording: Recording) -> Arrays:
            sound = sound_of(recording, shape, config)[None]
            return {name: sound, **({"attention_mask": np.ones(sound.shape[:2], np.int64)} if masked else {})}

        return map_rows(recordings, inputs_of)

    def transcript(self, ids: Sequence[int], timestamps: bool) -> Json:
        """Returns ``text``, that of the ids of all frames by CTC, and with ``timestamps`` its words as
        ``chunks``, each with the seconds in which it is spoken.

        Raises:
            ConfigError: words are wanted, and the tokenizer or the model's config does not tell them.
        """
        letters = None if self.has_tokenizer else self.once("letters", lambda: Characters(self.folder))
        spoken = collapse(ids, int(self.config.get("pad_token_id") or 0))
        read = self.tokenizer.decode if letters is None else letters.text
        answer: Json = {"text": read([number for number, _, _ in spoken])}
        strides = self.config.get("conv_stride")
        if not timestamps:
            return answer
        if letters is None or not strides:
            raise ConfigError("words of this model have no times", where="timestamps", remedy="leave it out")
        rate = rate_of(section(self.folder, "feature_extractor")[0])
        second = math.prod(strides) / rate
        chunks = [
            {"text": word.text, "timestamp": [round(word.start * second, 3), round(word.end * second, 3)]}
            for word in letters.words(spoken)
        ]
        return {**answer, "chunks": chunks}

    def _with(self, pack: Pack) -> Self:
        """Returns a copy, as :meth:`freeze` does, with one more adapter."""
        one = self.freeze()
        before = self._adapters
        with self.compare_files():  # the base's own weights may be read
            attached = self._mode.load(before.attached, pack)
            prompt = self._prompt(pack)
        prompts = before.prompts if prompt is None else {**before.prompts, pack.name: prompt}
        one._adapters = Adapters({**before.packs, pack.name: pack}, prompts, attached)
        return one

    def unload(self, name: str) -> None:
        """Removes an adapter and frees its slot; running rows keep the adapters with which they started.

        Raises:
            UnknownAdapter: no adapter has that name.
        """
        with self._changing:
            self.pack(name)
            packs, prompts, attached = self._adapters
            self._adapters = Adapters(
                {other: pack for other, pack in packs.items() if other != name},
                {other: cache for other, cache in prompts.items() if other != name},
                self._mode.unload(attached, name),
            )

    def pack(self, name: str) -> Pack:
        """Returns the pack of that name.

        Raises:
            UnknownAdapter: no adapter has that name.
        """
        packs = self.packs
        self.require(name, packs)
        return packs[name]

    def require(self, name: str | None, known: Collection[str]) -> None:
        """Checks that a row's adapter is the base (None) or among ``known``.

        Raises:
            UnknownAdapter: it is not; the error suggests the nearest name.
        """
        require_among("the bundle has no such adapter", name, known, UnknownAdapter, self.folder)

    def labels(self, adapter: str | None) -> tuple[str, ...] | None:
        """Returns the labels of a row's logits, in order, or None for a task without labels. An adapter
        without a head has the base's labels.
        """
        named = self.head(None if adapter is None else self.pack(adapter)).labels
        return self.bundle.base_labels if named is None else tuple(named)

    def head(self, pack: Pack | Mix | None) -> RowHead:
        """Returns the head of rows with a pack, None for the base. A pack without a head uses the base's, and
        so does a mix, since heads cannot be added.
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
        """Returns how many labels the head of a pack has, 0 without a head. The pack need not name its
        labels: PEFT's files never do.
        """
        for path, params in pack.full().items() if self.task.labelled else ():
            site = self.bundle.sites.get(path)
            if site is not None and site.labels and site.output == "logits":
                return len(next(iter(params.values())))
        return 0

    def shape(self, name: str) -> list[Any]:
        """Returns the shape of one row of an input, from the graph that has it; variable extents
        are names.
        """
        return list(
            next(
                graph.inputs[name].shape
                for graph in map(self.graph, self.bundle.parts)
                if name in graph.inputs
            )[1:]
        )

    def names(self, adapters: Names, rows: int) -> list[str | None]:
        """Returns one adapter name for each row and checks that the bundle has them all."""
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
        """Pins rows to their current adapters. The result runs passes on ``OrtValue`` feeds, whatever is
        loaded or unloaded meanwhile.

        Raises:
            UnknownAdapter: an adapter was unloaded.
            Unsupported: the bundle is folded, so rows cannot choose an adapter.
        """
        adapters = self._adapters  # read once: another thread may replace it
        for name in names:
            self.require(name, adapters.packs)
        return PinnedRows(names, adapters, self._mode.run(adapters, names))

    def acting(
        self, inputs: Tensors, names: Sequence[str | None], before: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the positions at which the adapter of each row acts in a pass; see
        :meth:`.PinnedRows.acting`.
        """
        return self.pin(names).acting(inputs, before)

    def prompt(self, pack: Pack | Mix) -> np.ndarray | None:
        """Returns the keys and values of a pack's prompt, ``[layers, 2, heads, n, head_dim]``, or None for a
        mix or a pack without one.
        """
        if isinstance(pack, Mix):
            return None
        packs, prompts, _ = self._adapters
        return prompts.get(pack.name) if packs.get(pack.name) is pack else self._prompt(pack)

    def _prompt(self, pack: Pack) -> np.ndarray | None:
        before_tokens = PROMPT in self.bundle.sites and virtual_tokens(pack)
        if pack.method.kind != "prompt" or before_tokens:
            return None
        # the caches of the engine's graph may be wider than the model's
        return prompt_kv(pack, self.folder, {port.name: port for port in self.bundle.io.inputs})


def require_openable(
    folder: Path, bundle: Bundle, proofs: VerificationCache, part: str, provider: str = "cpu"
) -> None:
    """Checks that ONNX Runtime survives opening the graph of a part, as a session on ``provider`` would open
    it, by opening it in a sandbox process first; and remembers the result for the next time.

    Raises:
        OutOfLimits: the graph takes too much memory or time.
        FormatError: the sandbox process crashed.
    """
    if not proofs.knows(part) and not is_inside():
        size = sum(entry.size for entry in bundle.files)
        wide = bundle.dtype == BFLOAT16.name and provider == "cpu"
        try_opening(folder / graph_file(part), size, wide=wide)
        proofs.remember(part)


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
