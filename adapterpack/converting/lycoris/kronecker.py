"""Converts LoKr's factors from LyCORIS, and finds the config under which adapterpack's LoKr divides the
widths in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...adapter_methods import Shape, Tensors, shapes_of
from ...adapter_methods.lokr import split_width
from ...errors import FormatError, Unsupported

_LARGEST = 1 << 16


class KroneckerSplit(NamedTuple):
    """How two factors divide the widths of a layer: the shapes ``[a, b]`` and ``[c, d]`` of their products,
    the number of kernel points, all of which are in w2, and the ``factor`` of adapterpack's LoKr.

    ``rank`` is None if neither is split: then the file's alpha has no meaning.
    """

    first: Shape
    second: Shape
    points: int
    rank: int | None
    factor: int
    both: bool

    @property
    def rows(self) -> int:
        """The number of outputs of the layer."""
        return self.first[0] * self.second[0]

    @property
    def columns(self) -> int:
        """The number of inputs of the layer, times the kernel points."""
        return self.first[1] * self.second[1]

    def settings(self, scale: float) -> dict[str, Any]:
        """Returns the settings of LoKr's config for these factors, with ``scale`` as the multiplier of their
        product.
        """
        rank = self.rank or max(self.second)
        return {
            "r": rank,
            "alpha": scale * rank,
            "decompose_both": self.both,
            "decompose_factor": self.factor,
            "kernel": self.points if self.points > 1 else 0,
        }


def split_kronecker(params: Tensors, points: int, where: str) -> KroneckerSplit:
    """Returns how the factors of a module, whose kernel has ``points`` points, divide its widths.

    Raises:
        FormatError: they do not fit each other.
        Unsupported: adapterpack's LoKr cannot divide the widths in this way.
    """
    (first, one), (second, two) = (_sides(params, name, where) for name in ("lokr_w1", "lokr_w2"))
    ranks = {rank for rank in (one, two) if rank is not None}
    if len(ranks) > 1 or second[1] % points:
        raise FormatError(
            "the factors of a module do not fit each other", where=where, found=shapes_of(params)
        )
    (a, b) = first
    c = second[0]
    d = second[1] // points
    rank = next(iter(ranks), None)
    for factor in _candidates(a, b, c, d):
        if (split_width(a * c, factor), split_width(b * d, factor)) == ((a, c), (b, d)) and _splits(
            params, first, (c, d), rank
        ):
            return KroneckerSplit(first, second, points, rank, factor, "lokr_w1_a" in params)
    raise Unsupported(
        "the widths are divided in a way that the method here does not have: unbalanced, or with a whole "
        "matrix that the rank would split",
        where=where,
        found=f"{a} x {c} and {b} x {d}, rank {rank}",
        remedy="merge it with the tool that made it",
    )


def _sides(params: Tensors, name: str, where: str) -> tuple[Shape, int | None]:
    """Returns the shape of a factor, and the rank if it is stored as two."""
    parts = [params[name]] if name in params else [params[f"{name}_a"], params[f"{name}_b"]]
    unfit = any(part.ndim != 2 or 0 in part.shape or max(part.shape) > _LARGEST for part in parts)
    if unfit or (len(parts) > 1 and parts[0].shape[1] != parts[1].shape[0]):
        raise FormatError(
            "the factors of a module do not fit each other",
            where=f"{where}.{name}",
            found=[part.shape for part in parts],
        )
    return (parts[0].shape[0], parts[-1].shape[1]), parts[0].shape[1] if len(parts) > 1 else None


def _candidates(a: int, b: int, c: int, d: int) -> Iterator[int]:
    """Yields possible values of the file's ``factor``: the larger of the two first sides, or none."""
    yield from dict.fromkeys((-1, max(a, b), min(a, b), *range(max(a, b), min(max(a, b, c, d), 1024) + 1)))


def _splits(params: Tensors, first: Shape, second: Shape, rank: int | None) -> bool:
    """Whether adapterpack's LoKr would split the same factors; if neither is split, any rank that splits none
    fits.
    """
    if rank is None:
        return True
    both = "lokr_w1_a" in params
    return (not both or 2 * rank < max(first)) and ("lokr_w2_a" in params) == (2 * rank < max(second))
