"""Computes chains of matrices and fixed maps: values added in place to an output, and gradients added in
place to an input's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from ...adapter_methods import BlockSums, Chain, Dense, NormalForm, Repeat

Fixed = tuple[bool, int, int]
"""A map without numbers of its own: whether it sums (:class:`BlockSums`) or repeats (:class:`Repeat`), from
which width, to which.
"""
Steps = tuple[Fixed | None, ...]
"""A chain, as constants that a compiler can look at; None is a matrix ``[out, in]``, which :data:`Matrices`
holds.
"""
Matrices = Sequence[torch.Tensor | None]
"""What belongs to each step: None for a fixed one."""


def chain_of(form: NormalForm) -> tuple[Steps, tuple[torch.Tensor, ...]] | None:
    """``up down`` as a chain and its matrices; None where it is none, or the form does more than that."""
    if not form.is_parallel:
        return None
    steps: list[Fixed | None] = []
    matrices: list[torch.Tensor] = []
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


def by_step(steps: Steps, matrices: Sequence[torch.Tensor]) -> Matrices:
    """The matrices at their steps."""
    left = iter(matrices)
    return [next(left) if step is None else None for step in steps]


def entering(steps: Steps, matrices: Matrices, x: torch.Tensor) -> list[torch.Tensor]:
    """What enters each step where ``x`` ``[rows, in]`` enters the first."""
    values = [x]
    for step, matrix in zip(steps[:-1], matrices[:-1], strict=True):
        last: Any = values[-1]
        values.append(last @ matrix.T if step is None else _map(*step, last))  # type: ignore[union-attr]
    return values


def add(y: torch.Tensor, step: Fixed | None, matrix: torch.Tensor | None, value: torch.Tensor) -> None:
    """``y += step(value)``: ``[rows, out]`` and ``[rows, in]``, in place."""
    if step is None:
        y.addmm_(value, matrix.T)  # type: ignore[union-attr]
    else:
        _add_mapped(y, *step, value)


def add_back(
    y: torch.Tensor, step: Fixed | None, matrix: torch.Tensor | None, gradient: torch.Tensor
) -> None:
    """``y += gradient step``: ``[rows, in]`` and ``[rows, out]``, in place."""
    if step is None:
        y.addmm_(gradient, matrix)
    else:
        sums, width, length = step
        _add_mapped(y, not sums, length, width, gradient)


def back(step: Fixed | None, matrix: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    """``gradient step``: ``[rows, out]`` to ``[rows, in]``."""
    if step is None:
        return through(gradient, matrix)  # type: ignore[arg-type]
    sums, width, length = step
    return _map(not sums, length, width, gradient)


def through(gradient: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``gradient matrix``: ``[rows, out]`` and ``[out, in]``.

    A matrix of a few columns is laid out column by column first: CPU libraries take two to three times as
    long along short rows.
    """
    return (
        functional.linear(gradient, matrix.T.contiguous()) if matrix.shape[1] <= _FEW else gradient @ matrix
    )


def of_matrix(gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``gradient^T value``, a matrix's gradient: ``[rows, out]`` and ``[rows, in]`` to ``[out, in]``; few
    columns as in :func:`through`.
    """
    return (value.T @ gradient).T.contiguous() if value.shape[1] <= _FEW else gradient.T @ value


_FEW = 32


def _map(sums: bool, width: int, length: int, value: torch.Tensor) -> torch.Tensor:
    operator = BlockSums(width, length, value) if sums else Repeat(width, length, value)
    result: torch.Tensor = operator.apply(value)
    return result


def _add_mapped(y: torch.Tensor, sums: bool, width: int, length: int, value: torch.Tensor) -> None:
    """Repeating is broadcast into the sum: what is repeated is never a tensor."""
    if sums or length < width:
        y += _map(sums, width, length, value)
        return
    times, rest = divmod(length, width)
    y[:, : length - rest].unflatten(1, (times, width)).add_(value[:, None, :])
    if rest:
        y[:, length - rest :] += value[:, :rest]
