"""Detects by path and first bytes whether a merge is into a GGUF file, an ONNX graph or a checkpoint, before
opening it.
"""

from __future__ import annotations

from pathlib import Path

from ..base.gguf import MAGIC
from ..bundle import FILE_NAME
from ..io import open_regular
from ..paths import StrPath


def is_gguf(path: StrPath) -> bool:
    """Whether a base is a GGUF file, by its first bytes."""
    if not Path(path).is_file():
        return False
    with open_regular(Path(path)) as file:
        return file.read(len(MAGIC)) == MAGIC


def is_graph(base: StrPath) -> bool:
    """Whether a base is an ONNX file or a bundle, by its name and the files in its folder."""
    path = Path(base)
    return path.suffix == ".onnx" or (path / FILE_NAME).is_file()
