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
    if not images:
        return []
    counts = (ids == token).sum(1)
    total = int(counts.sum())
    per_image = total // images
    if per_image == 0 or (counts % per_image).any() or total != per_image * images:
        raise ConfigError(
            "the rows' image tokens do not fit the images",
            expected=f"as many tokens for each of {images} images",
            found=counts.tolist(),
            remedy=f"put the tokens of an image ({token}) where it belongs in its row",
        )
    rows: list[int] = np.repeat(np.arange(len(counts)), counts // per_image).tolist()
    return rows


def features_of_rows(features: np.ndarray, rows: list[int], batch: int) -> np.ndarray:
    """Rearranges ``[images, positions, hidden]`` to ``[batch, longest, hidden]``: the images of each row one
    after another, padded with zeros.

    Example:
        >>> features_of_rows(np.arange(6.0).reshape(3, 2, 1), [0, 2, 2], 3)[..., 0].tolist()
        [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 3.0, 4.0, 5.0]]
    """
    _, positions, hidden = features.shape
    counts = np.bincount(rows, minlength=batch)
    by_row = np.zeros((batch, counts.max(initial=0) * positions, hidden), features.dtype)
    for row, count in enumerate(counts):
        by_row[row, : count * positions] = features[np.equal(rows, row)].reshape(-1, hidden)
    return by_row
