"""Embeddings: how hidden states become one vector per row, and the options of a request for embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, excerpt
from .data import Result
from .session import RowInputs


def _mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    pooled: np.ndarray = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return pooled


def _last(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    pooled: np.ndarray = hidden[np.arange(len(hidden)), mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)]
    return pooled


def _first(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    pooled: np.ndarray = hidden[np.arange(len(hidden)), np.argmax(mask, axis=1)]
    return pooled


POOLING: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": _mean,
    "cls": _first,
    "last": _last,
}
"""Functions that pool hidden states ``[rows, positions, n]`` to one vector per row, over the real positions
of a mask ``[rows, positions]``.
"""


@dataclass(frozen=True)
class EmbeddingOptions:
    """``normalize`` scales the vector to length 1. ``dimensions`` keeps that many leading numbers and scales
    them to length 1, for models that were trained to be truncated (Kusupati et al. 2022,
    https://arxiv.org/abs/2205.13147).

    Raises:
        ConfigError: a value is invalid.
    """

    normalize: bool = False
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.normalize, bool):
            raise ConfigError("this must be true or false", where="normalize", found=excerpt(self.normalize))
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise ConfigError(
                "this is not a number of dimensions",
                where="dimensions",
                expected="a number from 1",
                found=excerpt(self.dimensions),
            )

    def require_fit(self, width: object) -> None:
        """Checks that a vector of this width can be cut to the dimensions; a width that is not a number is
        unknown and passes.

        Raises:
            ConfigError: the vector has fewer numbers.
        """
        if self.dimensions is not None and isinstance(width, int) and width < self.dimensions:
            raise ConfigError(
                "an embedding of this model has fewer numbers",
                where="dimensions",
                expected=f"at most {width}",
                found=self.dimensions,
            )


def width_of(session: RowInputs) -> object:
    """Returns the width of the first output of the graph that answers, if the bundle records it."""
    outputs = session.bundle.io.outputs
    return outputs[0].shape[-1] if outputs and outputs[0].shape else None


def embedding(vector: np.ndarray, options: EmbeddingOptions) -> Result:
    """Returns a vector as the answer to a row.

    Example:
        >>> embedding(np.array([3.0, 4.0, 12.0]), EmbeddingOptions(dimensions=2))
        {'embedding': [0.6, 0.8]}
    """
    options.require_fit(len(vector))
    vector = vector[: options.dimensions]
    if options.normalize or options.dimensions is not None:
        vector = vector / max(float(np.linalg.norm(vector)), float(np.finfo(np.float32).tiny))
    return {"embedding": [float(value) for value in vector]}


def pool(
    session: RowInputs, hidden: np.ndarray, mask: np.ndarray | None, options: EmbeddingOptions
) -> Result:
    """Returns the answer to a row with hidden states ``[1, positions, n]``, pooled over the positions of its
    mask by the bundle's method.
    """
    real = np.ones(hidden.shape[:2], np.int64) if mask is None else mask
    return embedding(POOLING[session.bundle.pooling](hidden[:, : real.shape[1]], real)[0], options)
