"""Multiplies by chains of matrices and fixed linear maps, and accumulates the results in place.

A low-rank branch ``up(down(x))`` is such a chain. The kernels of :mod:`.low_rank` add its values to a layer's
output, and its gradients to the input's gradient, without a temporary tensor of either size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from ...adapter_methods import BlockSums, Chain, Dense, NormalForm, Repeat

Fixed = tuple[bool, int, int]
"""A linear map without parameters: whether it sums (:class:`BlockSums`) or repeats (:class:`Repeat`), its
input width, and its output width.
"""
Steps = tuple[Fixed | None, ...]
"""The structure of a chain, in constants that a compiler can trace; None is a matrix ``[out, in]``, which
:data:`Matrices` holds.
"""
Matrices = Sequence[Tensor | None]
"""The matrix of each step, None for a fixed map."""


def chain_of(form: NormalForm) -> tuple[Steps, tuple[Tensor, ...]] | None:
    """Returns the branch of a form as a chain and its matrices; None if the form is not only a branch, or the
    branch has other parts.
    """
    if not form.is_parallel:
        return None
    steps: list[Fixed | None] = []
    matrices = []
    left = [form.up, form.down]
    while left:
        part = left.pop()
        if isinstance(part, Chain):
            left += [part.second, part.first]
        elif isinstance(part, Dense):
            steps.append(None)
            matrices.append(part.matrix)
        elif isinstance(part, BlockSums | Repeat):
            steps.append((isinstance(part, BlockSums), part.width, part.length))
        elif part is not None:
            return None
    return tuple(steps), tuple(matrices)


def by_step(steps: Steps, matrices: Sequence[Tensor]) -> Matrices:
    """Aligns the matrices with the steps that they belong to, with None at fixed maps."""
    left = iter(matrices)
    return [next(left) if step is None else None for step in steps]


def entering(steps: Steps, matrices: Matrices, x: Tensor) -> list[Tensor]:
    """Returns the input of each step, for an input ``x`` ``[rows, in]`` of the chain."""
    values = [x]
    for step, matrix in zip(steps[:-1], matrices[:-1], strict=True):
        last = values[-1]
        values.append(last @ matrix.T if step is None else _map(*step, last))  # type: ignore[union-attr]
    return values


def add(y: Tensor, step: Fixed | None, matrix: Tensor | None, value: Tensor) -> None:
    """Computes ``y += step(value)`` in place, for ``y`` ``[rows, out]`` and ``value`` ``[rows, in]``."""
    if step is None:
        y.addmm_(value, matrix.T)  # type: ignore[union-attr]
    else:
        _add_mapped(y, *step, value)


def add_back(y: Tensor, step: Fixed | None, matrix: Tensor | None, gradient: Tensor) -> None:
    """Computes ``y += gradient step`` in place, for ``y`` ``[rows, in]`` and ``gradient`` ``[rows, out]``:
    the backward pass of a step.
    """
    if step is None:
        y.addmm_(gradient, matrix)
    else:
        sums, width, length = step
        _add_mapped(y, not sums, length, width, gradient)


def back(step: Fixed | None, matrix: Tensor | None, gradient: Tensor) -> Tensor:
    """Returns ``gradient step``: from ``[rows, out]`` to ``[rows, in]``."""
    if step is None:
        return through(gradient, matrix)  # type: ignore[arg-type]
    sums, width, length = step
    return _map(not sums, length, width, gradient)


def through(gradient: Tensor, matrix: Tensor) -> Tensor:
    """Returns ``gradient matrix``, for ``[rows, out]`` and ``[out, in]``.

    A matrix of few columns is first copied to column-major order: CPU libraries take two to three times as
    long on short rows.
    """
    return (
        functional.linear(gradient, matrix.T.contiguous()) if matrix.shape[1] <= _FEW else gradient @ matrix
    )


def of_matrix(gradient: Tensor, value: Tensor) -> Tensor:
    """Returns ``gradient^T value``, the gradient of a matrix ``[out, in]``, for ``[rows, out]`` and ``[rows,
    in]``; few columns are treated as in :func:`through`.
    """
    return (value.T @ gradient).T.contiguous() if value.shape[1] <= _FEW else gradient.T @ value


_FEW = 32


def _map(sums: bool, width: int, length: int, value: Tensor) -> Tensor:
    """Applies a fixed map."""
    operator = BlockSums(width, length, value) if sums else Repeat(width, length, value)
    return operator.apply(value)


def _add_mapped(y: Tensor, sums: bool, width: int, length: int, value: Tensor) -> None:
    """Adds the result of a fixed map to ``y`` in place; repeating broadcasts into the sum, so that the
    repeated tensor never exists.
    """
    if sums or length < width:
        y += _map(sums, width, length, value)
        return
    times, rest = divmod(length, width)
    y[:, : length - rest].unflatten(1, (times, width)).add_(value[:, None, :])
    if rest:
        y[:, length - rest :] += value[:, :rest]
