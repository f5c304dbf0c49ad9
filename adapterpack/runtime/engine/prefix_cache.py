"""A prefix cache: rows whose prompts begin with the same tokens share their keys and values instead of
reading them again.

It keeps blocks of tokens. The key of a block hashes everything on which its values depend: the tokens up to
its end, and which adapter acted at which of them. It also hashes the row's salt, because the time to the
first token would otherwise reveal whether someone else has sent the same beginning. Tokens at which an
adapter does not act have the key of the base, so rows with different activated LoRAs (aLoRA,
https://arxiv.org/abs/2504.12397) share the conversation up to their invocations.

Layers with states of fixed size can only go on where their states were kept. They are kept at the end of a
row's last block, and where its tokens leave those of an earlier row: a third row finds them there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np

from .kv_pool import KVPool
from .requests import SequenceState
from .row_states import RowStates

BLOCK = 16
"""The number of tokens in a block."""
_STATES = b"states"
"""What follows a block's key in the key of the states at its end."""


class PrefixCache:
    """Keeps up to ``budget`` bytes of blocks and evicts the least recently used first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._blocks: OrderedDict[bytes, list[np.ndarray]] = OrderedDict()

    def clear(self) -> None:
        """Drops all blocks."""
        self.nbytes = 0
        self._blocks.clear()

    def restore(
        self, row: SequenceState, pool: KVPool, states: RowStates, place: int, is_long: bool = False
    ) -> int:
        """Writes the cached blocks of a row's prompt into its place in the pool, after the adapter's prompt,
        and returns the number of tokens that they hold.

        The last token is always read, because its logits are needed. With LongRoPE long rows (``is_long``)
        have other values than short ones, hence other keys.
        """
        keys = list(takewhile(self._blocks.__contains__, _keys(row, row.prompt[:-1], is_long)))
        row.known = len(keys) * BLOCK
        if len(states):
            while keys and keys[-1] + _STATES not in self._blocks:
                keys.pop()
            for key in keys[-1:]:
                states.write(place, self._blocks[key + _STATES])
        for number, key in enumerate(keys):
            pool.write(place, self._blocks[key], row.virtual + number * BLOCK)
        self._use(keys)
        return len(keys) * BLOCK

    def keep(
        self, row: SequenceState, pool: KVPool, states: RowStates, place: int, is_long: bool = False
    ) -> None:
        """Stores the complete blocks of what a row has read, and its states if it has read no more than
        these.
        """
        start, keys = row.virtual, list(_keys(row, row.tokens, is_long))
        for number, key in enumerate(keys):
            if key not in self._blocks:
                self._put(key, pool.read(place, start + number * BLOCK, start + (number + 1) * BLOCK))
        if len(states) and keys and len(row.tokens) == len(keys) * BLOCK:
            self._put(keys[-1] + _STATES, states.read(place))
        self._use(keys)
        while self.nbytes > self.budget:
            self.nbytes -= _size(*self._blocks.popitem(last=False))

    def _put(self, key: bytes, arrays: list[np.ndarray]) -> None:
        if key not in self._blocks:
            self._blocks[key] = arrays
            self.nbytes += _size(key, arrays)

    def _use(self, keys: Sequence[bytes]) -> None:
        """Makes a row's blocks the last to be evicted; a block is useless without those before it, and the
        states at its end without the block.
        """
        for key in reversed(keys):
            for one in (key + _STATES, key):
                if one in self._blocks:
                    self._blocks.move_to_end(one)


def _keys(row: SequenceState, tokens: Sequence[int], is_long: bool) -> Iterator[bytes]:
    """Yields the keys of the complete blocks of a row; each is chained to the one before."""
    digest = b"" if row.adapter is None else row.adapter.digest.encode()
    # The first key of the chain holds what all blocks depend on, such as the adapter's prompt, to which every
    # token attends.
    key = row.salt + b"long" * is_long + (digest if row.virtual else b"")
    for start in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
        acting = None if row.acting is None else row.acting[start : start + BLOCK]
        acts = row.adapter is not None and (acting is None or len(acting) < BLOCK or bool(acting.any()))
        seal = hashlib.sha256(key)
        seal.update(np.array(tokens[start : start + BLOCK], np.int64).tobytes())
        seal.update(digest + (b"" if acting is None else acting.tobytes()) if acts else b"")
        key = seal.digest()
        yield key


def _size(key: bytes, arrays: Sequence[np.ndarray]) -> int:
    # a model without keys and values has blocks that hold nothing
    return len(key) + sum(array.nbytes for array in arrays)
