"""Computes the positions of a row that an adapter acts on, from token ids, padding and cache: everything
after an invocation, or the ends of a prompt.

A config returns its rule as the property ``acts`` (:class:`~.config.SiteConfig`); None means every position.
The rules are written once, against the Python array API, so that a torch model and a session on numpy arrays
run the same lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from .arrays import array_namespace
from .operators import Array

_LONGEST = 1024
"""The longest invocation, because each of its tokens is compared with the entire batch."""
_ENDS = re.compile(r"(?:f([0-9]{1,6}))?(?:(?:^|(?<=[0-9])\+)l([0-9]{1,6}))?")


class Acts(Protocol):
    """A rule for positions. ``ids``, ``real`` (not padding) and ``prompt`` (real, and not part of the answer
    to learn) are ``[batch, length]`` of one pass.

    ``before`` ``[batch]`` says, for a pass that continues a KV cache, in which rows the adapter has already
    acted; it is None for a pass that begins rows.
    """

    @property
    def joins(self) -> bool:
        """Whether the adapter may start on a KV cache that was filled without it."""
        ...

    def mask(self, ids: Array, real: Array, prompt: Array, before: Array | None) -> Array:
        """Returns where the adapter acts, ``[batch, length]`` bool."""
        ...

    def woven(self, row: Sequence[int]) -> tuple[int, ...]:
        """Returns a row of ids, at least as long as ``row``, in which the adapter acts."""
        ...


class Invoked(NamedTuple):
    """Acts from the first token of the last occurrence of ``tokens`` in a pass to the end of the row; a row
    without them gets the base model's output.

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
        """True: before the invocation the adapter changes nothing, so the base's cache is the adapter's,
        too.
        """
        return True

    def mask(self, ids: Array, real: Array, prompt: Array, before: Array | None) -> Array:
        """Returns where the adapter acts, ``[batch, length]`` bool."""
        xp = array_namespace(ids)
        length = ids.shape[1]
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
        """Returns the row with the invocation inserted in its middle."""
        half = len(row) // 2
        return (*row[:half], *self.tokens, *row[half:])


class Ends(NamedTuple):
    """Acts on the ``first`` and the ``last`` positions of a prompt, on each position at most once if the
    prompt is short, and never on generated tokens.

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
        """False: the first positions of the prompt are in the cache already."""
        return False

    def mask(self, ids: Array, real: Array, prompt: Array, before: Array | None) -> Array:
        """Returns where the adapter acts, ``[batch, length]`` bool."""
        if before is not None:
            # A pass with a cache holds generated tokens only, and this rule leaves them alone.
            return real & False
        xp = array_namespace(prompt)
        order = xp.cumulative_sum(xp.astype(prompt, xp.int64), axis=1)
        return prompt & ((order <= self.first) | (order > order[:, -1:] - self.last))

    def woven(self, row: Sequence[int]) -> tuple[int, ...]:
        """Returns the row unchanged."""
        return tuple(row)


def ends_of(text: str) -> Ends | None:
    """Parses how many of a prompt's first and last positions to act on: ``f3``, ``l1``, ``f3+l1``, or ``all``
    (None).

    Raises:
        ValueError: the text has none of these forms.

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
    """Raises ValueError unless ``tokens`` are 1 to 1024 token ids."""
    ids = isinstance(tokens, tuple) and all(type(token) is int and token >= 0 for token in tokens)
    if not ids or not 0 < len(tokens) <= _LONGEST:
        raise ValueError(
            f"{name} must be the token ids of what invokes the adapter, 1 to {_LONGEST} of them, not "
            f"{tokens!r:.80}"
        )


def has_acted(mask: Array, before: Array | None) -> Array:
    """Returns whether the adapter has acted in each row by the end of a pass with this ``mask`` ``[batch,
    length]``: ``[batch]`` bool.
    """
    now = array_namespace(mask).any(mask, axis=1)
    return now if before is None else now | before
