"""Finds bases that many changes of one site share: joint diagonalization that alternates between inputs and
outputs, in float64.

For changes ``D_i = B_i A_i`` the orthonormal ``U`` ``[m, k]`` and ``V`` ``[n, k]`` under which ``sum_i w_i^2
|D_i - U C_i V^T|^2`` is least, with ``C_i = U^T D_i V``. Each of the two follows from the other as leading
singular vectors. With ``k`` as large as all ranks together this is the core space of the changes, and exact.
Source: Compress then Serve, arXiv 2407.00066, section 3 (JD-Full).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..lowrank import Factors
from ..lowrank.seeded_random import uniform

ROUNDS = 2
"""Alternations: more of them change only the fifth digit of the error."""
STEPS = 3
"""Steps of subspace iteration for the first bases."""
SPARE = 8
"""Vectors beyond the requested rank, with which the iteration converges faster."""


class Bases(NamedTuple):
    """``up`` ``[m, k]`` and ``down`` ``[k, n]``, orthonormal, float64."""

    up: np.ndarray
    down: np.ndarray

    def core(self, change: Factors) -> np.ndarray:
        """Returns the core ``[k, k]`` of a change: its best approximation in these bases."""
        made: np.ndarray = (self.up.T @ change.B) @ (change.A @ self.down.T)
        return made


def joint_bases(changes: Sequence[Factors], weights: Sequence[float], rank: int) -> Bases:
    """Returns the bases of ``rank`` that represent the changes, each times its weight, with the least error.

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
    # replaces each change D by a narrow matrix of the same Gram matrix D D^T
    lefts = [change.B @ np.linalg.qr(change.A.T)[1].T for change in wide]
    rights = [change.A.T @ np.linalg.qr(change.B)[1].T for change in wide]
    up, down = leading(lefts, rank), leading(rights, rank)
    together = sum(change.rank for change in wide)
    for _ in range(ROUNDS if rank < together else 0):
        up = leading([change.B @ (change.A @ down) for change in wide], rank, up)
        down = leading([change.A.T @ (change.B.T @ up) for change in wide], rank, down)
    return Bases(up, down.T)


def leading(parts: Sequence[np.ndarray], rank: int, near: np.ndarray | None = None) -> np.ndarray:
    """Returns the leading left singular vectors ``[m, rank]`` of matrices ``[m, r_i]`` side by side as an
    orthonormal basis, filled up with other vectors if there are fewer.

    Uses subspace iteration where there are many more columns: from ``near``, or from a sum of the columns
    with random weights. Source: Halko, Martinsson and Tropp 2011, algorithm 4.4.
    """
    columns = np.concatenate(parts, axis=1)
    m, count = columns.shape
    if count <= rank:
        return np.linalg.qr(np.concatenate([columns, np.eye(m, rank)], axis=1))[0][:, :rank]
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
        return np.linalg.qr(columns @ (columns.T @ near))[0]
    return np.linalg.eigh(columns @ columns.T)[1][:, ::-1][:, :rank]


def group(similarity: np.ndarray, count: int) -> np.ndarray:
    """Assigns each of ``T`` changes to a cluster by their inner products ``[T, T]`` at norm 1: kernel k-means
    from starting points far apart.

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
