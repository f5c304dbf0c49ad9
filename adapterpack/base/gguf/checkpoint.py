"""A model of llama.cpp as the base of a merge: its tensors under the names, and in the order of rows, that transformers has for them."""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter_methods import LAYOUTS, to_matrix
from ...errors import BaseMismatch, FormatError, Unsupported, storage_errors
from ...io.hashing import identity
from ...io.safetensors import DTYPES, TensorInfo
from ...pack.fits import require_shapes
from ...pack.pack import Pack
from ..checkpoint import Checkpoint
from ..codecs import ggml
from ..codecs.dequantized_checkpoint import Decoded
from ..codecs.ordered import as_model, ordered
from ..codecs.storage import Storage
from ..identity import levels
from ..linear_layers import on
from ..match import Verdict
from .header import Tensor, read_header
from .names import FAMILIES, Family, module_of, pairs_of_rows

_BLOCK = 1 << 20
_WITHIN = Verdict("variant", True, "the file's numbers are the checkpoint's, each within its grid")
_ROOM = 2.0
"""How many times further than its grid lets expect a weight may lie from the checkpoint's and still be of it: rounding is not uniform."""
_ROUGH = 0.7
"""The same limit, relative to the weight, for types whose grid is not known; two unrelated weights are 1.4 apart."""


class GGUFFile:
    """An open GGUF file: its header checked, its bytes mapped read-only. ``tensors`` are under transformers' names where these are known.

    What is stored in blocks of codes is bytes ``[rows, bytes of a row]`` here.

    Raises:
        FormatError, Unsupported: it is no GGUF file that is understood.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path), path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if not self.size:
                raise FormatError("the file is empty", where=path)
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.header = read_header(self.bytes, path)
        self.family = self._family()
        self.names = {name: self._name(name) for name in self.header.tensors}
        self.own = {name: self.header.tensors[own] for own, name in self.names.items()}
        if len(self.own) != len(self.names):
            raise FormatError("two tensors are one in the model", where=path)
        self.tensors = {name: _stored(name, tensor) for name, tensor in self.own.items()}

    def _family(self) -> Family:
        said = self.header.values.get("general.architecture")
        if self.header.values.get("general.type", "model") != "model":
            raise Unsupported("this GGUF file is no model", where=self.path, expected="model", found=self.header.values["general.type"],
                              remedy="an adapter in GGUF is a PACK: name the model's file first")
        known = {family.name: family for family in FAMILIES.values()}
        if said not in known:
            raise Unsupported("no names are known for this kind of model", where=self.path, expected=", ".join(known), found=said,
                              remedy="merge into the original checkpoint, and convert the result with llama.cpp's converter")
        return known[said]

    def _name(self, own: str) -> str:
        for ending in (".weight", ".bias"):
            if own.endswith(ending) and (module := module_of(self.family, own.removesuffix(ending))) is not None:
                return module + ending
        return own

    def number(self, key: str) -> int | None:
        """A positive integer of the architecture's keys, or None."""
        found = self.header.values.get(f"{self.family.name}.{key}")
        return found if type(found) is int and 0 < found < 1 << 32 else None

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, as a read-only view of the mapped file."""
        info = self.tensors[name]
        return np.frombuffer(memoryview(self.bytes)[info.offset : info.offset + info.nbytes], DTYPES[info.dtype]).reshape(info.shape)


def _stored(name: str, tensor: Tensor) -> TensorInfo:
    kind, shape = tensor.kind, tensor.shape
    if kind.plain:
        return TensorInfo(name, kind.name, shape, tensor.offset, tensor.nbytes)
    return TensorInfo(name, "U8", (math.prod(shape[:-1]), shape[-1] // kind.block * kind.size), tensor.offset, tensor.nbytes)


class GGUFBase(Decoded):
    """A GGUF file as a base. ``checkpoint`` is the one that it was made from: with it, the numbers of both are compared.

    Raises:
        FormatError, Unsupported: the file is malformed, or a kind of model whose names are not known.
    """

    def __init__(self, path: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None) -> None:
        self.file = GGUFFile(Path(path))
        self.folder, self._watch = self.file.path.parent, None
        name = self.file.path.name
        self.index, self.identities = None, {name: identity(self.file.path)}
        self.files: dict[str, Any] = {name: self.file}
        self.shard_of = dict.fromkeys(self.file.tensors, name)
        self.coded = {name: ggml.weight(name, tensor.kind.name, (math.prod(tensor.shape[:-1]), tensor.shape[-1]))
                      for name, tensor in self.file.own.items() if not tensor.kind.plain}
        self.original = None if checkpoint is None else Checkpoint(checkpoint)
        self._measured: dict[str, tuple[float, float]] = {}

    @property
    def inputs(self) -> list[Path]:
        """The file, and the checkpoint beside it."""
        return [self.file.path, *([] if self.original is None else [self.original.folder])]

    @property
    def where(self) -> str:
        """The file."""
        return str(self.file.path)

    @cached_property
    def name(self) -> str:
        """The name in the file, or the file's own."""
        said = self.file.header.values.get("general.name")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", said if isinstance(said, str) else self.file.path.stem).strip("-._")[:128] or "base"

    @cached_property
    def config(self) -> dict[str, Any]:
        """What a merge asks of a configuration, told by the tensors."""
        table = self.file.own.get("model.embed_tokens.weight")
        tied = table is not None and "lm_head.weight" not in self.file.own
        return {"tie_word_embeddings": tied, **({} if table is None else {"vocab_size": table.shape[0]})}

    @cached_property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """How far the file lies from the checkpoint, where that was measured."""
        if not self._measured:
            return ()
        worst = max(self._measured, key=lambda name: self._measured[name][0])
        found, expected = self._measured[worst]
        said = f"at most {found:.2g} of their size ({worst}), where its grid lets expect {expected:.2g}" if found else "nowhere"
        return (f"{len(self._measured)} weights of the file differ from the checkpoint's {said}",)

    def order(self, name: str) -> np.ndarray | None:
        """For each row of a head in the file its row in the model, where a tensor's rows are reordered."""
        heads = self.file.number("attention.head_count")
        groups = self.file.number("attention.head_count_kv") or heads
        path, tensor = name.rpartition(".")[0], self.file.own[name]
        if heads is None or groups is None:
            if self.file.family.reorders and path.rpartition(".")[2] in ("q_proj", "k_proj"):
                raise FormatError("the file does not say how many heads the model has", where=self.file.path,
                                  expected=f"{self.file.family.name}.attention.head_count")
            return None
        return pairs_of_rows(self.file.family, path, tensor.shape[0], heads, groups)

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, but for a bias, which is in the model's order of rows; that of a weight is its storage's business."""
        order = self.order(name) if len(self.file.own[name].shape) == 1 else None
        return super().read(name) if order is None else as_model(super().read(name), order)

    def storage(self, name: str, out: str | None, where: object = None) -> Storage:
        """See :class:`Decoded`. What has one axis is never written in another type: llama.cpp wants norms and biases in float32."""
        flat = len(self.file.own[name].shape) == 1
        return ordered(super().storage(name, None if flat else out, where), None if flat else self.order(name))

    def require(self, pack: Pack, content: bool | None = True, allow_structural: bool = False) -> Verdict:
        """That the pack was made for this model: by the checkpoint that the file was made from, whose bytes are the pack's base and whose
        numbers the file's are, each within its grid.

        Raises:
            BaseMismatch: it was not, or without a checkpoint nothing shows it and ``allow_structural`` was not given.
            SiteNotFound: the file lacks a site.
        """
        require_shapes(pack, self, renamed=False)
        if self.original is not None:
            found = pack.require_base(self.original, content=content, allow_structural=allow_structural)
            if content is not False:
                self._require_numbers(pack, self.original)
                return _WITHIN if found.accepted else found
            return found
        if allow_structural or not any(levels(pack.manifest.base)):
            return Verdict("structural", False, "only names and shapes were compared")
        raise BaseMismatch(f"nothing shows that pack '{pack.name}' was made for this model: a GGUF file holds other bytes than "
                           "the checkpoint that it was made from", where=self.file.path, found=self.name,
                           expected=pack.manifest.base.name or "the pack's base",
                           remedy="name that checkpoint with --base CHECKPOINT (checkpoint=...), and the numbers are compared; or accept "
                                  "names and shapes alone with --allow-structural-base (allow_structural=True)")

    def _require_numbers(self, pack: Pack, original: Checkpoint) -> None:
        for group in on(pack, self).groups:
            if group.role != "adapter":
                continue
            name = self.require_weight(group.path, group.weight)
            if name in self._measured:
                continue
            kind = "table" if LAYOUTS[group.kind].ids else group.kind
            theirs = to_matrix(kind, original.read(original.require_weight(group.path, group.weight)))
            distance, expected = _apart(self, name, self.storage(name, None).reader.matrices(kind)[0], theirs)
            self._measured[name] = distance, expected
            if not distance <= (_ROOM * expected if expected else _ROUGH):
                raise BaseMismatch("the file is no form of this checkpoint: a weight lies further away than its grid can explain",
                                   where=f"{self.file.path}, {name}", expected=f"within {_ROOM * expected or _ROUGH:.2g} of its size",
                                   found=f"{distance:.2g}", remedy="name the checkpoint that the file was made from")


def _apart(base: GGUFBase, name: str, mine: Any, theirs: np.ndarray) -> tuple[float, float]:
    """How far a weight lies from the checkpoint's, and how far its type lets expect, both relative to the checkpoint's norm."""
    if mine.shape != theirs.shape:
        raise BaseMismatch("a weight has another shape in the checkpoint", where=f"{base.file.path}, {name}", expected=theirs.shape,
                           found=mine.shape, remedy="name the checkpoint that the file was made from")
    coded = base.coded.get(name)
    away = size = noise = 0.0
    for rows in _blocks(*theirs.shape):
        values = theirs[rows].astype(np.float32)
        away += float(np.sum(np.square(mine[rows].astype(np.float32) - values), dtype=np.float64))
        size += float(np.sum(np.square(values), dtype=np.float64))
        if coded is not None and coded.sealed is None:
            noise += coded.grid.noise(coded.unpack(base.parts(name), rows))
    if coded is None:  # what rounding to bfloat16 makes at most, twice, and float16 below its normal numbers
        noise = size * 2.0**-14 + 1e-12
    return math.sqrt(away / size) if size else math.sqrt(away), math.sqrt(noise / size) if size else 0.0


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
