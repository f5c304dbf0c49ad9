"""Opens a GGUF model as the base of a merge, with its tensors under transformers' names and in transformers'
order of rows.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter_methods import LAYOUTS, row_blocks, to_matrix
from ...base import Checkpoint, Verdict, WeightStorage, recorded_fingerprint
from ...base.codecs.row_order import as_model, reorder_rows
from ...base.gguf import ggml
from ...base.gguf.header import read_header
from ...base.gguf.names import FAMILIES, GGUFFamily, module_of, rope_row_order
from ...base.gguf.tensor_types import TensorType
from ...errors import BaseMismatch, FormatError, SiteNotFound, Unsupported
from ...io import DTYPES, Json, TensorInfo, identity, open_regular
from ...manifest import plain_name
from ...pack import Pack, match_layers, require_shapes
from ...paths import StrPath
from ..checkpoint import MergeBase

_BLOCK = 1 << 20
_WITHIN_GRID = Verdict("variant", True, "the file's numbers are the checkpoint's, each within its grid")
_TOLERANCE = 2.0
"""A weight may differ from the checkpoint's by this multiple of the error that its grid explains: rounding
errors are not uniform.
"""
_TOLERANCE_WITHOUT_GRID = 0.7
"""The limit relative to the weight for types without a known grid; two unrelated weights differ by 1.4."""


class GGUFFile:
    """An open GGUF file: its header checked, its bytes mapped read-only. ``tensors`` have transformers' names
    where these are known.

    A quantized tensor appears as bytes ``[rows, bytes of a row]``; ``entries`` are the header's entries under
    the same names.

    Raises:
        FormatError, Unsupported: the file is malformed, or of a kind that cannot be read.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            if not self.size:
                raise FormatError("the file is empty", where=path)
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.header = read_header(self.bytes, path)
        self.family = self._family()
        self.names = {name: self._name(name) for name in self.header.tensors}
        self.entries = {name: self.header.tensors[gguf_name] for gguf_name, name in self.names.items()}
        if len(self.entries) != len(self.names):
            raise FormatError("two tensors have one name in the model", where=path)
        self.tensors = {
            name: tensor_info(name, tensor.shape, tensor.type, tensor.offset)
            for name, tensor in self.entries.items()
        }

    def _family(self) -> GGUFFamily:
        architecture = self.header.values.get("general.architecture")
        if self.header.values.get("general.type", "model") != "model":
            raise Unsupported(
                "this GGUF file is no model",
                where=self.path,
                expected="model",
                found=self.header.values["general.type"],
                remedy="an adapter in GGUF is a PACK: name the model's file first",
            )
        families = {family.name: family for family in FAMILIES.values()}
        if architecture not in families:
            raise Unsupported(
                "no names are known for this kind of model",
                where=self.path,
                found=architecture,
                expected=", ".join(families),
                remedy=(
                    "merge into the original checkpoint, and convert the result with llama.cpp's converter"
                ),
            )
        return families[architecture]

    def _name(self, gguf_name: str) -> str:
        for ending in (".weight", ".bias"):
            if (
                gguf_name.endswith(ending)
                and (module := module_of(self.family, gguf_name.removesuffix(ending))) is not None
            ):
                return module + ending
        return gguf_name

    def number(self, key: str) -> int | None:
        """Returns a positive integer under a key of the architecture, or None."""
        value = self.header.values.get(f"{self.family.name}.{key}")
        return value if type(value) is int and 0 < value < 1 << 32 else None

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as it is stored, as a read-only view of the mapped file."""
        info = self.tensors[name]
        return np.frombuffer(
            memoryview(self.bytes)[info.offset : info.offset + info.nbytes], DTYPES[info.dtype]
        ).reshape(info.shape)


def tensor_info(name: str, shape: tuple[int, ...], tensor_type: TensorType, offset: int) -> TensorInfo:
    """Describes a tensor of a GGUF file as one of safetensors; a quantized one as bytes ``[rows, bytes of a
    row]``.
    """
    nbytes = math.prod(shape) // tensor_type.block * tensor_type.size
    if tensor_type.plain:
        return TensorInfo(name, tensor_type.name, shape, offset, nbytes)
    row = shape[-1] // tensor_type.block * tensor_type.size
    return TensorInfo(name, "U8", (math.prod(shape[:-1]), row), offset, nbytes)


class GGUFBase(MergeBase):
    """A GGUF file as a base. ``checkpoint`` is the one that it was converted from: if given, the numbers of
    both are compared.

    Raises:
        FormatError, Unsupported: the file is malformed, or a kind of model whose names are not known.
    """

    def __init__(self, path: StrPath, checkpoint: StrPath | None = None) -> None:
        before = identity(Path(path))
        self.file = GGUFFile(Path(path))
        self.folder = self.file.path.parent
        self._watch = None
        name = self.file.path.name
        self.index = None
        self.identities = {name: before}
        self.files: dict[str, Any] = {name: self.file}
        self.shard_of = dict.fromkeys(self.file.tensors, name)
        self.quantized = {
            name: ggml.weight(name, tensor.type.name, (math.prod(tensor.shape[:-1]), tensor.shape[-1]))
            for name, tensor in self.file.entries.items()
            if not tensor.type.plain
        }
        self.original = None if checkpoint is None else Checkpoint(checkpoint)
        self._measured: dict[str, tuple[float, float]] = {}

    @property
    def inputs(self) -> list[Path]:
        """The file, and the checkpoint that it was converted from."""
        return [self.file.path, *([] if self.original is None else [self.original.folder])]

    @property
    def where(self) -> str:
        """The file."""
        return str(self.file.path)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by name, without rows of one: llama.cpp orders rows in its own way."""
        return dict(self._model)

    @cached_property
    def name(self) -> str:
        """The name in the file, or the file's own."""
        stated = self.file.header.values.get("general.name")
        return plain_name(stated if isinstance(stated, str) else self.file.path.stem, "base")

    @cached_property
    def config(self) -> Json:
        """The settings that a merge reads from ``config.json``, derived from the tensors."""
        table = self.file.entries.get("model.embed_tokens.weight")
        tied = table is not None and "lm_head.weight" not in self.file.entries
        return {"tie_word_embeddings": tied, **({} if table is None else {"vocab_size": table.shape[0]})}

    @cached_property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """How much the file differs from the checkpoint, where that was measured."""
        if not self._measured:
            return ()
        worst = max(self._measured, key=lambda name: self._measured[name][0])
        distance, expected = self._measured[worst]
        how = (
            f"at most {distance:.2g} of their size ({worst}), where its grid lets expect {expected:.2g}"
            if distance
            else "nowhere"
        )
        return (f"{len(self._measured)} weights of the file differ from the checkpoint's {how}",)

    def row_order(self, name: str) -> np.ndarray | None:
        """Returns for each row of a head in the file its row in the model, if the file reorders the tensor's
        rows.
        """
        heads = self.file.number("attention.head_count")
        groups = self.file.number("attention.head_count_kv") or heads
        path = name.rpartition(".")[0]
        tensor = self.file.entries[name]
        if heads is None or groups is None:
            if self.file.family.reorders and path.rpartition(".")[2] in ("q_proj", "k_proj"):
                raise FormatError(
                    "the file does not say how many heads the model has",
                    where=self.file.path,
                    expected=f"{self.file.family.name}.attention.head_count",
                )
            return None
        return rope_row_order(self.file.family, path, tensor.shape[0], heads, groups)

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored; a bias in the model's order of rows (for weights, :meth:`storage`
        reorders rows).
        """
        order = self.row_order(name) if len(self.file.entries[name].shape) == 1 else None
        return super().read(name) if order is None else as_model(super().read(name), order)

    def view(self, name: str) -> np.ndarray:
        """Reads a tensor like :meth:`read`, but returns a weight as a view of the mapped file."""
        return self.read(name) if len(self.file.entries[name].shape) == 1 else super().view(name)

    def storage(self, name: str, out: str | None, where: object = None) -> WeightStorage:
        """Returns how a tensor is stored and written. Keeps the type of norms and biases, since llama.cpp
        requires float32 for them.
        """
        flat = len(self.file.entries[name].shape) == 1
        return reorder_rows(
            super().storage(name, None if flat else out, where), None if flat else self.row_order(name)
        )

    def require(self, pack: Pack, content: bool | None = True, allow_structural: bool = False) -> Verdict:
        """Checks that the pack was made for this model: its base is the checkpoint that the file was
        converted from, and the file's numbers are those of the checkpoint, within the error of their grids.

        Raises:
            BaseMismatch: it was not, or without a checkpoint nothing shows it and ``allow_structural`` was
                not given.
            SiteNotFound: the file lacks a site, and the pack does not know its base.
        """
        if self.original is not None:
            verdict = pack.require_base(self.original, content=content, allow_structural=allow_structural)
            self._require_sites(pack)
            if content is not False:
                self._require_numbers(pack, self.original)
                return _WITHIN_GRID if verdict.accepted else verdict
            return verdict
        self._require_sites(pack)
        if allow_structural or not any(recorded_fingerprint(pack.manifest.base)):
            return Verdict("structural", False, "only names and shapes were compared")
        raise BaseMismatch(
            f"nothing shows that pack '{pack.name}' was made for this model: a GGUF file holds other bytes "
            "than the checkpoint that it was made from",
            where=self.file.path,
            found=self.name,
            expected=pack.manifest.base.name or "the pack's base",
            remedy="name that checkpoint with --base CHECKPOINT (checkpoint=...), and the numbers are "
            "compared; or accept names and shapes alone with --allow-structural-base "
            "(allow_structural=True)",
        )

    def _require_sites(self, pack: Pack) -> None:
        """Checks that the file has the pack's sites. A pack that knows its base and finds other sites was
        made for another model.
        """
        try:
            require_shapes(pack, self, renamed=False)
        except (SiteNotFound, BaseMismatch) as error:
            if not any(recorded_fingerprint(pack.manifest.base)):
                raise
            raise BaseMismatch(
                f"pack '{pack.name}' was made for another model than this file's: {error.what}",
                where=error.where,
                expected=pack.manifest.base.name or "the pack's base",
                found=self.name,
                remedy="merge it into a file of the model that the pack names",
            ) from error

    def _require_numbers(self, pack: Pack, original: Checkpoint) -> None:
        for group in match_layers(pack, self).groups:
            if group.role != "adapter":
                continue
            name = self.require_weight(group.path, group.weight)
            if name in self._measured:
                continue
            kind = "table" if LAYOUTS[group.kind].ids else group.kind
            of_checkpoint = to_matrix(kind, original.read(original.require_weight(group.path, group.weight)))
            distance, expected = _distance(
                self, name, self.storage(name, None).reader.matrices(kind)[0], of_checkpoint
            )
            self._measured[name] = distance, expected
            allowed = _TOLERANCE * expected if expected else _TOLERANCE_WITHOUT_GRID
            if not distance <= allowed:
                raise BaseMismatch(
                    "the file is no form of this checkpoint: a weight lies further away than its grid "
                    "can explain",
                    where=f"{self.file.path}, {name}",
                    expected=f"within {allowed:.2g} of its size",
                    found=f"{distance:.2g}",
                    remedy="name the checkpoint that the file was made from",
                )


def _distance(base: GGUFBase, name: str, matrix: Any, of_checkpoint: np.ndarray) -> tuple[float, float]:
    """Returns how much a weight differs from the checkpoint's, and how much of that its type explains, both
    relative to the checkpoint's norm.
    """
    if matrix.shape != of_checkpoint.shape:
        raise BaseMismatch(
            "a weight has another shape in the checkpoint",
            where=f"{base.file.path}, {name}",
            expected=of_checkpoint.shape,
            found=matrix.shape,
            remedy="name the checkpoint that the file was made from",
        )
    weight = base.quantized.get(name)
    difference = size = noise = 0.0
    for rows in row_blocks(len(of_checkpoint), of_checkpoint.shape[1], _BLOCK):
        values = of_checkpoint[rows].astype(np.float32)
        difference += float(np.sum(np.square(matrix[rows].astype(np.float32) - values), dtype=np.float64))
        size += float(np.sum(np.square(values), dtype=np.float64))
        if weight is not None and weight.read_only_reason is None:
            noise += weight.grid.noise(weight.unpack(base.parts(name), rows))
    # twice the largest error of rounding to bfloat16, and of float16 below its normal numbers
    if weight is None:
        noise = size * 2.0**-14 + 1e-12
    return math.sqrt(difference / size) if size else math.sqrt(difference), math.sqrt(
        noise / size
    ) if size else 0.0
