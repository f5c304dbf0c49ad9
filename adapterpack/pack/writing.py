"""A new pack on its way to the disk: its tensors are written while they are hashed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..io import safetensors
from ..io.atomic import output_folder, sync
from ..io.safe_open import TENSORS
from .contents import METADATA
from .pack import Pack

Begin = Callable[[Mapping[str, np.ndarray]], None]
"""Is told the tensors of a pack as soon as they are known."""


def written(out: str | os.PathLike[str], make: Callable[[Begin], Pack]) -> Pack:
    """The pack that ``make`` builds, written to the new folder ``out``, whole or not at all; with its path.

    Raises:
        OutputExists: something is there already.
        StorageError: the file system refuses.
    """
    with output_folder(out) as folder, ThreadPoolExecutor(1) as pool:
        begun: list[Future[None]] = []

        def write(tensors: Mapping[str, np.ndarray]) -> None:
            safetensors.write(folder / TENSORS, tensors, METADATA)
            sync(folder / TENSORS)

        pack = make(lambda tensors: begun.append(pool.submit(write, tensors)))
        pack.write_into(folder, begun[0] if begun else None)
    return replace(pack, path=Path(out))
