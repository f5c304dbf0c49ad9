"""Finds bases that many changes of one site share: joint diagonalization, alternately for inputs and outputs,
in float64.

For changes ``D_i = B_i A_i`` the orthonormal ``U`` ``[m, k]`` and ``V`` ``[n, k]`` under which ``sum_i w_i^2
|D_i - U C_i V^T|^2`` is least, with ``C_i = U^T D_i V``. Each of the two follows from the other as leading
singular vectors. With ``k`` as large as all ranks together this is the core space of the changes, and exact.
Source: Compress then Serve, arXiv 2407.00066, section 3 (JD-Full).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..lowrank.factors import Factors
from ..lowrank.seeded_random import uniform

ROUNDS = 2
"""Of alternation: more change the fifth digit of the error."""
STEPS = 3
"""Of subspace iteration, for the first bases."""
SPARE = 8
"""Vectors more than are wanted, by which the iteration finds those sooner."""


class Bases(NamedTuple):
    """``up`` ``[m, k]`` and ``down`` ``[k, n]``, orthonormal, float64."""

    up: np.ndarray
    down: np.ndarray

    def core(self, change: Factors) -> np.ndarray:
        """The core ``[k, k]`` of a change: the nearest that these bases hold."""
        made: np.ndarray = (self.up.T @ change.B) @ (change.A @ self.down.T)
        return made


def joint_bases(changes: Sequence[Factors], weights: Sequence[float], rank: int) -> Bases:
    """The bases of ``rank`` in which the changes have the least error, each times its weight.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> changes = [Factors(rng.standard_normal((1, 7)), rng.standard_normal((9, 1))) for _ in range(2)]
        >>> bases = joint_bases(changes, [1.0, 1.0], 2)
        >>> np.allclose(bases.up @ bases.core(changes[1]) @ bases.down, changes[1].dense())
        True
    """
    wide = [
        Factors(change.A.astype(np.float64), weight * change.B.astype(np.float64))
        for change, weight in zip(changes, weights, strict=True)
    ]
    # whose columns have the Gram matrix D D^T
    lefts = [change.B @ np.linalg.qr(change.A.T)[1].T for change in wide]
    rights = [change.A.T @ np.linalg.qr(change.B)[1].T for change in wide]
    up, down = leading(lefts, rank), leading(rights, rank)
    together = sum(change.rank for change in wide)
    for _ in range(ROUNDS if rank < together else 0):
        up = leading([change.B @ (change.A @ down) for change in wide], rank, up)
        down = leading([change.A.T @ (change.B.T @ up) for change in wide], rank, down)
    return Bases(up, down.T)


def leading(parts: Sequence[np.ndarray], rank: int, near: np.ndarray | None = None) -> np.ndarray:
    """The leading left singular vectors ``[m, rank]`` of matrices ``[m, r_i]`` side by side, as a basis;
    others where there are fewer.

    Where there are many more, by subspace iteration: from ``near``, or from a sum of the columns with random
    weights. Source: Halko, Martinsson and Tropp 2011, algorithm 4.4.
    """
    columns = np.concatenate(parts, axis=1)
    m, count = columns.shape
    if count <= rank:
        exact: np.ndarray = np.linalg.qr(np.concatenate([columns, np.eye(m, rank)], axis=1))[0][:, :rank]
        return exact
    room = min(m, rank + SPARE)
    if near is None and room < m:
        found = columns @ (uniform(0, "joint bases", slice(0, count), room) - 0.5)
        for _ in range(STEPS):
            found = columns @ (columns.T @ np.linalg.qr(found)[0])
        near = np.linalg.qr(found)[0]
        vectors = np.linalg.eigh((inside := near.T @ columns) @ inside.T)[1]
        best: np.ndarray = near @ vectors[:, ::-1][:, :rank]
        return best
    if near is not None and room < m:
        closer: np.ndarray = np.linalg.qr(columns @ (columns.T @ near))[0]
        return closer
    whole: np.ndarray = np.linalg.eigh(columns @ columns.T)[1][:, ::-1][:, :rank]
    return whole


def group(similarity: np.ndarray, count: int) -> np.ndarray:
    """The cluster of each of ``T`` changes, by their inner products ``[T, T]`` at norm 1: kernel k-means from
    far apart beginnings.

    Example:
        >>> group(np.kron(np.eye(2), np.ones((2, 2))), 2).tolist()
        [0, 0, 1, 1]
    """
    chosen = [0]
    while len(chosen) < min(count, len(similarity)):
        chosen.append(int(np.argmin(similarity[chosen].max(axis=0))))
    clusters: np.ndarray = np.argmax(similarity[chosen], axis=0)
    for _ in range(20):
        members = np.eye(count)[clusters]
        sizes = np.maximum(members.sum(axis=0), 1)
        means = similarity @ members / sizes
        spread = np.einsum("tc,tc->c", members, means) / sizes
        new = np.argmax(2 * means - spread, axis=1)
        if np.array_equal(new, clusters):
            break
        clusters = new
    return clusters
