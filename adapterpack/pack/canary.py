"""The canary: fixed inputs and the logits that they must give, so that a wrong base or an adapter without effect is seen on any runtime."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BaseMismatch, NonFinite, NothingToDo, ParityError
from .manifest import Canary

TOP = 8
LENGTHS = (9, 5)
RELATIVE_TOLERANCE = 2e-3
"""float32 on another runtime moves logits by about 1e-6 of their size; a wrong base moves them by its size."""
SMALLEST_TOLERANCE = 2e-5
"""Relative too: what a weak adapter's canary, which must still tell the adapter from the base, is never below."""


def inputs(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The token ids of the canary: the same pseudo-random rows for every model of that vocabulary."""
    rng = np.random.default_rng(20260101)
    return tuple(tuple(int(i) for i in rng.integers(1, vocab_size, length)) for length in LENGTHS)


def record(ids: tuple[tuple[int, ...], ...], base: list[np.ndarray], adapter: list[np.ndarray]) -> Canary:
    """A canary from the logits (``[vocab or labels]``, one array a row) without and with the adapter.

    Its tolerance is :data:`RELATIVE_TOLERANCE` of the largest logit, or a quarter of what the adapter changes where that is less.

    Raises:
        NonFinite: a logit is NaN or infinite.
    """
    if not all(np.isfinite(row).all() for row in [*base, *adapter]):
        raise NonFinite("the adapted model gives NaN or infinity", where="canary", remedy="lower the learning rate, or train in float32")
    size = max(float(np.abs(row).max()) for row in [*base, *adapter])
    top = tuple(map(_top, base))
    effect = _worst(top, adapter)
    tolerance = max(min(RELATIVE_TOLERANCE * size, effect / 4), SMALLEST_TOLERANCE * size, float(np.finfo(np.float32).tiny))
    return Canary(ids, top, tuple(map(_top, adapter)), tolerance)


def check(canary: Canary, base: list[np.ndarray] | None, adapter: list[np.ndarray], where: object) -> float:
    """The largest error of a replay, if it is within tolerance.

    Raises:
        BaseMismatch: without the adapter the logits already differ.
        NothingToDo: with the adapter the logits are those of the base alone.
        ParityError: neither explains it; the tolerance was exceeded, or there is a NaN.
    """
    error = _worst(canary.adapter, adapter)
    if error <= canary.tolerance:
        return error
    sides = {"expected": f"within {canary.tolerance:.2g}", "found": f"{error:.2g}"}
    if base is not None and not _worst(canary.base, base) <= canary.tolerance:
        raise BaseMismatch("the canary fails: this is not the base that the pack was made for", where=where, **sides)
    if _worst(canary.base, adapter) <= canary.tolerance:
        raise NothingToDo("the canary fails: the adapter has no effect", where=where, remedy="check that its sites were matched", **sides)
    raise ParityError("the canary fails: the adapted model gives other logits", where=where, **sides)


def _top(row: np.ndarray) -> dict[str, Any]:
    ids = np.argsort(-row, kind="stable")[:TOP]
    return {"ids": [int(i) for i in ids], "logits": [float(np.float32(row[i])) for i in ids]}


def _worst(expected: tuple[Any, ...], rows: list[np.ndarray]) -> float:
    """The largest error over the rows; NaN if there is one, which Python's own ``max`` would lose."""
    return float(np.max([_error(one, row) for one, row in zip(expected, rows, strict=True)]))


def _error(expected: Any, row: np.ndarray) -> float:
    if max(expected["ids"]) >= row.shape[0]:
        return float("inf")
    return float(np.abs(row[expected["ids"]] - np.asarray(expected["logits"])).max())
