"""The names of the graph that the engine runs, and of what it reads besides tokens, caches and slots."""

from __future__ import annotations

DECODER = "decoder"
"""The decoder's graph that the engine runs, on caches that stay where they are; there where the bundle says ``decoder``."""
CACHE_LENGTHS, LONGEST, LOGITS_POSITIONS = "seqlens_k", "total_sequence_length", "logits_positions"
"""Inputs of that graph: the last position of each row's cache after a pass ``[batch]``, the length of the longest row, and the positions of
a pass whose logits it gives ``[batch, n]``.
"""
SOURCE_LENGTHS = "source_lengths"
"""Its input that says how many positions each row of an encoder has ``[batch]``, where they may differ."""


def part_ranks(path: str) -> str:
    """The input of the engine's graph that says how wide the parts of a shared ``down`` slot are, ``[members]``."""
    return f"{path}.ranks"
