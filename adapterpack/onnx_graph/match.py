"""Finds the tensors of a checkpoint in a graph that any tool exported, by content, since exporters choose
names freely.

A graph computes its model with the checkpoint's tensors wherever it stores them, whatever nodes read them. So
a merge needs to know only the places of a tensor, and a tensor that cannot be found completely is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import LAYOUTS, to_matrix
from ..base import Checkpoint
from ..errors import SiteNotFound, Unsupported
from . import hints
from .graph_file import FLOATS, GraphFile
from .pieces import MatrixView, WeightPiece, coverage, views
from .quantized import match_codes
from .rows import cast, find_runs

_Key = tuple[str, int]


class TensorPlace(NamedTuple):
    """Where a graph stores a tensor of a checkpoint: the pieces of each of its matrices (several in a stack),
    and the nodes that read them.
    """

    tensor: str
    kind: str
    pieces: tuple[tuple[WeightPiece, ...], ...]
    nodes: tuple[str, ...]

    @property
    def all_pieces(self) -> list[WeightPiece]:
        """The pieces of all of its matrices."""
        return [piece for pieces in self.pieces for piece in pieces]

    @property
    def initializers(self) -> list[str]:
        """The initializers that store it, each once."""
        return list(dict.fromkeys(piece.initializer for piece in self.all_pieces))


def match(graph: GraphFile, base: Checkpoint, wanted: Mapping[str, str]) -> dict[str, TensorPlace]:
    """Returns the places of the tensors ``wanted`` (name -> kind of its site) in ``graph``, in that order.

    It recognizes a tensor that is unchanged, transposed, packed with others along either axis, split, cast to
    another floating dtype, or rounded to MatMulNBits. Bytes decide; names in the graph only distinguish
    tensors that are equal in the checkpoint.

    Raises:
        SiteNotFound: the graph does not hold these tensors completely.
        Unsupported: two tensors of the checkpoint are equal, and nothing shows which of them an initializer
            is.

    Example:
        >>> match(GraphFile("model.onnx"), Checkpoint("MiniLM"),
        ...     {"encoder.layer.0.output.dense.weight": "linear"})  # doctest: +SKIP
    """
    stacks = {name: _matrices(base, name, kind) for name, kind in wanted.items()}
    matrices = {
        (name, number): matrix for name, stack in stacks.items() for number, matrix in enumerate(stack)
    }
    pieces_of = _pieces(graph, matrices)
    missing = []
    places = {}
    for name, kind in wanted.items():
        own = _twins(base, name)
        by_matrix = [
            _keep_own(graph, name, own, pieces_of.get((name, number), []))
            for number in range(len(stacks[name]))
        ]
        if any(
            coverage(pieces, matrix.shape) < matrix.size
            for pieces, matrix in zip(by_matrix, stacks[name], strict=True)
        ):
            missing.append(name)
        places[name] = TensorPlace(
            name, kind, tuple(tuple(pieces) for pieces in by_matrix), _readers(graph, by_matrix)
        )
    _require(graph, base, missing)
    return places


class Unmatched(NamedTuple):
    """The matrices of a checkpoint that a graph does not contain completely, and the shapes of the graph's
    float matrices that match no matrix.
    """

    tensors: frozenset[str]
    shapes: frozenset[tuple[int, ...]]


def match_all(graphs: Iterable[GraphFile], base: Checkpoint) -> Iterator[Unmatched]:
    """Searches each of these graphs for every matrix of a checkpoint, by its bytes as :func:`match` does,
    wherever and however often it is stored.
    """
    names = [name for name, info in base.tensors.items() if len(info.shape) == 2]
    matrices = {(name, 0): to_matrix("linear", base.view(name)) for name in names}
    for graph in graphs:
        pieces_of = _pieces(graph, matrices)
        missing = {
            key[0]
            for key, matrix in matrices.items()
            if coverage(pieces_of.get(key, []), matrix.shape) < matrix.size
        }
        used = {piece.initializer for pieces in pieces_of.values() for piece in pieces}
        shapes = {
            place.shape
            for name, place in graph.stored.items()
            if name not in used and len(place.shape) == 2 and place.dtype in FLOATS
        }
        yield Unmatched(frozenset(missing), frozenset(shapes))


def match_bias(graph: GraphFile, base: Checkpoint, bias: str, place: TensorPlace | None) -> TensorPlace:
    """Returns the place of the bias of a weight whose ``place`` is known: among equal vectors, the one that
    is read soonest after the weight.

    Raises:
        SiteNotFound: the graph does not hold it; an exporter leaves out a bias that is all zero.
        Unsupported: nothing shows which of several equal vectors it is.
    """
    vector = base.read(bias)
    pieces = find_vector(graph, vector)
    nearest = (
        []
        if place is None
        else hints.nearest_to(graph, place.initializers, [piece.initializer for piece in pieces])
    )
    kept = [piece for piece in pieces if piece.initializer in nearest] if nearest else pieces
    kept = _keep_own(graph, bias, _twins(base, bias), kept)
    if coverage(kept, (len(vector), 1)) < len(vector):
        _require(graph, base, [bias])
    if len({(piece.start, piece.stop) for piece in kept}) < len(kept) and not nearest:
        raise Unsupported(
            "several initializers hold these numbers, and nothing tells which is this bias",
            where=f"{graph.path}, {bias}",
            found=", ".join(piece.initializer for piece in kept[:5]),
            remedy="fold into the checkpoint, and export again",
        )
    return TensorPlace(bias, "norm", (tuple(kept),), _readers(graph, [kept]))


def _matrices(base: Checkpoint, name: str, kind: str) -> list[np.ndarray]:
    matrix = to_matrix(kind, base.view(name))
    return list(matrix) if LAYOUTS[kind].stacked else [matrix]


def _pieces(graph: GraphFile, matrices: Mapping[_Key, np.ndarray]) -> dict[_Key, list[WeightPiece]]:
    pieces_of = defaultdict[_Key, list[WeightPiece]](list)
    for key, matrix in matrices.items():
        if 1 in matrix.shape:
            column = find_vector(graph, np.ascontiguousarray(matrix).reshape(-1))
            upright = matrix.shape[1] == 1
            pieces_of[key] = (
                column
                if upright
                else [piece._replace(axis=1, transposed=not piece.transposed) for piece in column]
            )
    wide = {key: matrix for key, matrix in matrices.items() if 1 not in matrix.shape}
    stored = list(views(graph))
    for key, piece in _float_pieces(wide, stored, axis=0):
        pieces_of[key].append(piece)
    cut = {
        key: matrix for key, matrix in wide.items() if coverage(pieces_of[key], matrix.shape) < matrix.size
    }
    for key, piece in _float_pieces(cut, stored, axis=1):
        pieces_of[key].append(piece)
    for key, quantized, runs in match_codes(graph, wide):
        pieces_of[key] += [WeightPiece(quantized.weight, *run, nbits=quantized) for run in runs]
    return {key: _distinct(pieces) for key, pieces in pieces_of.items()}


def _float_pieces(
    wanted: Mapping[_Key, np.ndarray], stored: Sequence[MatrixView], axis: int
) -> Iterator[tuple[_Key, WeightPiece]]:
    """Yields the pieces of the wanted matrices along an axis that float initializers store."""
    lines = {key: matrix.T if axis else matrix for key, matrix in wanted.items()}
    for key, number, runs in find_runs(lines, [view.matrix for view in stored]):
        name, transposed, slot, _ = stored[number]
        for run in runs:
            yield key, WeightPiece(name, *run, axis, transposed != bool(axis), slot)


def _distinct(pieces: list[WeightPiece]) -> list[WeightPiece]:
    """Returns the pieces without those that lie inside of another one."""
    kept: list[WeightPiece] = []
    for piece in sorted(
        pieces, key=lambda piece: (piece.start - piece.stop, piece.slot is not None, piece.transposed)
    ):
        if not any(
            other.start <= piece.start and piece.stop <= other.stop and _line(other) == _line(piece)
            for other in kept
        ):
            kept.append(piece)
    return sorted(kept, key=lambda piece: (piece.start, piece.initializer))


def _line(piece: WeightPiece) -> tuple[object, ...]:
    """Returns a key that is equal for pieces that store a matrix at the same place and in the same way."""
    return piece.initializer, piece.slot, piece.axis, piece.transposed, piece.at - piece.start


def _twins(base: Checkpoint, name: str) -> list[str]:
    """Returns all tensors of a checkpoint that equal ``name``, including itself."""
    info = base.tensors[name]
    alike = [twin for twin, its in base.tensors.items() if (its.shape, its.dtype) == (info.shape, info.dtype)]
    return [
        twin
        for twin in alike
        if twin == name
        or (
            base.samples[twin] == base.samples[name]
            and np.array_equal(_bytes(base, twin), _bytes(base, name))
        )
    ]


def _bytes(base: Checkpoint, name: str) -> np.ndarray:
    return base.view(name).reshape(-1).view(np.uint8)


def _keep_own(
    graph: GraphFile, name: str, twins: list[str], pieces: Iterable[WeightPiece]
) -> list[WeightPiece]:
    """Returns the pieces that belong to ``name`` and not to another, equal tensor."""
    if len(twins) == 1:
        return list(pieces)
    owned = []
    for piece in pieces:
        owners = hints.owners(graph, piece.initializer, twins)
        if name in owners and len(owners) > 1:
            raise Unsupported(
                "several tensors of the checkpoint are equal to this initializer, and its name does not "
                "tell whose it is",
                where=f"{graph.path}, {piece.initializer}",
                found=", ".join(owners[:5]),
                remedy="fold into the checkpoint, and export again",
            )
        if owners == [name]:
            owned.append(piece)
    return owned


def _readers(graph: GraphFile, pieces: Iterable[Iterable[WeightPiece]]) -> tuple[str, ...]:
    names = dict.fromkeys(piece.initializer for of_matrix in pieces for piece in of_matrix)
    return tuple(
        dict.fromkeys(node.name or node.output[0] for name in names for node in graph.readers.get(name, ()))
    )


def _require(graph: GraphFile, base: Checkpoint, missing: list[str]) -> None:
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise SiteNotFound(
            "the graph does not hold these tensors of the checkpoint, or not whole",
            where=f"{graph.path}, {base.folder}",
            found=some,
            remedy="name the checkpoint that the graph was made from; if it is, the exporter changed these "
            "weights: fold into the checkpoint, and export again",
        )


def find_vector(graph: GraphFile, vector: np.ndarray) -> list[WeightPiece]:
    """Returns the initializers that store ``vector`` ``[n]``, or parts of it, bit by bit after a cast to
    their dtype.

    The pieces are those of the column ``[n, 1]``.
    """
    whole = []
    parts = []
    for name, place in graph.stored.items():
        width = place.dtype.itemsize
        if place.dtype not in FLOATS or place.nbytes <= width or max(place.shape) * width != place.nbytes:
            continue
        stored = graph.array(name).reshape(-1)
        wanted = cast(vector, stored.dtype)
        is_row = len(place.shape) > 1 and place.shape[0] == 1
        if len(stored) >= len(wanted):
            whole += [WeightPiece(name, 0, len(wanted), at, 0, is_row) for at in _positions(wanted, stored)]
        else:
            parts += [
                WeightPiece(name, start, start + len(stored), 0, 0, is_row)
                for start in _positions(stored, wanted)
            ]
    return whole or parts


def _positions(short: np.ndarray, long: np.ndarray) -> Iterator[int]:
    """Yields the positions of ``short`` in ``long``; of overlapping ones only the first."""
    a, b = _bits(short), _bits(long)
    free = 0
    for at in np.flatnonzero(b[: len(b) - len(a) + 1] == a[0]).tolist():
        if at >= free and np.array_equal(b[at : at + len(a)], a):
            yield at
            free = at + len(a)


def _bits(values: np.ndarray) -> Any:
    return np.ascontiguousarray(values).view(np.dtype(f"u{values.dtype.itemsize}"))
