"""Splits the experts in adapters of Tinker's service, which holds those of a layer in one tensor, into the
matrices of each expert, as PEFT names them.

``PATH.experts.w1.lora_A.weight`` is ``[experts, r, in]`` and ``lora_B`` ``[experts, out, r]``; a first axis
of 1 is shared by all experts. Names and sharing: https://github.com/thinking-machines-lab/tinker-cookbook.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..errors import FormatError, Unsupported
from ..io import TENSORS, HeldFile, SafetensorsFile
from ..peft.tensors import TINKER_EXPERTS
from .tensor_files import as_file

_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Tinker's name of a matrix of an expert -> that in transformers' checkpoints."""
_MOST_TIMES = 64
"""How many times as large as the file the tensors may become, since shared ones are repeated."""


def split_experts(folder: Path) -> HeldFile | None:
    """Returns the tensors of a folder with each expert's own; None if it has no experts of Tinker's service.

    Raises:
        FormatError: the two tensors of a module do not fit each other.
        Unsupported: the tensors would become far larger than the file.
    """
    if not (folder / TENSORS).is_file():
        return None
    file = SafetensorsFile(folder / TENSORS, private=True)
    found = {name: match for name in file.tensors if (match := TINKER_EXPERTS.fullmatch(name))}
    if not found:
        return None
    counts: dict[str, int] = {}
    for name, match in found.items():
        shape = file.tensors[name].shape
        module = f"{match[1]}.{match[2]}"
        known = counts.get(module, 1)
        if len(shape) != 3 or (shape[0] != known and 1 not in (shape[0], known)):
            raise FormatError(
                "the experts of a module do not fit each other",
                where=f"{file.path}, {name}",
                expected="[experts, r, in] and [experts, out, r], or 1 in place of experts",
                found=list(shape),
            )
        counts[module] = max(known, shape[0])
    sizes = [
        math.prod(file.tensors[name].shape[1:]) * counts[f"{match[1]}.{match[2]}"]
        for name, match in found.items()
    ]
    if sum(sizes) > _MOST_TIMES * file.path.stat().st_size:
        raise Unsupported(
            "what the experts of this file share would become far larger than the file",
            where=file.path,
            expected=f"at most {_MOST_TIMES} times as large",
            remedy="merge it with tinker_cookbook.weights.build_hf_model",
        )
    tensors = {name: file.read(name) for name in file.tensors if name not in found}
    for name, match in found.items():
        path, matrix, leaf = match.groups()
        count = counts[f"{path}.{matrix}"]
        whole = file.read(name)
        if whole.size:  # a model without this matrix has an empty one
            every = np.broadcast_to(whole, (count, *whole.shape[1:]))
            tensors |= {f"{path}.{at}.{_NAMES[matrix]}.{leaf}": every[at] for at in range(count)}
    return as_file(tensors, file.path)
