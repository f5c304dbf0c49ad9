"""Writes temporary checkpoints, from which frontends build graphs and torch loads the model: a quantized base
as floats, or some tensors of a base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ...adapter_methods import row_blocks
from ...base import CONFIG, SINGLE, Checkpoint, DequantizedCheckpoint, copy_carried, write_json
from ...errors import storage_errors
from ...io import FLOATS, Config
from ...io import safetensors as st
from ...merging.checkpoint import plain_config, require_space

_BLOCK = 1 << 20
"""Numbers of a weight to decode at a time."""


def write_floats(
    base: DequantizedCheckpoint,
    folder: Path,
    described: Checkpoint | None,
    without: Collection[str],
) -> None:
    """Writes the weights of ``base`` dequantized to float32, and all its other tensors as they are, to the
    new ``folder``.

    The small files come from ``described``, by default ``base``; so do tensors that ``base`` does not have
    under a name of the model. Skips the modules ``without``. Holds only a few rows of a weight in memory.

    Raises:
        StorageError: the disk has no room for it.
    """
    described = described or base
    owners = {
        name: base if name in base.tensors else described
        for name in described.tensors
        if name not in described.stacks and name.rpartition(".")[0] not in without
    }
    entries = [
        (name, "F32" if name in base.quantized else owner.tensors[name].dtype, owner.tensors[name].shape)
        for name, owner in owners.items()
    ]

    def read(name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        if owners[name] is not base or len(shape) != 2 or dtype not in FLOATS:
            yield owners[name].read(name)
            return
        (matrix,) = base.storage(name, None).reader.matrices("linear")
        for rows in row_blocks(*shape, _BLOCK):
            yield np.ascontiguousarray(matrix[rows])

    write_checkpoint(folder, entries, read, described.folder, plain_config(described.config))


def write_checkpoint(
    folder: Path,
    entries: Sequence[tuple[str, str, tuple[int, ...]]],
    read: Callable[[str, str, tuple[int, ...]], Iterable[np.ndarray]],
    source: Path,
    config: Config,
) -> None:
    """Writes a single-file checkpoint to the new ``folder``: the tensors ``entries`` (name, dtype, shape),
    whose numbers ``read`` yields in parts, this ``config``, and the small files of ``source``.

    Raises:
        StorageError: the disk has no room for it.
    """
    header, places = st.plan(entries, {"format": "pt"})
    require_space(folder, sum(place.nbytes for place in places.values()))
    with storage_errors(folder):
        folder.mkdir()
        with (folder / SINGLE).open("xb") as file:
            file.write(header)
            for entry in entries:
                for part in read(*entry):
                    file.write(st.raw(part))
    copy_carried(source, folder)
    write_json(folder / CONFIG, config)
