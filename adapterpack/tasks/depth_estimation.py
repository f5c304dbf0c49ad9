"""Depth estimation: how far each pixel of an image is."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from ..errors import ConfigError
from .data.problems import Labels
from .data.report import report_of
from .data.rows import Row
from .object_detection import prepare as prepare_sized
from .one_pass import OnePass, PreparedRow
from .session import Arrays, RowHead, RowInputs
from .task import ANY_SIZE, MAIN, TASKS, Part, Task, TaskTraining

MOST_PIXELS = 1 << 22
"""The most pixels of a picture: an answer has a number for each."""
_CUBIC = -0.75
"""The parameter of torch's bicubic interpolation."""


@dataclass(frozen=True)
class DepthOptions:
    """``format`` is ``png`` for a picture of 16 bits a pixel, or ``values`` for the numbers.

    Raises:
        ConfigError: a value is invalid.
    """

    format: Literal["png", "values"] = "png"

    def __post_init__(self) -> None:
        if self.format not in ("png", "values"):
            raise ConfigError(
                "depth has no such form",
                where="format",
                expected="png or values",
                found=repr(self.format)[:80],
            )


def prepare(session: RowInputs, row: Row, options: DepthOptions) -> PreparedRow:
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


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: DepthOptions
) -> dict[str, Any]:
    """Returns ``depth``, as large as the picture was: its ``size``, least and largest number, and the map."""
    depth = resize(outputs["predicted_depth"][0], row.notes)
    low, high = float(depth.min()), float(depth.max())
    facts = {"size": [*row.notes], "min": low, "max": high}
    if options.format == "values":
        return {"depth": {**facts, "values": depth.round(6).tolist()}}
    shares = (depth - low) / (high - low or 1)
    return {"depth": {**facts, "png": _png((shares * 65535).round().astype(">u2"))}}


def resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns a map ``[height, width]`` in another size, by the bicubic interpolation of torch without
    aligned corners.

    Example:
        >>> resize(np.array([[1.0, 2.0]]), (1, 4)).tolist()
        [[0.89453125, 1.2265625, 1.7734375, 2.10546875]]
    """
    rows, columns = (_weights(own, wanted) for own, wanted in zip(values.shape, size, strict=True))
    found: np.ndarray = rows @ values.astype(np.float64) @ columns.T
    return found


def _weights(own: int, wanted: int) -> np.ndarray:
    """Returns the weight of each of ``own`` values in each of ``wanted``."""
    place = (np.arange(wanted) + 0.5) * own / wanted - 0.5
    weights = np.zeros((wanted, own))
    for tap in range(-1, 3):
        index = np.floor(place) + tap
        far = np.abs(place - index)
        near = ((_CUBIC + 2) * far - (_CUBIC + 3)) * far**2 + 1
        weight = np.where(far <= 1, near, ((far - 5) * far + 8) * far * _CUBIC - 4 * _CUBIC)
        np.add.at(weights, (np.arange(wanted), index.clip(0, own - 1).astype(int)), weight)
    return weights


def _png(pixels: np.ndarray) -> str:
    """Returns gray pixels of 16 bits as a PNG (ISO/IEC 15948) in a data URL."""
    height, width = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
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


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[dict[str, Any]]:
    """Returns the pixels of each image and its depth in the same size, read when a batch needs them. The
    columns are ``image``, the path of a picture, and ``depth_map``, the path of a ``.npy`` file with the
    distance of each pixel; 0 where it is not known.

    Raises:
        ConfigError: other columns, or a depth that is no path.
    """
    report = report_of(where)
    report.read_pair(rows.column_names, "image", ("depth_map",), "depth estimation needs")

    def encode_row(row: Row, place: object) -> dict[str, Any]:
        if not isinstance(row["depth_map"], str):
            raise ConfigError(
                "a row needs a depth map",
                where=place,
                expected="the path of a .npy file",
                found=repr(row["depth_map"])[:80],
            )
        return {"image": partial(_targets, media, row, place)}

    return report.encode(rows, encode_row)


def _targets(media: Any, row: Row, place: object) -> dict[str, Any]:
    """Returns the inputs of a row. Each pixel gets the depth of the nearest one, since unknown depths cannot
    be averaged.
    """
    pixels, depth = media.pixels(row["image"], place), media.map(row["depth_map"])
    at = [
        np.arange(wanted) * own // wanted for own, wanted in zip(depth.shape, pixels.shape[1:], strict=True)
    ]
    return {"pixel_values": pixels, "labels": np.ascontiguousarray(depth[np.ix_(*at)])}


TASKS.register(
    Task(
        "depth-estimation",
        "AutoModelForDepthEstimation",
        OnePass(prepare, result, DepthOptions),
        ("ForDepthEstimation",),
        parts=(Part(MAIN, "plain", ("pixel_values",), ANY_SIZE),),
        training=TaskTraining(encode, reads="media"),
    )
)
