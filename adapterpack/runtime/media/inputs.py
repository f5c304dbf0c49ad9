"""Makes the input arrays of graphs for images and speech, from PNG, JPEG, ``.wav`` and ``.npy`` files."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, FormatError, Unsupported
from ...io.safe_open import open_regular
from ...library_errors import library_errors
from ...tasks.data.rows import Picture
from .image_processing import DATA, bytes_in, bytes_of, picture
from .processor_config import Preparation

_MOST = 256 << 20
"""The most bytes that a file may have."""
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
    """Returns the pixels of one image in the ``shape`` of one row of the graph's input. Encoded images are
    prepared as ``prepared()`` says; arrays must be prepared already.

    Raises:
        ConfigError: Pillow is not installed, or the processor's configuration is invalid.
        Unsupported: the kind of image, or the processor, is not known.
        FormatError: the image is too large, cannot be decoded, or has another shape than the graph takes.
        StorageError: the file cannot be read.
    """
    if isinstance(given, np.ndarray):
        return _fitting(given, shape, "an image", "the array")
    found = find_bytes(given)
    if found is None:
        return array_of(Path(given), shape, "an image")  # type: ignore[arg-type] # no bytes
    data, where = found
    how = prepared()
    made, taken = (3, *(how.extent or ())), tuple(shape)
    if how.extent is not None and any(
        isinstance(wide, int) and wide != own for wide, own in zip(taken, made, strict=True)
    ):
        raise FormatError(
            "the processor's configuration makes images of another form than the graph takes",
            where=where,
            expected=taken,
            found=made,
        )
    return _fitting(picture(data, how, where), shape, "an image", where)


def find_bytes(given: Picture) -> tuple[bytes, str] | None:
    """Returns the bytes of an encoded image, and where they are from; None for arrays and ``.npy`` files."""
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given), "the bytes"
    if isinstance(given, str) and given.startswith(DATA):
        return bytes_in(given), given[:40]
    if isinstance(given, np.ndarray) or Path(given).suffix == ".npy":
        return None
    return bytes_of(Path(given)), str(given)


def speech_of(path: Path, shape: Sequence[Any], config: Mapping[str, Any]) -> np.ndarray:
    """Returns the log-mel features ``[mel, frames]`` of a ``.wav`` file, or reads them from a ``.npy`` file.

    ``config`` is the ``feature_extractor`` section of the model's files. The formula is that of Radford et
    al. 2022 (https://arxiv.org/abs/2212.04356), section 2.2, as in Whisper's extractor: log10 of the power in
    Slaney's mel bands, at least its maximum minus 8, then plus 4 and divided by 4.

    Raises:
        Unsupported: the file is of another kind, or has another sampling rate, depth or number of channels.
        FormatError: the file is no wave file.
    """
    if path.suffix != ".wav":
        return array_of(path, shape, "speech")
    rate, size, step = (
        int(config.get(key, usual))
        for key, usual in (("sampling_rate", 16000), ("n_fft", 400), ("hop_length", 160))
    )
    mels, frames = shape
    if not isinstance(mels, int) or not isinstance(frames, int):
        raise Unsupported(
            "this graph takes speech of any length, whose features only its own processor knows",
            where=path,
            remedy=_PREPARE,
        )
    samples = _samples(path, rate)[: frames * step]
    padded = np.pad(np.pad(samples, (0, frames * step - len(samples))), size // 2, mode="reflect")
    window = np.hanning(size + 1)[:-1]
    places = np.arange(frames)[:, None] * step + np.arange(size)
    power = np.abs(np.fft.rfft(padded[places] * window)) ** 2
    loud = np.log10(np.maximum(mel_bands(mels, size, rate) @ power.T, 1e-10))
    features: np.ndarray = ((np.maximum(loud, loud.max() - 8) + 4) / 4).astype(np.float32)
    return features


def mel_bands(count: int, size: int, rate: int) -> np.ndarray:
    """Returns triangular mel filters over the frequencies of a spectrum, ``[count, size // 2 + 1]``, each of
    area 1, on Slaney's scale: linear below 1 kHz.

    Example:
        >>> mel_bands(80, 400, 16000).shape
        (80, 201)
    """
    highest = 15 + 27 * np.log(rate / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, highest, count + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.linspace(0, rate / 2, size // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    bands: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return bands


def _samples(path: Path, rate: int) -> np.ndarray:
    """Reads the samples of a wave file, in [-1, 1)."""
    with (
        _open_file(path) as file,
        library_errors("wave", "the file is no wave file", where=path),
        wave.open(file, "rb") as sound,
    ):
        form = (sound.getframerate(), sound.getsampwidth(), sound.getnchannels())
        data = sound.readframes(sound.getnframes())
    if form != (rate, 2, 1):
        raise Unsupported(
            "speech must be one channel of 16 bits at the model's rate",
            where=path,
            expected=f"{rate} Hz, 2 bytes, 1 channels",
            found="{} Hz, {} bytes, {} channels".format(*form),
            remedy="convert it",
        )
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float64) / 32768
    if not len(samples):
        raise ConfigError("the file holds no sound", where=path)
    return samples


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
