"""Recognizes files and folders of other tools that are never read, and explains the refusal and the
remedy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import Unsupported
from ..peft import TORCHTUNE
from .format import first_bytes

_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_TORCHTUNE = re.compile(rf"{TORCHTUNE.pattern}|adapter_model\.pt")
_SAFE = "safetensors, GGUF or .onnx_adapter"


class Refused(NamedTuple):
    """A kind of file that is refused: ``looks_like`` recognizes it by names and first bytes."""

    name: str
    looks_like: Callable[[Path], bool]
    why: str
    expected: str
    remedy: str


def _is_pickle(path: Path) -> bool:
    return first_bytes(path, 2) in _PICKLES


def _is_tar(path: Path) -> bool:
    data = first_bytes(path, 512)
    return data[257:262] == b"ustar" or (path.suffix == ".nemo" and data[:2] == b"\x1f\x8b")


REFUSED = (
    Refused(
        "nemo",
        _is_tar,
        "the file is an archive, as NeMo's .nemo files are, with a pickle in it, which is never opened",
        "a folder of PEFT",
        "export the adapter as a folder of PEFT with NeMo (hf-peft), or merge it there",
    ),
    Refused(
        "nemo_folder",
        lambda path: (path / "context").is_dir() and (path / "weights").is_dir(),
        "the folder is a distributed checkpoint, as NeMo 2 writes it, whose index is a pickle, which is "
        "never opened",
        "a folder of PEFT",
        "export the adapter as a folder of PEFT with NeMo (hf-peft), or merge it there",
    ),
    Refused(
        "torchtune",
        lambda path: _TORCHTUNE.fullmatch(path.name) is not None and _is_pickle(path),
        "torchtune's own adapter files are pickles, and do not tell their alpha",
        "the folder, with its adapter_config.json",
        "name the folder: adapterpack convert FOLDER --base BASE --to pack -o OUT takes the tensors out of "
        "the pickle and runs nothing",
    ),
    Refused(
        "pickle",
        _is_pickle,
        "the file is a pickle or an archive, which is never opened",
        _SAFE,
        "save it as safetensors with the tool that wrote it, where you trust it",
    ),
)
"""The refused kinds, in the order in which they are tried."""


def refuse_known(path: Path) -> None:
    """Refuses files of known kinds that are never read.

    Raises:
        Unsupported: the file is of such a kind; the message explains why, and what to do.
    """
    for kind in REFUSED:
        if kind.looks_like(path):
            raise Unsupported(kind.why, where=path, expected=kind.expected, remedy=kind.remedy)
