"""Keys and values of prompts that were read before: a row that begins with the same tokens takes them over
instead of reading them.

They are kept in blocks of tokens. The key of a block is a hash of everything that its values depend on: the
tokens up to its end, and which adapter acted at which of them; and of the row's salt, since the time that a
prompt takes tells whether others have sent its beginning. Tokens at which an adapter does not act have the
base's key, so rows with different activated LoRAs (aLoRA, https://arxiv.org/abs/2504.12397) share one reading
of a conversation up to their invocations.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from .adapter_feeds import ResidentAdapter
from .kv_pool import KVPool

BLOCK = 16
"""Tokens of a block."""


class ReadRow(Protocol):
    """What is needed of a row."""

    adapter: ResidentAdapter | None
    acting: np.ndarray | None
    prompt: Sequence[int]
    salt: bytes

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens whose keys and values are in its cache, those of the adapter's prompt aside."""
        ...


class PrefixCache:
    """Up to ``budget`` bytes of blocks; the least recently used are given up first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._blocks: OrderedDict[bytes, list[np.ndarray]] = OrderedDict()

    def clear(self) -> None:
        """Gives up all of them."""
        self.nbytes = 0
        self._blocks.clear()

    def restore(self, row: ReadRow, pool: KVPool, place: int, is_long: bool = False) -> int:
        """Writes what is known of a row's prompt into its place in the pool, behind its adapter's prompt; how
        many tokens that are. The last token is never among them: its logits are wanted. Long rows have
        numbers of their own where the model makes a difference.
        """
        start, keys = _virtual(row), list[bytes]()
        for number, key in enumerate(_keys(row, row.prompt[:-1], is_long)):
            block = self._blocks.get(key)
            if block is None:
                break
            pool.write(place, block, start + number * BLOCK)
            keys.append(key)
        for key in reversed(keys):  # a block is of use only with those before it, which are given up last
            self._blocks.move_to_end(key)
        return len(keys) * BLOCK

    def keep(self, row: ReadRow, pool: KVPool, place: int, is_long: bool = False) -> None:
        """Keeps the whole blocks of what a row has read."""
        start, keys = _virtual(row), list(_keys(row, row.tokens, is_long))
        for number, key in enumerate(keys):
            if key not in self._blocks:
                block = pool.read(place, start + number * BLOCK, start + (number + 1) * BLOCK)
                self._blocks[key] = block
                self.nbytes += _size(block)
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        while self.nbytes > self.budget:
            self.nbytes -= _size(self._blocks.popitem(last=False)[1])


def _virtual(row: ReadRow) -> int:
    return 0 if row.adapter is None else row.adapter.virtual


def _keys(row: ReadRow, tokens: Sequence[int], is_long: bool) -> Iterator[bytes]:
    """The keys of the whole blocks of a row."""
    digest = b"" if row.adapter is None else row.adapter.digest.encode()
    # what follows an adapter's prompt depends on it
    key = row.salt + b"long" * is_long + (digest if _virtual(row) else b"")
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
