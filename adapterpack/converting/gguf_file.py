"""The tensors of a GGUF file that holds an adapter: read whole, so that what was checked is what is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..base.gguf.header import read_header
from ..errors import Unsupported
from .format import whole_file


def _plain(dtype: Any) -> Callable[[memoryview], np.ndarray]:
    return lambda data: np.frombuffer(data, dtype)


def _q8_0(data: memoryview) -> np.ndarray:
    """32 values a block: a float16 scale and 32 signed bytes; the product is float32."""
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
    values: np.ndarray = (blocks["scale"].astype(np.float32)[:, None] * blocks["values"].astype(np.float32)).reshape(-1)
    return values


DECODED = {"F32": _plain("<f4"), "F16": _plain("<f2"), "Q8_0": _q8_0, "F64": _plain("<f8"), "BF16": _plain(ml_dtypes.bfloat16)}
"""Type -> what makes an array of its bytes. Others are refused: adapters are not stored in them."""


class GGUFFile(NamedTuple):
    """What a file holds: values by key, tensors by name (numpy order of extents), and the type each was stored in."""

    values: dict[str, Any]
    tensors: dict[str, np.ndarray]
    types: dict[str, str]


def read_gguf(path: Path) -> GGUFFile:
    """Keys and tensors of a GGUF file.

    Raises:
        FormatError: truncated, malformed, or past a limit.
        Unsupported: another version, another byte order, or a tensor type in which no adapter is stored.
    """
    data = whole_file(path)
    header = read_header(data, path)
    found = {}
    for name, tensor in header.tensors.items():
        if tensor.type.name not in DECODED:
            raise Unsupported("a tensor type that adapters are not stored in", where=f"{path}, tensor {name}", found=tensor.type.name,
                              expected=", ".join(DECODED), remedy="convert the adapter again with --outtype f32")
        raw = memoryview(data)[tensor.offset : tensor.offset + tensor.nbytes]
        found[name] = DECODED[tensor.type.name](raw).reshape(tensor.shape)
    return GGUFFile(dict(header.values), found, {name: tensor.type.name for name, tensor in header.tensors.items()})
