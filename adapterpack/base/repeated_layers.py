"""Shows a base with its blocks repeated, out of its own files: nothing is copied, and digests are those of
the whole stack.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter_methods.forms.repeated_layers import order_of
from ..errors import BaseMismatch, Unsupported
from ..io.hashing import Source
from ..io.safetensors import SafetensorsFile
from .checkpoint import Checkpoint

STACKS = ("layers", "encoder.layer", "h")
"""How the paths of stacks of blocks end, as PEFT looks for them."""
_BLOCK = re.compile(r"((?:[^.]+\.)*?(?:layers|encoder\.layer|h))\.([0-9]{1,5})\.(.+)")
"""A tensor of a block: its stack, its number and the rest of its name."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_BY_BLOCK = "layer_types"
"""The end of the names of settings that have a value for each block."""
_ALIKE = frozenset(
    {
        "bert",
        "falcon",
        "gemma",
        "gpt2",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "roberta",
        "starcoder2",
    }
)
"""Types of models whose blocks compute the same wherever they stand, but for what ``layer_types`` says of
them.
"""
_BY_PLACE = ("use_sliding_window", "scale_attn_by_inverse_layer_idx")
"""Settings under which a block of these computes by its number, unless ``layer_types`` says what each is."""


class RepeatedFile:
    """One file of a base under the names that its tensors have in the repeated stack: ``names`` says which
    stored one each is.
    """

    def __init__(self, file: SafetensorsFile, names: Mapping[str, str]) -> None:
        self.path, self.metadata, self._file, self._names = file.path, file.metadata, file, names
        self.tensors = {new: file.tensors[old]._replace(name=new) for new, old in names.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, as a view of the file."""
        return self._file.read(self._names[name])


class RepeatedLayers(Checkpoint):
    """A checkpoint with the blocks in ranges ``ends`` (start and end in turn) in place of its own.

    Raises:
        BaseMismatch: it has no such blocks.
        Unsupported: it has several stacks of blocks, or is quantized.
    """

    def __init__(self, folder: str | os.PathLike[str], ends: Sequence[int]) -> None:
        self.ends, self.order = tuple(ends), order_of(ends)
        super().__init__(folder)

    def _opened(self, shards: Iterable[str]) -> Mapping[str, Any]:
        files: Mapping[str, SafetensorsFile] = super()._opened(shards)
        if "quantization_config" in self._base.config:
            raise Unsupported(
                "blocks of a quantized base are not repeated",
                where=self.folder,
                remedy="name the base that it was quantized from",
            )
        self.count, names = _renamed(
            [name for file in files.values() for name in file.tensors], self.order, self.where
        )
        self._stored_as = names
        repeated = {
            shard: RepeatedFile(file, {new: old for new, old in names.items() if old in file.tensors})
            for shard, file in files.items()
        }
        if self.index is not None:
            self.index = {
                **self.index,
                "weight_map": {name: shard for shard, file in repeated.items() for name in file.tensors},
            }
        return repeated

    @cached_property
    def _base(self) -> Checkpoint:
        """The base with its own blocks."""
        return Checkpoint(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the repeated stack."""
        changed: dict[str, Any] = {}
        for key, value in self._base.config.items():
            if key in _COUNTS and value == self.count:
                changed[key] = len(self.order)
            elif key.endswith(_BY_BLOCK) and isinstance(value, list) and len(value) == self.count:
                changed[key] = [value[number] for number in self.order]
        return {**self._base.config, **changed}

    def require_alike(self) -> None:
        """Goes on only if the blocks written out in this order compute what they compute in the repeated
        stack.

        Raises:
            Unsupported: it is not known of this type of model.
        """
        by_place = _BY_BLOCK not in self.config and any(map(self.config.get, _BY_PLACE))
        if (
            self.config.get("model_type") not in _ALIKE
            or by_place
            or not any(key in self.config for key in _COUNTS)
        ):
            raise Unsupported(
                "whether blocks of this type of model compute the same at another place is not known",
                where=self.where,
                found=self.config.get("model_type"),
                expected=", ".join(sorted(_ALIKE)),
                remedy="keep the adapter unmerged: attach it",
            )

    def _hashed(self, files: Mapping[str, Source]) -> tuple[dict[str, bytes], dict[str, bytes]]:
        self._base._watch = self._watch
        stored, hashes = self._base._hashed(files)
        return {new: stored[old] for new, old in self._stored_as.items()}, hashes


def repeated(base: Checkpoint, ends: Sequence[int]) -> Checkpoint:
    """The base with its blocks repeated in ranges ``ends``, start and end in turn; the base itself where
    there are none.

    Raises:
        Unsupported: only the headers of the base are known, or it is no folder of one plain stack.
    """
    if not ends or isinstance(base, RepeatedLayers):
        return base
    if not base.has_weights or not Path(base.folder).is_dir():
        raise Unsupported(
            "the adapter repeats blocks of its base, which is done with a checkpoint in a folder only",
            where=base.where,
            remedy="name the folder of the checkpoint",
        )
    made = RepeatedLayers(base.folder, ends)
    made._watch = base._watch
    return made


def _renamed(stored: Sequence[str], order: Sequence[int], where: str) -> tuple[int, dict[str, str]]:
    """How many blocks there are, and for each tensor of the repeated stack the stored one that it is."""
    blocks: dict[str, dict[int, list[str]]] = {}
    names = {}
    for name in stored:
        found = _BLOCK.fullmatch(name)
        if found is None:
            names[name] = name
        else:
            blocks.setdefault(found[1], {}).setdefault(int(found[2]), []).append(found[3])
    if len(blocks) != 1:
        raise Unsupported(
            "the adapter repeats blocks of its base, which does not have one stack of them",
            where=where,
            found=", ".join(blocks) or "none",
            expected=f"one whose name ends with {', '.join(STACKS)}",
        )
    ((stack, tensors),) = blocks.items()
    if max(order) >= len(tensors) or sorted(tensors) != list(range(len(tensors))):
        raise BaseMismatch(
            "the adapter repeats a block that the base does not have",
            where=where,
            expected=f"block {max(order)}",
            found=f"{len(tensors)} blocks",
            remedy="use the base that the adapter was trained on",
        )
    for place, number in enumerate(order):
        names |= {f"{stack}.{place}.{rest}": f"{stack}.{number}.{rest}" for rest in tensors[number]}
    return len(tensors), names
