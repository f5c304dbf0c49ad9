"""Makes the input arrays of graphs for images and sounds, from PNG, JPEG, ``.wav`` and ``.npy`` files."""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, FormatError, Unsupported
from ...io import Config, open_regular, read_at_most
from ...library_errors import library_errors
from ...tasks.data import Picture, Recording
from .image_processing import DATA, bytes_in, bytes_of, sized_picture
from .processor_config import Preparation
from .sounds import features_of, rate_of

_MOST = 256 << 20
"""The most bytes that a file may have."""
_SOUND = "data:audio/"
"""The prefix of a sound in a data URL (RFC 2397)."""
_PREPARE = "save what the model's processor gives for it as a .npy file"


def array_of(path: Path, shape: Sequence[Any], what: str) -> np.ndarray:
    """Reads the float32 array of a ``.npy`` file. It must have the ``shape`` of one row of the graph's input,
    in which named extents match any length.

    Raises:
        Unsupported: the file is of another kind.
        FormatError: the file holds no such array, or is too large.
    """
    if path.suffix != ".npy":
        raise Unsupported(
            f"{what} is read from .npy files", where=path, found=path.suffix or "no ending", remedy=_PREPARE
        )
    with (
        _open_file(path) as file,
        library_errors("numpy", "the file holds no array", where=path, remedy=_PREPARE),
    ):
        array = np.load(file, allow_pickle=False)
    return _fitting(np.asarray(array), shape, what, path)


def image_of(given: Picture, shape: Sequence[Any], prepared: Callable[[], Preparation]) -> np.ndarray:
    """Returns the pixels of :func:`sized_image_of` alone."""
    return sized_image_of(given, shape, prepared)[0]


def sized_image_of(
    given: Picture, shape: Sequence[Any], prepared: Callable[[], Preparation]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the pixels of one image in the ``shape`` of one row of the graph's input, and its own height
    and width. Encoded images are prepared as ``prepared()`` says; arrays must be prepared already.

    Raises:
        ConfigError: Pillow is not installed, or the processor's configuration is invalid.
        Unsupported: the kind of image, or the processor, is not known.
        FormatError: the image is too large, cannot be decoded, or has another shape than the graph takes.
        StorageError: the file cannot be read.
    """
    if isinstance(given, np.ndarray):
        return _with_size(_fitting(given, shape, "an image", "the array"))
    found = find_bytes(given)
    if found is None:
        return _with_size(array_of(Path(given), shape, "an image"))  # type: ignore[arg-type] # no bytes
    data, where = found
    how = prepared()
    made = (3, *(how.extent or ()))
    taken = tuple(shape)
    if how.extent is not None and any(
        isinstance(wide, int) and wide != own for wide, own in zip(taken, made, strict=True)
    ):
        raise FormatError(
            "the processor's configuration makes images of another form than the graph takes",
            where=where,
            expected=taken,
            found=made,
        )
    pixels, size = sized_picture(data, how, where)
    return _fitting(pixels, shape, "an image", where), size


def _with_size(pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    return pixels, (pixels.shape[1], pixels.shape[2])


def find_bytes(given: Picture) -> tuple[bytes, str] | None:
    """Returns the bytes of an encoded image, and where they are from; None for arrays and ``.npy`` files."""
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given), "the bytes"
    if isinstance(given, str) and given.startswith(DATA):
        return bytes_in(given), given[:40]
    if isinstance(given, np.ndarray) or Path(given).suffix == ".npy":
        return None
    return bytes_of(Path(given)), str(given)


def sound_of(given: Recording, shape: Sequence[Any], config: Config) -> np.ndarray:
    """Returns one row of a graph's input for sound, made of a ``.wav`` file, of its bytes, or of a data URL,
    or read from a ``.npy`` file. ``config`` is the ``feature_extractor`` section of the model's files.

    Raises:
        Unsupported: the file is of another kind, or has another sampling rate, depth or number of channels;
            or the model's feature extractor is of an unknown kind.
        FormatError: the file is no wave file, or is too large.
        ConfigError: the sound is empty, too short or too long.
    """
    if isinstance(given, bytes):
        data = given
        where = "the bytes"
    elif isinstance(given, str) and given.startswith(_SOUND):
        data = bytes_in(given, "sound")
        where = given[:40]
    elif Path(given).suffix != ".wav":
        return array_of(Path(given), shape, "a sound")
    else:
        data = _bytes_of(Path(given))
        where = str(given)
    features = features_of(_samples(data, rate_of(config), where), shape, config, where)
    return _fitting(features, shape, "a sound", where)


def extend(arrays: Sequence[np.ndarray], fill: int = 0, first: int = 0) -> list[np.ndarray]:
    """Returns arrays as large as the largest along each axis from ``first`` on, with ``fill`` at the end.

    Example:
        >>> [array.tolist() for array in extend([np.array([7]), np.array([8, 9])], -1)]
        [[7, -1], [8, 9]]
    """
    most = np.max([array.shape[first:] for array in arrays], axis=0)
    return [
        np.pad(
            array,
            [
                *[(0, 0)] * first,
                *((0, wide - own) for wide, own in zip(most, array.shape[first:], strict=True)),
            ],
            constant_values=fill,
        )
        for array in arrays
    ]


def _samples(data: bytes, rate: int, where: object) -> np.ndarray:
    """Returns the samples of a wave file, in [-1, 1)."""
    form, frames = _wave(data, where)
    if form != (rate, 2, 1):
        raise Unsupported(
            "a sound must be one channel of 16 bits at the model's rate",
            where=where,
            expected=f"{rate} Hz, 2 bytes, 1 channels",
            found="{} Hz, {} bytes, {} channels".format(*form),
            remedy="convert it",
        )
    samples = np.frombuffer(frames[: len(frames) // 2 * 2], "<i2").astype(np.float64) / 32768
    if not len(samples):
        raise ConfigError("the file holds no sound", where=where)
    return samples


def seconds_of(data: bytes) -> float:
    """Returns how long the sound of a wave file is.

    Raises:
        FormatError: the bytes are no wave file.
    """
    (rate, size, channels), frames = _wave(data, "the bytes")
    return len(frames) / (rate * size * channels)


def _wave(data: bytes, where: object) -> tuple[tuple[int, int, int], bytes]:
    """Returns rate, bytes of a sample and channels of a wave file, and its frames."""
    with (
        library_errors("wave", "the file is no wave file", where=where),
        wave.open(io.BytesIO(data), "rb") as sound,
    ):
        form = (sound.getframerate(), sound.getsampwidth(), sound.getnchannels())
        return form, sound.readframes(sound.getnframes())


def _bytes_of(path: Path) -> bytes:
    with _open_file(path) as file:
        return read_at_most(file, _MOST)


@contextmanager
def _open_file(path: Path) -> Iterator[FileIO]:
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > _MOST:
            raise FormatError(
                "the file is too large", where=path, expected=f"at most {_MOST} bytes", found=size
            )
        yield file


def _fitting(array: np.ndarray, shape: Sequence[Any], what: str, path: object) -> np.ndarray:
    if array.ndim == len(shape) + 1 and array.shape[0] == 1:  # a batch of one, as processors return it
        array = array[0]
    if array.ndim != len(shape) or any(
        isinstance(wide, int) and wide != own for wide, own in zip(shape, array.shape, strict=True)
    ):
        raise FormatError(
            f"{what} of another form than the graph takes",
            where=path,
            expected=tuple(shape),
            found=array.shape,
            remedy=_PREPARE,
        )
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise FormatError(f"{what} is not of finite floats", where=path, found=array.dtype, remedy=_PREPARE)
    return np.ascontiguousarray(array, np.float32)
