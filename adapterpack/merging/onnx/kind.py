"""What a merge is into: told by the path, before anything is opened."""

from __future__ import annotations

import os
from pathlib import Path

from ...bundle import FILE_NAME


def is_graph(base: str | os.PathLike[str]) -> bool:
    """Whether a base is an ONNX file or a bundle, and not a checkpoint."""
    path = Path(base)
    return path.suffix == ".onnx" or (path / FILE_NAME).is_file()
