"""Decodes PNG and JPEG images, within limits that are checked before decoding, and prepares them as the
model's image processor does.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError, Unsupported, storage_errors
from ...extras import needed_by
from ...library_errors import library_errors
from .processor_config import Preparation

MOST_BYTES = 32 << 20
"""The most bytes of an encoded image."""
MOST_PIXELS = 1 << 25
"""The most pixels of an image, decoded and resized: a file of a few kilobytes can decode to billions.
"""
DATA = "data:image/"
"""The prefix of an image in a data URL (RFC 2397)."""
_MAGIC = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
_UNDECODABLE = "the picture cannot be decoded"
_EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
"""Pillow's modes with at most eight bits a channel, which convert to RGB without loss of precision.
"""


def picture(data: bytes, how: Preparation, where: object = "a picture") -> np.ndarray:
    """Returns the pixels of :func:`sized_picture` alone.

    Example:
        >>> how = Preparation(None, (2, 2), 2, None, 1 / 255, None, None)
        >>> picture(Path("photo.png").read_bytes(), how).shape  # doctest: +SKIP
        (3, 2, 2)
    """
    return sized_picture(data, how, where)[0]


def sized_picture(data: bytes, how: Preparation, where: object) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes a PNG or JPEG and returns its pixels ``[3, height, width]`` float32, prepared as ``how`` says,
    and the height and width that it had before.

    Raises:
        FormatError: the image is too large when it is resized; otherwise see :func:`decode`.
    """
    upright = decode(data, where)
    height, width = how.resize(upright.height, upright.width)
    _require_pixels((width, height), where)
    pixels = np.asarray(
        upright if (width, height) == upright.size else upright.resize((width, height), how.resample)
    )
    prepared = _normalise(pixels if how.crop is None else _crop(pixels, *how.crop), how)
    return prepared, (upright.height, upright.width)


def decode(data: bytes, where: object = "a picture") -> Any:
    """Decodes a PNG or JPEG as an image of Pillow in RGB. Applies the EXIF orientation and drops
    transparency, as transformers does when it loads an image.

    Raises:
        MissingExtra: Pillow is not installed.
        Unsupported: the file is of another kind, or has more than eight bits a channel.
        FormatError: the image is too large, or cannot be decoded.
    """
    image, transposed = _open(data, where)
    if image.mode not in _EIGHT_BITS:
        raise Unsupported(
            "pictures with more than eight bits a channel are not read",
            where=where,
            found=image.mode,
            remedy="convert it",
        )
    with library_errors("PIL", _UNDECODABLE, where=where):
        return transposed(image).convert("RGB")


def numbers_in(data: bytes, where: object) -> np.ndarray:
    """Decodes a PNG of one channel and returns the number of each pixel ``[height, width]``; with a palette
    these are the places in it.

    Raises:
        Unsupported: the picture has several channels; otherwise see :func:`decode`.
    """
    image, _ = _open(data, where)
    if image.mode not in ("L", "P", "I", "I;16"):
        raise Unsupported(
            "a picture whose pixels are numbers must have one channel",
            where=where,
            found=image.mode,
            remedy="convert it",
        )
    with library_errors("PIL", _UNDECODABLE, where=where):
        return np.asarray(image).astype(np.int64)


def _open(data: bytes, where: object) -> tuple[Any, Callable[[Any], Any]]:
    """Opens a picture within limits; also returns what applies its EXIF orientation."""
    form = next((form for magic, form in _MAGIC.items() if data.startswith(magic)), None)
    if form is None:
        raise Unsupported(
            "only PNG and JPEG pictures are read",
            where=where,
            found=repr(bytes(data[:8])),
            remedy="convert it",
        )
    _require_bytes(len(data), where)
    image_of, transposed = _pillow()
    with library_errors("PIL", _UNDECODABLE, where=where):
        image = image_of(io.BytesIO(data), formats=(form,))
        size = image.size
    _require_pixels(size, where)
    return image, transposed


def bytes_of(path: Path) -> bytes:
    """Reads a file that may be an image, if it is not too large.

    Raises:
        FormatError: the file is too large.
    """
    with storage_errors(path):
        _require_bytes(path.stat().st_size, path)
        return path.read_bytes()


def bytes_in(text: str, what: str = "picture") -> bytes:
    """Returns the bytes of a data URL such as ``data:image/png;base64,...``; errors say ``what`` it holds.

    Raises:
        FormatError: it is too large, or not in base 64.

    Example:
        >>> bytes_in("data:image/png;base64,iVBORw==")
        b'\\x89PNG'
    """
    head, comma, body = text.partition(",")
    _require_bytes(len(body) * 3 // 4, f"{head[:40]},")
    try:
        if not (comma and head.endswith(";base64")):
            raise ValueError("it does not say so")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise FormatError(
            f"the {what} is not in base 64: {error}", where=head[:40], expected="data:TYPE;base64,..."
        ) from error


def _pillow() -> tuple[Any, Any]:
    with needed_by("decoding a picture"):  # an array or a .npy file needs no library
        from PIL import Image, ImageOps  # noqa: PLC0415 - an extra
    return Image.open, ImageOps.exif_transpose


def _require_bytes(size: int, where: object) -> None:
    if size > MOST_BYTES:
        raise FormatError(
            "the picture is too large", where=where, expected=f"at most {MOST_BYTES} bytes", found=size
        )


def _require_pixels(size: tuple[int, int], where: object) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise FormatError(
            "the picture is too large, or too long for its height",
            where=where,
            expected=f"at most {MOST_PIXELS} pixels",
            found=f"{size[0]} x {size[1]}",
        )


def _crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the center of an image ``[height, width, 3]``, padded with black where the image is smaller."""
    extent = pixels.shape[:2]
    whole = np.zeros((max(height, extent[0]), max(width, extent[1]), 3), pixels.dtype)
    before = [-((edge - full) // 2) for edge, full in zip(extent, whole.shape[:2], strict=True)]  # rounded up
    whole[before[0] : before[0] + extent[0], before[1] : before[1] + extent[1]] = pixels
    top, left = (max((edge - wanted) // 2, 0) for edge, wanted in zip(extent, (height, width), strict=True))
    return whole[top : top + height, left : left + width]


def _normalise(pixels: np.ndarray, how: Preparation) -> np.ndarray:
    """Converts bytes ``[height, width, 3]`` to floats ``[3, height, width]``, and rounds at the same steps as
    transformers' processors.
    """
    scaled: np.ndarray = (pixels.astype(np.float64) * how.factor).astype(np.float32)
    if how.mean is not None and how.std is not None:
        scaled = (scaled - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))
