"""Opens a base model on disk (a folder with ``config.json`` and safetensors files), reads its tensors and
computes its fingerprints, without torch.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, SiteNotFound, StorageError, Unsupported, nearest
from ..io import (
    DTYPES,
    HashedSource,
    Identity,
    Json,
    SafetensorsFile,
    TensorInfo,
    digests,
    identity,
    open_inside,
    require_unchanged,
)
from ..io.hashing import bytes_of
from ..paths import StrPath
from . import fingerprint as fp
from . import linear_layers
from .base_folder import CONFIG, read_json, require_harmless, without_code
from .fused_experts import ExpertStack, find_stacks, stored_as
from .renamings import Renaming, find, in_memory, rename_all, renamings_of
from .tensor_rows import TensorTable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NAMES = (
    (SINGLE, INDEX),
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
)
"""The single file and the index of a transformers checkpoint, and of one model of a diffusers pipeline."""
_PIPELINE = "model_index.json"
"""The file that marks a folder as a whole diffusers pipeline, with each model in a folder of its own."""
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")
"""The names of input embeddings."""


class Checkpoint:
    """An opened base: its config, its shards in order, and the position of every tensor.

    Raises:
        StorageError: the folder or a shard is missing.
        FormatError: a shard is malformed, the index does not fit the shards, or a link leads out of the
            folder.
        Unsupported: its configuration names code.
    """

    index_name = INDEX
    """The file that maps tensors to shards, if there are several."""
    has_weights = True
    """Whether the weights can be read; a subclass may know only names, dtypes and shapes."""

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        if self.folder.is_file():
            raise StorageError(
                "a base is a folder here, and this is a file",
                where=self.folder,
                remedy=(
                    "name the folder of the checkpoint that it was made from; merge and inspect take GGUF "
                    "and ONNX files"
                ),
            )
        if not self.folder.is_dir():
            raise StorageError(
                "there is no such base folder",
                where=self.folder,
                remedy="name a folder with config.json and safetensors files",
            )
        require_harmless(self.folder)
        self.index, shards = self._shards()
        self._watch: Callable[[], None] | None = None
        self.files = self._opened(shards)
        self.shard_of = {name: shard for shard, file in self.files.items() for name in file.tensors}
        if sum(len(file.tensors) for file in self.files.values()) != len(self.shard_of):
            names = Counter(name for file in self.files.values() for name in file.tensors)
            raise FormatError(
                "a tensor stands in two shards", where=self.where, found=names.most_common(1)[0][0]
            )
        if self.index is not None and self.shard_of != self.index["weight_map"]:
            wrong = sorted(set(self.shard_of.items()) ^ set(self.index["weight_map"].items()))[0][0]
            raise FormatError(
                "the index does not fit the shards",
                where=f"{self.where}, {self.index_name}",
                found=f"tensor {wrong}",
            )

    def _opened(self, shards: Iterable[str]) -> Mapping[str, SafetensorsFile]:
        """Opens the shards; records their identity first, so that a later change is noticed."""
        # before opening, so that a later change shows
        self.identities = {shard: identity(self.folder / shard) for shard in shards}
        return {shard: SafetensorsFile(self.folder / shard) for shard in self.identities}

    def _shards(self) -> tuple[Json | None, list[str]]:
        """Returns the index, if there are several shards, and the file names of the shards."""
        for single, self.index_name in _NAMES:
            if (self.folder / single).is_file():
                return None, [single]
            if (self.folder / self.index_name).is_file():
                index = read_json(self.folder / self.index_name)
                return index, shards_in(index, self.folder / self.index_name)
        if (self.folder / _PIPELINE).is_file():
            raise Unsupported(
                "the folder holds the several models of a diffusers pipeline",
                where=self.folder,
                remedy="name the folder of one of them, as unet or transformer",
            )
        raise StorageError(
            "the folder holds no safetensors checkpoint",
            where=self.folder,
            expected=f"{SINGLE} or {INDEX}",
            remedy="save the model with save_pretrained; pickle files are refused",
        )

    @property
    def where(self) -> str:
        """The location, for messages."""
        return str(self.folder)

    @cached_property
    def config(self) -> Json:
        """The contents of ``config.json`` without code that never runs; empty if there is none."""
        path = self.folder / CONFIG
        loaded = without_code(read_json(path)) if path.is_file() else {}
        if not isinstance(loaded, dict):
            raise FormatError(
                "the configuration is not a JSON object",
                where=path,
                expected="an object",
                found=type(loaded).__name__,
            )
        return loaded

    @property
    def architecture(self) -> str | None:
        """The class that the base was saved from, if its config names one."""
        classes = self.config.get("architectures")
        first = classes[0] if isinstance(classes, list) and classes else None
        return first if isinstance(first, str) and first.isidentifier() else None

    @cached_property
    def name(self) -> str:
        """A readable name: ``org/name`` for a cached snapshot of the hub, else the folder's name in plain
        characters.
        """
        folder = self.folder.resolve()
        if self.commit is not None:
            return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-._") or "base"

    @cached_property
    def commit(self) -> str | None:
        """The commit of a cached snapshot of the hub, or None."""
        folder = self.folder.resolve()
        is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
        return folder.name if is_snapshot else None

    @cached_property
    def stored(self) -> TensorTable:
        """Every stored tensor by name, and rows of them; fingerprints are computed from the whole tensors."""
        return TensorTable({name: self.files[shard].tensors[name] for name, shard in self.shard_of.items()})

    @cached_property
    def stacks(self) -> Mapping[str, ExpertStack]:
        """Fused parameters of the model that the files store expert by expert, by the model's name for
        them.
        """
        return find_stacks(self.stored)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by name: the stored ones, unless a subclass decodes them."""
        return self.stored

    @cached_property
    def kinds_by_name(self) -> Mapping[str, set[str]]:
        """The kinds of linear layers by the last part of their names, as far as shapes reveal them."""
        return linear_layers.kinds_by_name(self.tensors)

    def linear_kind(self, weight: str) -> str | None:
        """Returns in which orientation a linear layer's weight is stored; see
        :func:`~.linear_layers.kind_of`.
        """
        return linear_layers.kind_of(self.tensors, self.kinds_by_name, weight)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read from the file that was opened.

        If the file is truncated meanwhile, this raises an error; with a memory map the system would end the
        process.

        Raises:
            StorageError: the file has changed since it was opened, or cannot be read.
        """
        if not self.has_weights:
            # Without weights, the view raises an error that says so.
            return self.view(name)
        info = self.stored[name]
        value = np.frombuffer(bytes_of(self.source(name)), DTYPES[info.dtype]).reshape(info.shape)
        value.flags.writeable = False
        return value

    def view(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view of the mapped file, for reading few elements of many
        tensors.
        """
        whole, rows = self.stored.place(name)
        return self.files[self.shard_of[whole]].read(whole)[rows]

    def require_unchanged(self, exact: bool = False) -> None:
        """Raises unless every shard is still the file that was opened; see
        :func:`~adapterpack.io.hashing.require_unchanged`.

        Raises:
            StorageError: a shard has changed.
        """
        for shard, before in self.identities.items():
            require_unchanged(self.folder / shard, before, exact)

    @contextmanager
    def watched(self, watch: Callable[[], None]) -> Iterator[None]:
        """Calls ``watch`` for every block that is hashed inside the block; an exception from it ends the
        hashing.
        """
        before = self._watch
        self._watch = watch
        try:
            yield
        finally:
            self._watch = before

    def source(self, name: str) -> HashedSource:
        """Returns the file and byte range of a tensor."""
        info = self.stored[name]
        shard = self.shard_of[self.stored.place(name)[0]]
        return HashedSource(self.folder / shard, self.identities[shard], ((info.offset, info.nbytes),))

    def sampled(self, name: str, dtype: str | None = None) -> HashedSource:
        """Returns the file and the byte ranges of a tensor whose elements the probe reads, or would read if
        the tensor had the dtype ``dtype``.
        """
        info = self.stored[name]
        source = self.source(name)
        old, new = (DTYPES[kind].itemsize for kind in (info.dtype, dtype or info.dtype))
        spans = fp.spans(info.nbytes // old * new)
        return source._replace(
            ranges=tuple((info.offset + start // new * old, length // new * old) for start, length in spans)
        )

    @cached_property
    def structure(self) -> str:
        """The fingerprint of names, dtypes and shapes."""
        return fp.structure(self._headers())

    @cached_property
    def samples(self) -> dict[str, bytes]:
        """The sha256 of the first, middle and last 4 KiB of every tensor; reads only these."""
        return digests({name: self.sampled(name) for name in self.stored}, watch=self._watch)

    @cached_property
    def probe(self) -> str:
        """The fingerprint of samples of every tensor: it reveals mistakes, not deliberate manipulation."""
        return fp.probe((*header, self.samples[header[0]]) for header in self._headers())

    @cached_property
    def digests(self) -> dict[str, bytes]:
        """The sha256 of the bytes of every tensor; reads the whole checkpoint once.

        The digests are cached for the life of the process, by device, inode, size and times of the file.

        Raises:
            StorageError: a file changed since the checkpoint was opened.
        """
        return self._hashed({})[0]

    def _hashed(self, files: Mapping[str, HashedSource]) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Returns the digests of the tensors and of ``files``, computed in parallel.

        A file cannot be split over threads. So while one core hashes it, the others hash tensors from the
        pages that it has just read.
        """
        cached = {shard: _DIGESTS[state] for shard, state in self.identities.items() if state in _DIGESTS}
        # Shards whose digests are cached need no reading.
        known = {name: cached[shard][name] for name, shard in self.shard_of.items() if shard in cached}
        todo = {("file", path): source for path, source in files.items()}
        todo |= {("tensor", name): self.source(name) for name in self.stored if name not in known}
        hashes = digests(todo, watch=self._watch)
        fresh = {name: digest for (kind, name), digest in hashes.items() if kind == "tensor"}
        for shard, state in self.identities.items():
            if state.settled and identity(self.folder / shard) == state:
                _DIGESTS.setdefault(
                    state, {name: fresh[name] for name in self.files[shard].tensors if name in fresh}
                )
        return known | fresh, {path: digest for (kind, path), digest in hashes.items() if kind == "file"}

    @cached_property
    def content(self) -> str:
        """The fingerprint of every byte of every tensor; reads the whole checkpoint once."""
        return fp.content((*header, self.digests[header[0]]) for header in self._headers())

    @cached_property
    def file_entries(self) -> tuple[fp.HashedFile, ...]:
        """Size and sha256 of shards and index, as a hub lists them; reads every file once."""
        sources = self._whole_files()
        return _entries(sources, digests(sources, watch=self._watch))

    def _whole_files(self) -> dict[str, HashedSource]:
        """Returns shards and index as sources to hash completely."""
        states = dict(self.identities)
        if self.index is not None:
            states[self.index_name] = identity(self.folder / self.index_name)
        return {path: HashedSource.whole(self.folder / path, state) for path, state in states.items()}

    def has_file(self, name: str, sha256: str) -> bool | None:
        """Whether the folder's file ``name`` has this sha256 (hex); None if that cannot be known."""
        path = self.folder / name
        if not path.is_file():
            return False
        with open_inside(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256

    def fingerprint(self, *, content: bool = True, files: bool = False) -> fp.Fingerprint:
        """Returns the fingerprint, always with ``structure`` and ``probe``; ``content`` and ``files``, one or
        both, cost one full read.
        """
        # If neither has been computed yet, compute both in one pass.
        if content and files and not {"digests", "file_entries"} & self.__dict__.keys():
            sources = self._whole_files()
            self.digests, hashes = self._hashed(sources)
            self.file_entries = _entries(sources, hashes)
        return fp.Fingerprint(
            self.structure,
            self.content if content else None,
            fp.files(self.file_entries) if files else None,
            self.probe,
        )

    def _headers(self) -> list[fp.Header]:
        return [(info.name, info.dtype, info.shape) for info in self.stored.values()]

    def weight_name(self, path: str, recorded: str | None = None) -> str | None:
        """Returns the name of the tensor with the weight of module ``path``: ``recorded`` if that tensor
        exists, else found by the path.

        The path may also be a parameter's own. A task model may have one prefix more or less than its
        checkpoint.
        """
        return (
            recorded
            if recorded in self.tensors
            else self.tensor_name(f"{path}.weight") or self.tensor_name(path)
        )

    def tensor_name(self, name: str) -> str | None:
        """Returns the tensor with that name, with one prefix more or less, or with that name in memory; None
        if there is none or several.
        """
        if name in self.tensors:
            return name
        stripped = name.partition(".")[2]
        if stripped in self.tensors:
            return stripped
        longer = [prefixed for prefixed in self.tensors if prefixed.partition(".")[2] == name]
        if longer:
            return longer[0] if len(longer) == 1 else None
        older = stored_as(name)
        return (None if older is None else self.tensor_name(older)) or self.renamed_name(name)

    def renamed_name(self, name: str) -> str | None:
        """Returns the tensor that loading renames to ``name`` (:mod:`~.renamings`), or None."""
        if not self.renamings:
            return None
        return find(name, self._by_name_in_memory) or find(
            in_memory(name, self.renamings), self._by_name_in_memory
        )

    @cached_property
    def renamings(self) -> tuple[Renaming, ...]:
        """The renamings that transformers applies when it loads this checkpoint."""
        return renamings_of(self.config, self.architecture)

    @cached_property
    def _by_name_in_memory(self) -> dict[str, str]:
        return rename_all(self.tensors, self.renamings)

    def tied_to(self, path: str) -> str | None:
        """Returns the input embedding that the output head ``path`` is tied to, if the files store one tensor
        for both; else None.
        """
        if path.rpartition(".")[2] != "lm_head" or not self.config.get("tie_word_embeddings", True):
            return None
        embeddings = [
            name for name in self.stored if name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS
        ]
        return embeddings[0] if len(embeddings) == 1 else None

    def weight_shape(self, path: str, recorded: str | None) -> tuple[int, ...]:
        """Returns the shape of a module's weight, or of a fused parameter.

        Raises:
            SiteNotFound: the checkpoint has no such tensor.
        """
        for name in (recorded or path, path, path.partition(".")[2]):
            if name in self.stacks:
                return self.stacks[name].shape
        name = self.weight_name(path, recorded) or self.tied_to(path) or self.require_weight(path, recorded)
        return self.tensors[name].shape

    def require_weight(self, path: str, recorded: str | None = None) -> str:
        """Returns what :meth:`weight_name` returns, but raises instead of returning None.

        Raises:
            SiteNotFound: the checkpoint has no such tensor.
        """
        name = self.weight_name(path, recorded)
        if name is None:
            modules = [name.removesuffix(".weight") for name in self.tensors]
            raise SiteNotFound(
                "the base has no such site", where=self.where, found=path, remedy=nearest(path, modules)
            )
        return name


def _entries(sources: Mapping[str, HashedSource], hashes: Mapping[str, bytes]) -> tuple[fp.HashedFile, ...]:
    return tuple(
        fp.HashedFile(path, sources[path].identity.size, hashes[path].hex()) for path in sorted(sources)
    )


_DIGESTS: dict[Identity, dict[str, bytes]] = {}
"""Maps the identity of a file to the digests of its tensors, for the life of the process."""


def shards_in(index: Any, where: object) -> list[str]:
    """Returns the file names in a parsed ``model.safetensors.index.json``, sorted.

    Raises:
        FormatError: it is not an index, or a name would lead out of the folder.

    Example:
        >>> shards_in({"weight_map": {"w": "b.safetensors", "v": "a.safetensors"}}, "the index")
        ['a.safetensors', 'b.safetensors']
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise FormatError(
            "this is not an index of shards", where=where, expected="weight_map: tensor name to file name"
        )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or shard.startswith("."):
            raise FormatError("a shard name must be a plain file name", where=where, found=shard)
    return shards
