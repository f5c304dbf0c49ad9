"""Depth estimation: how far each pixel of an image is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..errors import ConfigError, excerpt
from .data import Encoded, Labels, Result, Row, report_of
from .one_pass import OnePass, PreparedRow
from .pixel_maps import nearest, png, prepare, resize
from .session import Arrays, RowHead, RowInputs
from .task import ANY_SIZE, MAIN, TASKS, Part, Task, TaskTraining


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
                found=excerpt(self.format),
            )


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: DepthOptions
) -> Result:
    """Returns ``depth``, as large as the picture was: its ``size``, least and largest number, and the map."""
    depth = resize(outputs["predicted_depth"][0], row.notes)
    low, high = float(depth.min()), float(depth.max())
    facts = {"size": [*row.notes], "min": low, "max": high}
    if options.format == "values":
        return {"depth": {**facts, "values": depth.round(6).tolist()}}
    shares = (depth - low) / (high - low or 1)
    return {"depth": {**facts, "png": png((shares * 65535).round())}}


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns the pixels of each image and its depth in the same size, read when a batch needs them. The
    columns are ``image``, the path of a picture, and ``depth_map``, the path of a ``.npy`` file with the
    distance of each pixel; 0 where it is not known.

    Raises:
        ConfigError: other columns, or a depth that is no path.
    """
    report = report_of(where)
    report.read_pair(rows.column_names, "image", ("depth_map",), "depth estimation needs")

    def encode_row(row: Row, place: object) -> Encoded:
        if not isinstance(row["depth_map"], str):
            raise ConfigError(
                "a row needs a depth map",
                where=place,
                expected="the path of a .npy file",
                found=excerpt(row["depth_map"]),
            )
        return {"image": partial(_targets, media, row, place)}

    return report.encode(rows, encode_row)


def _targets(media: Any, row: Row, place: object) -> Encoded:
    """Returns the inputs of a row. Each pixel gets the depth of the nearest one, since unknown depths cannot
    be averaged.
    """
    pixels = media.pixels(row["image"], place)
    return {"pixel_values": pixels, "labels": nearest(media.map(row["depth_map"]), pixels.shape[1:])}


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
