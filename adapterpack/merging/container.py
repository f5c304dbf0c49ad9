"""The files that a merge writes are of the kind of its base: a folder of safetensors, or one GGUF file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..io import strict_json
from ..pack.pack import Pack
from . import layout, provenance
from .base_model import MergeBase
from .gguf.kind import is_gguf
from .layout import Shard
from .plan import Plan


class Container(NamedTuple):
    """A kind of files: ``shards`` lays them out, ``finish`` puts in what is written last; ``file`` is the one that the output is, where it
    is no folder."""

    shards: Callable[[Any, Plan, str | None, str], list[Shard]]
    finish: Callable[[Path, Any, Sequence[Pack], Plan, str | None, list[Shard], Mapping[str, Any]], None]
    file: str | None = None


def opened(base: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None) -> tuple[MergeBase, Container]:
    """The base at a path, and the kind of its files.

    Raises:
        StorageError, FormatError, Unsupported: it cannot be read.
        ConfigError: a checkpoint beside a checkpoint.
    """
    if is_gguf(base):
        from ..merging.gguf.base_model import GGUFBase  # noqa: PLC0415 - as above
        from .gguf import layout as gguf_layout  # noqa: PLC0415 - checkpoints need none of it

        return GGUFBase(base, checkpoint), Container(gguf_layout.shards, _nothing, gguf_layout.NAME)
    if checkpoint is not None:
        raise ConfigError("only an ONNX graph or a GGUF file is merged beside its checkpoint", where=base, remedy="leave --base out")
    return MergeBase(base), SAFETENSORS


def _safetensors(source: MergeBase, todo: Plan, dtype: str | None, note: str) -> list[Shard]:
    return layout.shards(source, todo, dtype, {provenance.METADATA: note})


def _side_files(folder: Path, source: MergeBase, packs: Sequence[Pack], todo: Plan, dtype: str | None, shards: list[Shard],
                told: Mapping[str, Any]) -> None:
    provenance.write_side_files(folder, source, packs, todo, dtype, shards)
    (folder / provenance.FILE_NAME).write_bytes(strict_json.canonical(told))


def _nothing(*_: Any) -> None:
    """A GGUF file holds all that there is to say."""


SAFETENSORS = Container(_safetensors, _side_files)
