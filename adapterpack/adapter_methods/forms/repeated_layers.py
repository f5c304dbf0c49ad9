"""Says which blocks of a base an adapter repeats: PEFT's ``layer_replication``, the passthrough merges of
mergekit.

Ranges ``[0, 4], [2, 5]`` make of blocks 0 1 2 3 4 the stack 0 1 2 3 2 3 4. The blocks share the base's
weights, the adapter does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KEY = "layer_replication"
"""What PEFT's config calls it."""
MOST_LAYERS = 1024
"""The most blocks that a model may have once its blocks are repeated."""


def require_ranges(name: str, ends: Sequence[Any]) -> None:
    """Checks that numbers are the starts and ends of ranges of blocks, in turn.

    Raises:
        ValueError: they are not, or stand for more blocks than any model has.

    Example:
        >>> require_ranges("repeated_layers", (0, 4, 2, 5))
    """
    if (
        not isinstance(ends, tuple)
        or len(ends) % 2
        or len(ends) > 2 * MOST_LAYERS
        or not all(type(end) is int for end in ends)
    ):
        raise ValueError(
            f"{name} must be whole numbers, the start and the end of each range of blocks, not {ends!r:.80}"
        )
    pairs = list(zip(ends[::2], ends[1::2], strict=True))
    if (
        not all(0 <= start < end <= MOST_LAYERS for start, end in pairs)
        or sum(end - start for start, end in pairs) > MOST_LAYERS
    ):
        raise ValueError(
            f"{name} must be ranges of at least one block and of at most {MOST_LAYERS} together, not "
            f"{ends!r:.80}"
        )


def order_of(ends: Sequence[int]) -> tuple[int, ...]:
    """For each block of the repeated stack the block of the base that it is.

    Example:
        >>> order_of((0, 4, 2, 5))
        (0, 1, 2, 3, 2, 3, 4)
    """
    return tuple(
        number for start, end in zip(ends[::2], ends[1::2], strict=True) for number in range(start, end)
    )


def from_peft(value: Any) -> tuple[int, ...]:
    """The starts and ends, in turn, of what PEFT's config says.

    Raises:
        ValueError: it is no list of pairs.

    Example:
        >>> from_peft([[0, 4], [2, 5]]), from_peft(None)
        ((0, 4, 2, 5), ())
    """
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) > MOST_LAYERS
        or not all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    ):
        raise ValueError(f"{KEY} must be a list of ranges [start, end], not {value!r:.80}")
    return tuple(end for pair in value for end in pair)


def to_peft(ends: Sequence[int]) -> dict[str, Any]:
    """The entry of PEFT's config; none where no block is repeated.

    Example:
        >>> to_peft((0, 4, 2, 5)), to_peft(())
        ({'layer_replication': [[0, 4], [2, 5]]}, {})
    """
    return {KEY: [list(pair) for pair in zip(ends[::2], ends[1::2], strict=True)]} if ends else {}
