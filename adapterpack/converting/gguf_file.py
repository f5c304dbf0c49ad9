"""Reads the tensors of an adapter in a GGUF file, once, so that the bytes that are used are the checked
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..base.gguf.header import read_header
from ..errors import Unsupported
from .format import read_file


def _plain(dtype: Any) -> Callable[[memoryview], np.ndarray]:
    return lambda data: np.frombuffer(data, dtype)


def _q8_0(data: memoryview) -> np.ndarray:
    """Decodes Q8_0: blocks of 32 values, a float16 scale and 32 signed bytes; the product is float32."""
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
    return (blocks["scale"].astype(np.float32)[:, None] * blocks["values"].astype(np.float32)).reshape(-1)


DECODED = {
    "F32": _plain("<f4"),
    "F16": _plain("<f2"),
    "Q8_0": _q8_0,
    "F64": _plain("<f8"),
    "BF16": _plain(ml_dtypes.bfloat16),
}
"""Tensor type -> function that makes an array of its bytes. Adapters are not stored in other types."""


class GGUFAdapter(NamedTuple):
    """The contents of a file: values by key, tensors by name (shapes in numpy's order), and the stored type
    of each tensor.
    """

    values: dict[str, Any]
    tensors: dict[str, np.ndarray]
    types: dict[str, str]


def read_gguf(path: Path) -> GGUFAdapter:
    """Reads the keys and tensors of a GGUF file.

    Raises:
        FormatError: truncated, malformed, or past a limit.
        Unsupported: a model, another version, another byte order, or a tensor type in which no adapter is
            stored.
    """
    data = read_file(path)
    header = read_header(data, path)
    if header.values.get("general.type") == "model":
        raise Unsupported(
            "this GGUF file is a model, not an adapter",
            where=path,
            remedy="look at it with adapterpack inspect, or merge adapters into it",
        )
    tensors = {}
    for name, tensor in header.tensors.items():
        if tensor.type.name not in DECODED:
            raise Unsupported(
                "a tensor type that adapters are not stored in",
                where=f"{path}, tensor {name}",
                found=tensor.type.name,
                expected=", ".join(DECODED),
                remedy="convert the adapter again with --outtype f32",
            )
        raw = memoryview(data)[tensor.offset : tensor.offset + tensor.nbytes]
        tensors[name] = DECODED[tensor.type.name](raw).reshape(tensor.shape)
    return GGUFAdapter(
        dict(header.values), tensors, {name: tensor.type.name for name, tensor in header.tensors.items()}
    )
