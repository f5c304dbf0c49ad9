"""Assigns the images of a batch to its rows, by their image tokens."""

from __future__ import annotations

import numpy as np

from ...errors import ConfigError


def rows_of_images(ids: np.ndarray, token: int, images: int) -> list[int]:
    """Returns the row of each image, in order. Every image takes the same number of image tokens.

    Raises:
        ConfigError: the tokens cannot be divided among the images.

    Example:
        >>> rows_of_images(np.array([[9, 9, 1], [1, 2, 3], [9, 9, 9]]), 9, 5)
        [0, 0, 2, 2, 2]
    """
    counts = (ids == token).sum(1)
    total = int(counts.sum())
    per_image = total // images if images else 0
    if images and (per_image == 0 or (counts % per_image).any() or total != per_image * images):
        raise ConfigError(
            "the rows' image tokens do not fit the images",
            expected=f"as many tokens for each of {images} images",
            found=counts.tolist(),
            remedy=f"put the tokens of an image ({token}) where it belongs in its row",
        )
    return [
        row for row, count in enumerate(counts) for _ in range(int(count) // per_image if per_image else 0)
    ]


def features_of_rows(features: np.ndarray, rows: list[int], batch: int) -> np.ndarray:
    """Rearranges ``[images, positions, hidden]`` to ``[batch, longest, hidden]``: the images of each row one
    after another, padded with zeros.

    Example:
        >>> features_of_rows(np.arange(6.0).reshape(3, 2, 1), [0, 2, 2], 3)[..., 0].tolist()
        [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 3.0, 4.0, 5.0]]
    """
    _, positions, hidden = features.shape
    most = max((rows.count(row) for row in set(rows)), default=0)
    by_row = np.zeros((batch, most * positions, hidden), features.dtype)
    filled = [0] * batch
    for image, row in enumerate(rows):
        by_row[row, filled[row] : filled[row] + positions] = features[image]
        filled[row] += positions
    return by_row
