"""Opens the tensors of a PEFT folder that are in a pickle or in several files instead of one safetensors
file.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from ..adapter_methods import Arrays
from ..errors import FormatError
from ..io import TENSORS, HeldFile, SafetensorsFile, safetensors, torch_file
from ..peft import PICKLES, SHARD, require_tensors
from .format import ConversionSource, Notes

_PICKLE = ".bin"
"""How the names of pickles end."""


def tensors_of(folder: Path, source: ConversionSource) -> tuple[SafetensorsFile | None, Notes]:
    """Opens the tensors of ``folder``, and returns notes on how they were read; None if they are in the usual
    file.

    Raises:
        FormatError: a file is damaged, or one of several is missing.
        Unsupported: they are in a pickle and the caller does not convert, or the pickle contains other
            objects than tensors.
    """
    if (folder / TENSORS).exists():
        return None, ()
    shards = sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))
    pickled = next((folder / name for name in PICKLES if (folder / name).is_file()), None)
    if not source.converted or (pickled is None and not shards):
        require_tensors(folder / TENSORS)
        return None, ()
    if pickled is not None and not shards:
        return out_of_pickle(pickled)
    # pickles may lie beside the same tensors as safetensors
    shards = [path for path in shards if path.suffix != _PICKLE] or shards
    numbers = [tuple(map(int, re.findall("[0-9]+", path.name))) for path in shards]
    count = len(shards)
    if numbers != [(number, count) for number in range(1, count + 1)]:
        raise FormatError(
            "one of the files with the adapter's tensors is missing",
            where=folder,
            expected=f"{numbers[0][-1]} files",
            found=", ".join(path.name for path in shards)[:200],
            remedy="fetch the folder again from where it came",
        )
    tensors: Arrays = {}
    for path in shards:
        part = torch_file.read(path) if path.suffix == _PICKLE else _read_all(path)
        if twice := tensors.keys() & part.keys():
            raise FormatError("two of the files have a tensor of one name", where=path, found=min(twice))
        tensors |= part
    what = "pickles, of which nothing was run" if shards[0].suffix == _PICKLE else "files"
    return as_file(tensors, shards[0]), (f"the tensors were in {count} {what}",)


def _read_all(path: Path) -> Arrays:
    file = SafetensorsFile(path, private=True)
    return {name: file.read(name) for name in file.tensors}


def out_of_pickle(path: Path) -> tuple[HeldFile, Notes]:
    """Returns the tensors of a file that torch wrote, and a note on how they were read."""
    return as_file(torch_file.read(path), path), (
        f"{path.name} is a pickle: its tensors were read, and nothing of it was run",
    )


def as_file(tensors: Arrays, path: Path) -> HeldFile:
    """Returns tensors as a file, for readers of files; ``path`` is where they came from."""
    data = io.BytesIO()
    safetensors.write(data, tensors, {"format": "pt"})
    return HeldFile(data.getvalue(), path)
