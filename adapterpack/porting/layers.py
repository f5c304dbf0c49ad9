"""Finds which layer of one base continues which layer of another, where layers were removed or repeated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from ..base import Checkpoint

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SAMPLE = 1 << 10
"""How many numbers of each weight layers are compared by."""


def layer_of(name: str) -> tuple[str, int] | None:
    """Returns what stands before the number of a layer in a name, and the number.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
        (('model.layers.', 3), None)
    """
    found = _NUMBER.search(name)
    return None if found is None else (name[: found.start()], int(found[0]))


def in_layer(name: str, number: int) -> str:
    """Returns the name in another layer.

    Example:
        >>> in_layer("model.layers.3.mlp.up_proj.weight", 5)
        'model.layers.5.mlp.up_proj.weight'
    """
    return _NUMBER.sub(str(number), name, count=1)


def layer_sources(old: Checkpoint, new: Checkpoint, stem: str) -> list[int]:
    """Returns for each layer of ``new`` the number of the layer of ``old`` whose weights are most like its
    own: those with the largest cosines.
    """
    first = [
        name for name, info in old.tensors.items() if layer_of(name) == (stem, 0) and len(info.shape) > 1
    ]
    before, after = (np.array(list(_samples(base, first))) for base in (old, new))
    return [int(np.argmax(before @ layer)) for layer in after]


def _samples(base: Checkpoint, first: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields for each layer the directions of its weights that are ``first`` by their names in layer 0; zero
    for a weight that it does not have.
    """
    for number in count():
        names = [base.tensor_name(in_layer(name, number)) for name in first]
        if not any(names):
            return
        rows = np.zeros((len(first), _SAMPLE), np.float32)
        for row, name in zip(rows, names, strict=True):
            if name:
                row[:] = np.resize(base.view(name).reshape(-1)[:_SAMPLE], _SAMPLE)
        yield (rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-30)).ravel()
