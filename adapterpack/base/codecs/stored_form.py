"""Converts stored codes of a weight to the two forms that graph operators on codes support, without
requantizing.

Codes packed in words, in the format's own blocks or by permuted inputs become codes in row order. Codes of 3,
5 or 6 bits use the next wider container. A weight's form follows from its grid alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...errors import Unsupported
from .base import Parts, Weight
from .grid import CodeSpan, QuantizedRows
from .row_order import as_model

BLOCKS = (256, 128, 64, 32, 16)
"""How many codes may share a scale in an operator."""
WIDTHS = (2, 4, 8)
"""How many bits a code may have in an operator."""


class Blocks(NamedTuple):
    """A weight ``[out, in]`` as ``(q - zero) * scale + minimum``, with one of each per ``block`` codes of a
    row.

    ``q`` are integers from zero, uint8 ``[out, in]``, of ``bits`` bits. ``scale``, ``zero`` and the optional
    ``minimum`` are float32 ``[out, ceil(in / block)]``; zero points are whole numbers. With an ``order``
    ``[in]``, column ``i`` of ``q`` belongs to input ``order[i]``.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    block: int
    bits: int
    minimum: np.ndarray | None = None
    order: np.ndarray | None = None

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is in the middle of the range of codes."""
        return bool((self.zero == 1 << self.bits - 1).all())

    def values(self) -> np.ndarray:
        """Returns the weight ``[out, in]`` as an operator computes it in float32."""
        numbers: np.ndarray = (self.q - self._by_column(self.zero)) * self._by_column(self.scale)
        if self.minimum is not None:
            numbers += self._by_column(self.minimum)
        if self.order is None:
            return numbers
        unordered = np.empty_like(numbers)
        unordered[:, self.order] = numbers
        return unordered

    def _by_column(self, by_block: np.ndarray) -> np.ndarray:
        return np.repeat(by_block, self.block, axis=1)[:, : self.q.shape[1]]


class Table(NamedTuple):
    """A weight ``[out, in]`` as ``levels[q] * scale``, with a scale per ``block`` codes of the weight in row
    order.

    ``q`` is uint8 ``[out, in]``, ``levels`` float32 ``[16]``, ``scale`` float32 ``[ceil(out * in / block)]``.
    """

    q: np.ndarray
    scale: np.ndarray
    block: int
    levels: np.ndarray

    def values(self) -> np.ndarray:
        """Returns the weight ``[out, in]`` as an operator computes it in float32."""
        numbers: np.ndarray = self.levels[self.q] * np.repeat(self.scale, self.block)[: self.q.size].reshape(
            self.q.shape
        )
        return numbers


def stored_form(weight: Weight, parts: Parts, row_order: np.ndarray | None = None) -> Blocks | Table:
    """Returns the form of a weight, with rows in the model's order; see
    :func:`~adapterpack.base.codecs.row_order.as_model`.

    Raises:
        Unsupported: no operator supports such codes; ``what`` says why.
    """
    levels = weight.grid.levels
    stored = weight.unpack(parts, slice(0, weight.shape[0]))
    if not np.isfinite(stored.scale).all():
        raise Unsupported("scales that are no numbers", where=weight.name)
    if levels.table is not None and row_order is None:
        return _table(weight, stored, levels.table)
    if levels.span is None:
        raise Unsupported("no operator multiplies with such codes", where=weight.name)
    if row_order is not None:
        zero = None if stored.zero is None else as_model(stored.zero, row_order)
        stored = QuantizedRows(as_model(stored.codes, row_order), as_model(stored.scale, row_order), zero)
    return _blocks(weight, stored, levels.span)


def side_by_side(forms: list[Blocks | Table]) -> Blocks | Table:
    """Returns one form of several weights whose rows are concatenated, with the widest codes and the smallest
    blocks among them.

    Raises:
        Unsupported: they have no form in common; ``what`` says why.

    Example:
        >>> zero = np.zeros((1, 1), np.float32)
        >>> four = Blocks(np.zeros((1, 32), np.uint8), zero + 1, zero + 8, 32, 4)
        >>> both = side_by_side([four, four._replace(bits=8, zero=zero + 128)])
        >>> both.bits, both.q[:, 0].tolist(), both.zero.tolist()
        (8, [120, 0], [[128.0], [128.0]])
    """
    if len(forms) == 1:
        return forms[0]
    blocks = [form for form in forms if isinstance(form, Blocks)]
    if len(blocks) == len(forms):
        return _join(blocks)
    if blocks:
        raise Unsupported("rows of codes of two kinds side by side")
    tables = [form for form in forms if isinstance(form, Table)]
    block = min(form.block for form in tables)
    if any(form.q.size % block or not np.array_equal(form.levels, tables[0].levels) for form in tables):
        raise Unsupported("blocks that would begin in the rows of one weight and end in those of another")
    scales = [np.repeat(form.scale, form.block // block)[: form.q.size // block] for form in tables]
    return Table(np.concatenate([form.q for form in tables]), np.concatenate(scales), block, tables[0].levels)


def _table(weight: Weight, stored: QuantizedRows, levels: np.ndarray) -> Table:
    """Returns the table form of a weight."""
    groups, (rows, columns) = weight.grid.groups, weight.shape
    by_rows = stored.codes.shape == weight.shape and columns % groups.width
    if groups.members is not None or groups.height > 1 or by_rows or levels.shape != (16,):
        raise Unsupported("a table whose scales are not those of neighbours", where=weight.name)
    block = next(
        (
            block
            for block in BLOCKS
            if groups.width == block or (block == BLOCKS[0] and groups.width % block == 0)
        ),
        None,
    )
    if block is None:
        raise Unsupported(f"{groups.width} codes share a scale, which no operator knows", where=weight.name)
    scale = np.repeat(stored.scale.reshape(-1), groups.width // block)[: -(-rows * columns // block)]
    return Table(
        stored.codes.reshape(-1)[: rows * columns].reshape(rows, columns),
        scale,
        block,
        levels.astype(np.float32),
    )


def _blocks(weight: Weight, stored: QuantizedRows, span: CodeSpan) -> Blocks:
    """Returns the block form of a weight."""
    grid = weight.grid
    columns = weight.shape[1]
    bits, offset = _container(span, weight)
    q = (stored.codes.astype(np.int16) + offset).astype(np.uint8)
    order = None
    members = grid.groups.members
    if members is not None:
        order = np.argsort(members, kind="stable")
        if not np.array_equal(members[order], np.arange(columns) // grid.groups.width):
            raise Unsupported("groups of unequal sizes", where=weight.name)
        q = q[:, order]
    block = _block(grid.groups.width, columns, bits, weight)
    group = np.arange(-(-columns // block)) * block // grid.groups.width

    def spread(by_group: np.ndarray) -> np.ndarray:
        by_row = np.repeat(by_group, grid.groups.height, axis=0)[: len(q)]
        return np.ascontiguousarray(by_row[:, group], dtype=np.float32)

    scale = spread(stored.scale) * np.float32(span.unit)
    minimum = spread(stored.zero) if stored.zero is not None and grid.shifted else None
    zero = np.full_like(scale, offset)
    if stored.zero is not None and not grid.shifted:
        zero = spread(stored.zero) + np.float32(offset)
        if not ((zero == np.rint(zero)) & (zero >= 0) & (zero < 1 << bits)).all():
            raise Unsupported("zero points that are no codes", where=weight.name)
    return Blocks(q, scale, zero, block, bits, minimum, order)


def _container(span: CodeSpan, weight: Weight) -> tuple[int, int]:
    """Returns the fewest bits that hold the codes, and the offset that makes codes count from zero."""
    for bits in WIDTHS:
        offset = 1 << bits - 1 if span.low < 0 else 0
        if span.low + offset >= 0 and span.high + offset < 1 << bits:
            return bits, offset
    raise Unsupported("codes of more than eight bits", where=weight.name)


def _block(width: int, columns: int, bits: int, weight: Weight) -> int:
    """Returns the largest block size of the operators that divides a group of ``width`` codes; for one group
    per row, the size that takes the fewest bytes.
    """
    # With one scale per row any block size is exact: choose the fewest bytes, including padding and the 40
    # bits of a block's scale and zero point.
    if width >= columns:
        return min(BLOCKS, key=lambda block: -(-columns // block) * (block * bits + 40))
    fitting = next((block for block in BLOCKS if width % block == 0), None)
    if fitting is None:
        raise Unsupported(
            f"{width} codes of a row share a scale, and operators have blocks of {BLOCKS[-1]}, "
            f"{BLOCKS[-2]} ... codes",
            where=weight.name,
        )
    return fitting


def _join(forms: list[Blocks]) -> Blocks:
    """Concatenates weights in block form."""
    bits = max(form.bits for form in forms)
    block = min(form.block for form in forms)
    columns = forms[0].q.shape[1]
    orders = [np.arange(columns) if form.order is None else form.order for form in forms]
    if any(not np.array_equal(orders[0], order) for order in orders):
        raise Unsupported("inputs in another order for each of the weights side by side")
    count = -(-columns // block)

    def finer(form: Blocks, numbers: np.ndarray) -> np.ndarray:
        return np.repeat(numbers, form.block // block, axis=1)[:, :count]

    minimum = None
    if any(form.minimum is not None for form in forms):
        zeros = [np.zeros_like(form.scale) if form.minimum is None else form.minimum for form in forms]
        minimum = np.concatenate([finer(form, least) for form, least in zip(forms, zeros, strict=True)])
    moves = [
        (1 << bits - 1) - (1 << form.bits - 1) if form.symmetric and form.bits < bits else 0 for form in forms
    ]
    return Blocks(
        np.concatenate([form.q + np.uint8(move) for form, move in zip(forms, moves, strict=True)]),
        np.concatenate([finer(form, form.scale) for form in forms]),
        np.concatenate(
            [finer(form, form.zero) + np.float32(move) for form, move in zip(forms, moves, strict=True)]
        ),
        block,
        bits,
        minimum,
        forms[0].order,
    )
