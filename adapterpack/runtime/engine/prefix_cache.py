"""A prefix cache: rows whose prompts begin with the same tokens share their keys and values instead of
reading them again.

It keeps blocks of tokens. The key of a block hashes everything on which its values depend: the tokens up to
its end, and which adapter acted at which of them. It also hashes the row's salt, because the time to the
first token would otherwise reveal whether someone else has sent the same beginning. Tokens at which an
adapter does not act have the key of the base, so rows with different activated LoRAs (aLoRA,
https://arxiv.org/abs/2504.12397) share the conversation up to their invocations.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from .kv_pool import KVPool
from .requests import SequenceState

BLOCK = 16
"""The number of tokens in a block."""


class PrefixCache:
    """Keeps up to ``budget`` bytes of blocks and evicts the least recently used first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._blocks: OrderedDict[bytes, list[np.ndarray]] = OrderedDict()

    def clear(self) -> None:
        """Drops all blocks."""
        self.nbytes = 0
        self._blocks.clear()

    def restore(self, row: SequenceState, pool: KVPool, place: int, is_long: bool = False) -> int:
        """Writes the cached blocks of a row's prompt into its place in the pool, after the adapter's prompt,
        and returns the number of tokens that they hold.

        The last token is always read, because its logits are needed. With LongRoPE long rows (``is_long``)
        have other values than short ones, hence other keys.
        """
        start, keys = row.virtual, list[bytes]()
        for number, key in enumerate(_keys(row, row.prompt[:-1], is_long)):
            block = self._blocks.get(key)
            if block is None:
                break
            pool.write(place, block, start + number * BLOCK)
            keys.append(key)
        # a block is useless without the blocks before it, so these are evicted last
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return len(keys) * BLOCK

    def keep(self, row: SequenceState, pool: KVPool, place: int, is_long: bool = False) -> None:
        """Stores the complete blocks of what a row has read."""
        start, keys = row.virtual, list(_keys(row, row.tokens, is_long))
        for number, key in enumerate(keys):
            if key not in self._blocks:
                block = pool.read(place, start + number * BLOCK, start + (number + 1) * BLOCK)
                self._blocks[key] = block
                self.nbytes += _size(block)
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        while self.nbytes > self.budget:
            self.nbytes -= _size(self._blocks.popitem(last=False)[1])


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


def _size(block: Sequence[np.ndarray]) -> int:
    return sum(array.nbytes for array in block)
