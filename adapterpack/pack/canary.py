"""The canary: fixed inputs and the logits that they must give, so that a wrong base or an adapter without effect is seen on any runtime."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BaseMismatch, NothingToDo, ParityError
from .manifest import Canary

TOP = 8
LENGTHS = (9, 5)
RELATIVE_TOLERANCE = 2e-3
"""float32 on another runtime moves logits by about 1e-6 of their size; a wrong base moves them by its size."""


def inputs(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The token ids of the canary: the same pseudo-random rows for every model of that vocabulary."""
    rng = np.random.default_rng(20260101)
    return tuple(tuple(int(i) for i in rng.integers(1, vocab_size, length)) for length in LENGTHS)


def record(ids: tuple[tuple[int, ...], ...], base: list[np.ndarray], adapter: list[np.ndarray]) -> Canary:
    """A canary from the logits (``[vocab or labels]``, one array a row) without and with the adapter."""
    size = max(float(np.abs(row).max()) for row in [*base, *adapter])
    return Canary(ids, tuple(map(_top, base)), tuple(map(_top, adapter)), max(1e-4, RELATIVE_TOLERANCE * size))


def check(canary: Canary, base: list[np.ndarray] | None, adapter: list[np.ndarray], where: object) -> float:
    """The largest error of a replay, if it is within tolerance.

    Raises:
        BaseMismatch: without the adapter the logits already differ.
        NothingToDo: with the adapter the logits are those of the base alone.
        ParityError: neither explains it; the tolerance was exceeded.
    """
    error = max(map(_error, canary.adapter, adapter))
    if error <= canary.tolerance:
        return error
    sides = {"expected": f"within {canary.tolerance:.2g}", "found": f"{error:.2g}"}
    if base is not None and max(map(_error, canary.base, base)) > canary.tolerance:
        raise BaseMismatch("the canary fails: this is not the base that the pack was made for", where=where, **sides)
    if max(map(_error, canary.base, adapter)) <= canary.tolerance:
        raise NothingToDo("the canary fails: the adapter has no effect", where=where, remedy="check that its sites were matched", **sides)
    raise ParityError("the canary fails: the adapted model gives other logits", where=where, **sides)


def _top(row: np.ndarray) -> dict[str, Any]:
    ids = np.argsort(-row, kind="stable")[:TOP]
    return {"ids": [int(i) for i in ids], "logits": [float(np.float32(row[i])) for i in ids]}


def _error(expected: Any, row: np.ndarray) -> float:
    if max(expected["ids"]) >= row.shape[0]:
        return float("inf")
    return float(np.abs(row[expected["ids"]] - np.asarray(expected["logits"])).max())
