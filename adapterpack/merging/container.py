"""Opens the base of a merge, and chooses the output's form, which is the base's: a folder of safetensors or a
GGUF file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..io import strict_json
from ..pack.pack import Pack
from .base_kind import is_gguf
from .checkpoint import layout, provenance
from .checkpoint.base_model import MergeBase
from .checkpoint.layout import Shard
from .checkpoint.plan import MergePlan


class Container(NamedTuple):
    """A form of output: ``shards`` lays out its files, ``finish`` writes what comes last; ``file`` is the
    file, if it is no folder.
    """

    shards: Callable[[Any, MergePlan, str | None, str], list[Shard]]
    finish: Callable[[Path, Any, Sequence[Pack], MergePlan, str | None, list[Shard], Mapping[str, Any]], None]
    file: str | None = None


def open_base(
    base: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None
) -> tuple[MergeBase, Container]:
    """Opens the base at a path, and returns it with the form of the output.

    Raises:
        StorageError, FormatError, Unsupported: it cannot be read.
        ConfigError: a checkpoint was given although the base is one.
    """
    if is_gguf(base):
        from .gguf import layout as gguf_layout  # noqa: PLC0415 - checkpoints need none of it
        from .gguf.base_model import GGUFBase  # noqa: PLC0415 - as below

        return GGUFBase(base, checkpoint), Container(gguf_layout.shards, _finish_nothing, gguf_layout.NAME)
    if checkpoint is not None:
        raise ConfigError(
            "only an ONNX graph or a GGUF file is merged together with its checkpoint",
            where=base,
            remedy="leave --base out",
        )
    return MergeBase(base), SAFETENSORS


def _safetensors(source: MergeBase, todo: MergePlan, dtype: str | None, note: str) -> list[Shard]:
    return layout.shards(source, todo, dtype, {provenance.METADATA: note})


def _side_files(
    folder: Path,
    source: MergeBase,
    packs: Sequence[Pack],
    todo: MergePlan,
    dtype: str | None,
    shards: list[Shard],
    report: Mapping[str, Any],
) -> None:
    provenance.write_side_files(folder, source, packs, todo, dtype, shards)
    (folder / provenance.FILE_NAME).write_bytes(strict_json.canonical(report))


def _finish_nothing(*_: Any) -> None:
    """Does nothing: a GGUF file is complete with its tensors."""


SAFETENSORS = Container(_safetensors, _side_files)
