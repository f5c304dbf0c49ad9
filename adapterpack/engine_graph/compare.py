"""Compares outputs of graphs within a tolerance, and runs a long row piece by piece, so that its attention
scores fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..base import turns_by_length
from ..bundle import ADAPTER_POSITIONS, PAST, replaced_states
from ..errors import ParityError
from ..runtime import Session
from ..runtime.media import TOKEN_TYPES
from ..runtime.sessions.decoder import next_cache
from ..slots import DEFAULT
from ..tasks import Arrays

_MOST = 1 << 28
"""The most scores of one attention to have in memory at once: 1 GB in float32."""
_PIECE = 512


def takes_much(session: Session, rows: int, longest: int) -> bool:
    """Whether one pass over ``rows`` rows of ``longest`` tokens has more scores than fit into memory."""
    queries = session.config.get("num_attention_heads")
    caches = {name: value for name, value in session.inputs.items() if name.startswith(PAST)}
    states = replaced_states(session.inputs)
    if states and len(states) == len(caches):  # no layer has attention
        return False
    shapes = [value.shape for name, value in caches.items() if name not in states]
    heads = max((shape[1] for shape in shapes if len(shape) == 4), default=1)
    return rows * max(heads, queries if isinstance(queries, int) else 1) * longest * longest > _MOST


def reads_whole(session: Session) -> bool:
    """Whether rows cannot be read in pieces: their rotations depend on their lengths, or all tokens of a
    prompt see each other.
    """
    return turns_by_length(session.config) or TOKEN_TYPES in session.inputs


def in_pieces(session: Session, ids: np.ndarray, name: str | None, steps: int = 0) -> Iterator[Arrays]:
    """Yields the outputs of each piece of a row ``[1, tokens]``, run on the cache of all pieces before it;
    each of the last ``steps`` tokens is its own piece. A row that :func:`reads_whole` is one piece.
    """
    tokens = ids.shape[1]
    piece = tokens if reads_whole(session) else _PIECE
    acting = session.acting({"input_ids": ids, "attention_mask": np.ones_like(ids)}, [name])
    stops = [*range(piece, tokens - steps, piece), *range(tokens - steps, tokens + 1)]
    outputs = Arrays()
    start = 0
    for stop in stops:
        given = {ADAPTER_POSITIONS: acting[:, start:stop]} if ADAPTER_POSITIONS in session.inputs else {}
        mask = np.ones((1, stop), np.int64)
        outputs = session.run(
            {"input_ids": ids[:, start:stop], "attention_mask": mask, **given, **next_cache(outputs)}, name
        )
        yield outputs
        start = stop


def largest_difference(found: np.ndarray, expected: np.ndarray, dtype: str) -> float:
    """Returns the largest difference between rows. For types that round more than float32, returns the
    largest root mean square difference of a position: the more positions a row has, the further its worst
    number deviates by chance, without the graph being wrong.

    Example:
        >>> largest_difference(np.ones((2, 4)), np.array([[1.0] * 4, [1.0, 1.0, 1.0, 2.0]]), "float16")
        0.5
    """
    error = np.abs(found.astype(np.float64) - expected)
    if dtype != DEFAULT and error.ndim > 1:
        error = np.sqrt(np.mean(error**2, axis=-1))
    return float(np.max(error))


def require_close(
    what: str, error: float, largest: float, tolerance: float, where: str, remedy: str | None = None
) -> float:
    """Returns the error as a share of the ``largest`` output, or the error itself if that output is below 1.

    Raises:
        ParityError: the share exceeds the tolerance; the message begins with ``what``.
    """
    size = max(1.0, largest)
    if not error <= tolerance * size:  # "not <=" also rejects NaN
        raise ParityError(
            what, where=where, expected=f"at most {tolerance * size:.2g}", found=f"{error:.2g}", remedy=remedy
        )
    return error / size
