"""Answers with a value for each pixel of a picture: within limits, in its own size, and as a PNG."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import ConfigError
from .data import Row
from .object_detection import prepare as prepare_sized
from .one_pass import PreparedRow
from .session import RowInputs

MOST_PIXELS = 1 << 22
"""The most pixels of a picture: an answer has a value for each."""
_CUBIC = -0.75
"""The parameter of torch's bicubic interpolation."""


def prepare(session: RowInputs, row: Row, options: Any) -> PreparedRow:
    """Prepares an image, and notes its own height and width."""
    prepared = prepare_sized(session, row, options)
    height, width = prepared.notes
    if height * width > MOST_PIXELS:
        raise ConfigError(
            "the picture is too large for an answer of each pixel",
            expected=f"at most {MOST_PIXELS} pixels",
            found=f"{width} x {height}",
            remedy="send a smaller one",
        )
    return prepared


Kernel = Callable[[np.ndarray], np.ndarray]
"""The weight of a value at a distance, in pixels."""


def cubic(far: np.ndarray) -> np.ndarray:
    """Returns the weights of torch's bicubic interpolation."""
    near = ((_CUBIC + 2) * far - (_CUBIC + 3)) * far**2 + 1
    weights: np.ndarray = np.where(far <= 1, near, ((far - 5) * far + 8) * far * _CUBIC - 4 * _CUBIC)
    return weights


def linear(far: np.ndarray) -> np.ndarray:
    """Returns the weights of torch's bilinear interpolation."""
    weights: np.ndarray = np.maximum(1 - far, 0)
    return weights


def resize(values: np.ndarray, size: tuple[int, int], kernel: Kernel = cubic) -> np.ndarray:
    """Returns a map ``[height, width]`` in another size, by an interpolation of torch without aligned
    corners.

    Example:
        >>> resize(np.array([[1.0, 2.0]]), (1, 4)).tolist()
        [[0.89453125, 1.2265625, 1.7734375, 2.10546875]]
        >>> resize(np.array([[1.0, 2.0]]), (1, 4), linear).tolist()
        [[1.0, 1.25, 1.75, 2.0]]
    """
    rows, columns = (_weights(own, wanted, kernel) for own, wanted in zip(values.shape, size, strict=True))
    found: np.ndarray = rows @ values.astype(np.float64) @ columns.T
    return found


def _weights(own: int, wanted: int, kernel: Kernel) -> np.ndarray:
    """Returns the weight of each of ``own`` values in each of ``wanted``."""
    place = (np.arange(wanted) + 0.5) * own / wanted - 0.5
    weights = np.zeros((wanted, own))
    for tap in range(-1, 3):
        index = np.floor(place) + tap
        far = kernel(np.abs(place - index))
        np.add.at(weights, (np.arange(wanted), index.clip(0, own - 1).astype(int)), far)
    return weights


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns a map in another size; each pixel gets the value of the nearest one, where an average of two
    would mean nothing.

    Example:
        >>> nearest(np.array([[1, 2]]), (1, 4)).tolist()
        [[1, 1, 2, 2]]
    """
    at = [np.arange(wanted) * own // wanted for own, wanted in zip(values.shape, size, strict=True)]
    return np.ascontiguousarray(values[np.ix_(*at)])


def png(pixels: np.ndarray) -> str:
    """Returns gray pixels of 16 bits as a PNG (ISO/IEC 15948) in a data URL."""
    height, width = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels.astype(">u2"))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
