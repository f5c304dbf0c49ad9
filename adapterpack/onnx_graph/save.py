"""Writes an ONNX graph with its weights in a data file next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

_PAGE = 4096
"""Every tensor begins at a multiple of this many bytes, so that it can be mapped alone and kernels read it in
place.
"""


def save_graph(model: ir.Model, path: Path, **options: Any) -> None:
    """Writes an ``onnx_ir`` model to ``path`` and its weights to ``path`` + ``.data``; passes ``options`` to
    ``onnx_ir.save``.

    Raises:
        OSError: the file system refuses.
    """
    ir.save(model, path, external_data=f"{path.name}.data", alignment=_PAGE, align_threshold=0, **options)
