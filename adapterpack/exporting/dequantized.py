"""Writes a quantized base as plain floats into a scratch folder, from which frontends build graphs and torch
loads the model.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..adapter_methods import row_blocks
from ..base.base_folder import CONFIG, copy_carried
from ..base.checkpoint import SINGLE, Checkpoint
from ..base.codecs.dequantized_checkpoint import DequantizedCheckpoint
from ..errors import storage_errors
from ..io import safetensors as st
from ..io.safetensors import FLOATS
from ..merging.config import plain_config
from ..merging.staging import require_space

_BLOCK = 1 << 20
"""Numbers of a weight that are decoded at a time."""


def write_dequantized(
    base: DequantizedCheckpoint,
    folder: Path,
    described: Checkpoint | None = None,
    without: Collection[str] = (),
) -> None:
    """Writes the weights of ``base`` decoded, in float32, and all its other tensors as they are, into the new
    ``folder``.

    The small files are those of ``described``, by default of ``base``, as are the tensors of it that ``base``
    has under no name of the model. Modules ``without`` are left out. No more than a few rows of a weight are
    in memory.

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
    header, places = st.plan(entries, {"format": "pt"})
    require_space(folder / SINGLE, sum(place.nbytes for place in places.values()))
    with storage_errors(folder):
        folder.mkdir()
        with (folder / SINGLE).open("xb") as file:
            file.write(header)
            for name, dtype, shape in entries:
                if owners[name] is not base or len(shape) != 2 or dtype not in FLOATS:
                    file.write(st.raw(owners[name].read(name)))
                    continue
                (matrix,) = base.storage(name, None).reader.matrices("linear")
                for rows in row_blocks(*shape, _BLOCK):
                    file.write(st.raw(np.ascontiguousarray(matrix[rows])))
    copy_carried(described.folder, folder)
    (folder / CONFIG).write_text(
        json.dumps(plain_config(described.config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
