"""Reads MatMulNBits weights, and rounds changed values to codes of the same width.

ONNX Runtime, contrib operator com.microsoft::MatMulNBits: ``W[n, k] = (q[n, k] - zero[n, block]) * scale[n,
block]``, ``q`` unsigned, packed from the low bits up, one blob for each block of ``block_size`` columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import Unsupported
from .graph_file import GraphFile, attribute, require_place

if TYPE_CHECKING:
    import onnx

_WEIGHT = 1
_SCALES = 2
_ZEROS = 3
_ORDER = 4
_BIAS = 5
_WIDTHS = (2, 4, 8)


class BlockGrid(NamedTuple):
    """The scales and zero points of rows of a quantized matrix ``[rows, blocks]``, in float32; ``symmetric``
    grids store no zero points.
    """

    scale: np.ndarray
    zero: np.ndarray
    symmetric: bool


class NBits(NamedTuple):
    """A MatMulNBits node and its initializers by name; the matrix is ``[rows, columns]`` as in a linear
    layer.
    """

    node: Any
    rows: int
    columns: int
    bits: int
    block: int
    weight: str
    scales: str
    zeros: str | None
    bias: str | None

    @property
    def blocks(self) -> int:
        """The number of blocks in a row."""
        return -(-self.columns // self.block)


def quantized_nodes(graph: GraphFile) -> list[NBits]:
    """Returns every MatMulNBits node with a constant weight, in order."""
    return [
        weight
        for node in graph.model.graph.node
        if node.op_type == "MatMulNBits" and (weight := _read(graph, node)) is not None
    ]


def require_plain(graph: GraphFile, quantized: NBits) -> None:
    """Checks that single rows of a node's weight can be read and written.

    Raises:
        Unsupported: its columns are reordered, its zero points are fractions, or its weight is prepacked for
            one kind of machine.
    """
    extra = quantized.node.input[_ORDER] if len(quantized.node.input) > _ORDER else ""
    zeros = None if quantized.zeros is None else require_place(graph, quantized.zeros).dtype
    problem = (
        "columns reordered by g_idx"
        if extra
        else "a weight packed for one kind of machine"
        if attribute(quantized.node, "weight_prepacked", 0)
        else "zero points that are no integers"
        if zeros not in (None, np.dtype(np.uint8))
        else f"{quantized.bits} bits"
        if quantized.bits not in _WIDTHS
        else None
    )
    if problem:
        raise Unsupported(
            "this quantized weight cannot be folded into",
            where=f"{graph.path}, {quantized.node.name}",
            found=problem,
            remedy="fold into the float graph, and quantize the result",
        )


def _read(graph: GraphFile, node: onnx.NodeProto) -> NBits | None:
    names = [*node.input, "", "", "", "", ""]
    if names[_WEIGHT] not in graph.stored or names[_SCALES] not in graph.stored:
        return None
    return NBits(
        node,
        attribute(node, "N", 0),
        attribute(node, "K", 0),
        attribute(node, "bits", 4),
        attribute(node, "block_size", 0),
        names[_WEIGHT],
        names[_SCALES],
        names[_ZEROS] or None,
        names[_BIAS] or None,
    )


def grid_of(graph: GraphFile, quantized: NBits, rows: slice) -> BlockGrid:
    """Returns the grid of some rows."""
    scales = graph.array(quantized.scales).reshape(quantized.rows, quantized.blocks)[rows]
    zeros = None
    if quantized.zeros is not None:
        zeros = graph.array(quantized.zeros).reshape(quantized.rows, -1)[rows]
    return stored_grid(quantized.bits, scales, zeros)


def stored_grid(bits: int, scales: np.ndarray, zeros: np.ndarray | None) -> BlockGrid:
    """Returns the grid of rows with scales ``[rows, blocks]`` and zero points, packed or fractional (as from
    HQQ), as they are stored; without these it is symmetric.
    """
    scale = scales.astype(np.float32)
    if zeros is None:
        return BlockGrid(scale, np.full_like(scale, 1 << (bits - 1)), True)
    whole = unpack(zeros, bits)[:, : scale.shape[1]] if zeros.dtype == np.uint8 else zeros
    return BlockGrid(scale, whole.astype(np.float32), False)


def dequantize(graph: GraphFile, quantized: NBits, rows: slice, first_block_only: bool = False) -> np.ndarray:
    """Returns some rows ``[count, columns]`` in float32; with ``first_block_only`` only their first block of
    columns.
    """
    packed = graph.array(quantized.weight).reshape(quantized.rows, quantized.blocks, -1)[rows]
    grid = grid_of(graph, quantized, rows)
    if first_block_only:
        packed = packed[:, :1]
        grid = BlockGrid(grid.scale[:, :1], grid.zero[:, :1], grid.symmetric)
    q = unpack(packed, quantized.bits).astype(np.float32)
    return values(q, grid).reshape(len(packed), -1)[:, : quantized.columns]


def values(q: np.ndarray, grid: BlockGrid) -> np.ndarray:
    """Returns ``(q - zero) * scale`` for ``q`` ``[rows, blocks, block]``."""
    wide: np.ndarray = (q - grid.zero[..., None]) * grid.scale[..., None]
    return wide


def split_blocks(block: int, rows: np.ndarray) -> np.ndarray:
    """Reshapes ``[rows, columns]`` to ``[rows, blocks, block]``, padded with zeros."""
    blocks = -(-rows.shape[1] // block)
    padded = np.zeros((len(rows), blocks * block), np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(len(rows), blocks, block)


class Rounded(NamedTuple):
    """Rounded rows: the stored arrays, and the dequantized values ``[rows, columns]``."""

    packed: np.ndarray
    grid: BlockGrid
    values: np.ndarray


def requantize(quantized: NBits, rows: np.ndarray, old: BlockGrid, scale_dtype: np.dtype) -> Rounded:
    """Rounds ``rows`` to nearest, each block on its ``old`` grid or on a fresh grid from its extremes,
    whichever has the smaller error.

    Blocks that did not change keep their bytes: their old grid errs least, or they were best on it when it
    was chosen.
    """
    x = split_blocks(quantized.block, rows)
    fresh = fresh_grid(x, quantized.bits, old.symmetric, scale_dtype)
    candidates = []
    for grid in (old, fresh):
        q = nearest(x, grid, quantized.bits)
        candidates.append((grid, q, np.sum(np.square(values(q, grid) - x), axis=-1)))
    (_, q_old, error_old), (_, q_new, error_new) = candidates
    # on a tie the old grid wins, so that unchanged blocks keep their bytes
    better = error_new < error_old
    q = np.where(better[..., None], q_new, q_old)
    grid = BlockGrid(
        np.where(better, fresh.scale, old.scale), np.where(better, fresh.zero, old.zero), old.symmetric
    )
    return Rounded(
        pack_codes(q.astype(np.uint8), quantized.bits),
        grid,
        values(q, grid).reshape(len(rows), -1)[:, : quantized.columns],
    )


def pack_zeros(bits: int, grid: BlockGrid) -> np.ndarray:
    """Packs the zero points of some rows for storage: ``[rows, bytes]``."""
    per_byte = 8 // bits
    blocks = grid.zero.shape[1]
    zero = np.zeros((len(grid.zero), -(-blocks // per_byte) * per_byte), np.uint8)
    zero[:, :blocks] = grid.zero.astype(np.uint8)
    return pack_codes(zero, bits)


def nearest(x: np.ndarray, grid: BlockGrid, bits: int) -> np.ndarray:
    """Returns the codes nearest to ``x`` ``[rows, blocks, block]`` on a grid, as integers in a float
    array.
    """
    # a block of zeros has scale 0
    scale = np.where(grid.scale == 0, 1, grid.scale)[..., None]
    q: np.ndarray = np.clip(np.rint(x / scale + grid.zero[..., None]), 0, (1 << bits) - 1)
    return q


def fresh_grid(x: np.ndarray, bits: int, symmetric: bool, dtype: np.dtype) -> BlockGrid:
    """Returns a grid that spans the extremes of each block, zero included, as ONNX Runtime's own rounding
    does.
    """
    top = (1 << bits) - 1
    if symmetric:
        middle = 1 << (bits - 1)
        extreme = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
        # the extreme becomes code 0, since the codes reach one step further below zero than above
        scale = (extreme / -middle).astype(dtype).astype(np.float32)
        return BlockGrid(scale, np.full_like(scale, middle), True)
    low = np.minimum(x.min(-1), 0)
    high = np.maximum(x.max(-1), 0)
    scale = ((high - low) / top).astype(dtype).astype(np.float32)
    zero = np.clip(np.rint(-low / np.where(scale == 0, 1, scale)), 0, top)
    return BlockGrid(scale, zero.astype(np.float32), False)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks unsigned numbers from bytes, low bits first, along the last axis."""
    wide = np.empty((*packed.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):  # broadcast along so short an axis, numpy takes several times as long
        np.bitwise_and(packed >> np.uint8(place * bits), np.uint8((1 << bits) - 1), out=wide[..., place])
    return wide.reshape(*packed.shape[:-1], -1)


def pack_codes(q: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes into as few bytes as possible, low bits first, along the last axis."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    split = q.reshape(*q.shape[:-1], -1, len(shifts))
    packed: np.ndarray = np.bitwise_or.reduce(split << shifts, axis=-1)
    return packed
