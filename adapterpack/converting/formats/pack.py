"""Reads and writes packs, which are a manifest and tensors, like any other format."""

from __future__ import annotations

import os
from pathlib import Path

from ...manifest import manifest as m
from ...pack import Pack, load
from .. import FORMATS, BaseModel, Format, Notes, Reading, dequantize
from ..packs import require_base_fits


def _write(pack: Pack, folder: Path, base: BaseModel | None) -> Notes:
    plain, notes = dequantize(pack)
    plain.write_into(folder)
    return notes


PACK = FORMATS.register(
    Format(
        "pack",
        "a pack: manifest and tensors",
        True,
        lambda path: os.path.lexists(path / m.FILE_NAME),
        lambda source: Reading(require_base_fits(load(source.path), source.base)),
        _write,
        rank=0,
    )
)
