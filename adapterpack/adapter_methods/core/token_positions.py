"""Computes the positions of a row that an adapter acts on, from token ids, padding and cache: after an
invocation, or a prompt's ends.

A config names it by its property ``acts`` (:class:`~.config.SiteConfig`), None for every position. The rules
are written once, against the Python array API: the same lines tell a model in torch and a session on numpy
arrays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from .arrays import array_namespace
from .operators import Array

_LONGEST = 1024
"""The longest invocation: each of its tokens is a comparison with the whole batch."""
_ENDS = re.compile(r"(?:f([0-9]{1,6}))?(?:(?:^|(?<=[0-9])\+)l([0-9]{1,6}))?")


class Acts(Protocol):
    """A rule. ``ids``, ``real`` (not padding) and ``prompt`` (real, and not what is to be learnt) are
    ``[batch, length]`` of one pass.

    ``before`` ``[batch]`` says of a pass on a cache whether the adapter has acted in the rows so far; None
    for a pass that begins rows.
    """

    @property
    def joins(self) -> bool:
        """Whether it may begin on a cache that was filled without the adapter."""
        ...

    def mask(self, ids: Array, real: Array, prompt: Array, before: Array | None) -> Array:
        """Where the adapter acts, ``[batch, length]`` bool."""
        ...

    def woven(self, row: Sequence[int]) -> tuple[int, ...]:
        """A row of ids made such that the adapter acts in it, no shorter than it was."""
        ...


class Invoked(NamedTuple):
    """From the first token of the last occurrence of ``tokens`` in a pass, and then at everything after it; a
    row without it is the base's.

    Example:
        >>> import numpy as np
        >>> ids = np.array([[7, 8, 1, 7, 8, 2], [1, 2, 3, 7, 1, 8]])
        >>> real = np.ones(ids.shape, bool)
        >>> Invoked((7, 8)).mask(ids, real, real, None).astype(int)
        array([[0, 0, 0, 1, 1, 1],
               [0, 0, 0, 0, 0, 0]])
    """

    tokens: tuple[int, ...]

    @property
    def joins(self) -> bool:
        """What the base has put into a cache is what this adapter would have, too."""
        return True

    def mask(self, ids: Array, real: Array, prompt: Array, before: Array | None) -> Array:
        """Where the adapter acts, ``[batch, length]`` bool."""
        xp, length = array_namespace(ids), ids.shape[1]
        starts = length - len(self.tokens) + 1
        invoked = xp.zeros(ids.shape[:1], dtype=xp.bool, device=ids.device) if before is None else before
        if starts < 1:
            return real & invoked[:, None]
        match = real[:, :starts]
        for offset, token in enumerate(self.tokens):
            match = match & (ids[:, offset : offset + starts] == token)
        places = xp.arange(length, device=ids.device)
        last = xp.max(xp.where(match, places[:starts], -1), axis=1)
        return real & (invoked[:, None] | ((last >= 0)[:, None] & (places >= last[:, None])))

    def woven(self, row: Sequence[int]) -> tuple[int, ...]:
        """The row with the tokens in its middle."""
        half = len(row) // 2
        return (*row[:half], *self.tokens, *row[half:])


class Ends(NamedTuple):
    """The ``first`` and the ``last`` positions of a prompt; of a short one each position at most once. What
    is generated is left alone.

    Example:
        >>> import numpy as np
        >>> real = np.array([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
        >>> Ends(first=1, last=2).mask(real, real, real, None).astype(int)
        array([[0, 1, 0, 1, 1],
               [1, 1, 0, 0, 0]])
    """

    first: int = 0
    last: int = 0

    @property
    def joins(self) -> bool:
        """The first positions of a prompt would be missing."""
        return False

    def mask(self, ids: Array, real: Array, prompt: Array, before: Array | None) -> Array:
        """Where the adapter acts, ``[batch, length]`` bool."""
        if before is not None:
            return real & False
        xp = array_namespace(prompt)
        order = xp.cumulative_sum(xp.astype(prompt, xp.int64), axis=1)
        return prompt & ((order <= self.first) | (order > order[:, -1:] - self.last))

    def woven(self, row: Sequence[int]) -> tuple[int, ...]:
        """The row as it is."""
        return tuple(row)


def ends_of(text: str) -> Ends | None:
    """``all`` (None), or how many of a prompt's first and last positions: ``f3``, ``l1``, ``f3+l1``.

    Raises:
        ValueError: the text says neither.

    Example:
        >>> ends_of("f3+l1"), ends_of("l2"), ends_of("all")
        (Ends(first=3, last=1), Ends(first=0, last=2), None)
    """
    if text == "all":
        return None
    match = _ENDS.fullmatch(text) if isinstance(text, str) else None
    ends = Ends(*(int(number or 0) for number in match.groups())) if match else Ends()
    if not any(ends):
        raise ValueError(f"positions must be all, or such as f1, l1 or f3+l1, not {text!r:.80}")
    return ends


def require_invocation(name: str, tokens: Any) -> None:
    """Raises ValueError unless ``tokens`` are ids: at least one, at most 1024."""
    ids = isinstance(tokens, tuple) and all(type(token) is int and token >= 0 for token in tokens)
    if not ids or not 0 < len(tokens) <= _LONGEST:
        raise ValueError(
            f"{name} must be the token ids of what invokes the adapter, 1 to {_LONGEST} of them, not "
            f"{tokens!r:.80}"
        )


def has_acted(mask: Array, before: Array | None) -> Array:
    """Whether the adapter has acted in each row by the end of a pass with this ``mask`` ``[batch, length]``:
    ``[batch]`` bool.
    """
    now = array_namespace(mask).any(mask, axis=1)
    return now if before is None else now | before
